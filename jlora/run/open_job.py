"""Opens a job: loads the model that the settings name, and makes or loads what is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jlora import lora
from jlora.config import Config, LoraConfig
from jlora.distributed import sharding
from jlora.errors import ConfigError
from jlora.io.hf import load_pretrained, read_model
from jlora.io.hf.folder import find_folder
from jlora.io.peft import CONFIG_FILE, load_adapter, with_saved_embeddings
from jlora.models import Model
from jlora.quant.params import quantize_params
from jlora.run.job import Job, build_job, configure_model
from jlora.run.new_tokens import adapter_folder, vocab_size
from jlora.training import quantized_init


def open_job(
    config: Config,
    tokenizer: Any,
    *,
    trained: bool,
    dense: bool = False,
    progress: Callable[[int, int], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Job:
    """Loads the model that the settings name, and what is trained of it.

    Args:
      config: the settings.
      tokenizer: see ``open_tokenizer``.
      trained: take the result of the run in ``train.output_dir``; else a new adapter (or
        ``lora.init_from``), or the base model to be trained in full.
      dense: load the base unquantized even if the settings quantize it.
      progress: see ``load_pretrained``.
      cancel: see ``load_pretrained``.
    """
    if trained and config.adapters:
        raise ConfigError(
            f"there are {len(config.adapters)} adapters: {', '.join(config.adapters)}",
            where=config.train.output_dir,
            fix=f"name one's folder, such as {config.train.output_dir}/{config.adapters[0]}",
        )
    mesh = sharding.make_mesh(config.mesh)
    source = LoadedArrays(
        config=config,
        tokenizer=tokenizer,
        mesh=mesh,
        trained=trained,
        dense=dense,
        progress=progress,
        cancel=cancel,
    )
    with jax.set_mesh(mesh):
        job = build_job(config=config, tokenizer=tokenizer, source=source)
    # What is compiled next may be timed on the devices (``mesh.times_kernels``): not beside this.
    jax.block_until_ready((job.base, job.initial, job.trainable))
    return job


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedArrays:
    """A job's arrays, loaded from files or computed from them: an ``ArraySource``."""

    config: Config
    tokenizer: Any
    mesh: jax.sharding.Mesh
    trained: bool
    dense: bool
    progress: Callable[[int, int], None] | None
    cancel: Callable[[], bool] | None

    def model_and_params(self) -> tuple[Model, Any]:
        """The base model; or, after full fine-tuning, the trained one."""
        config, name, dtype = self.config, self.config.model.name_or_path, "float32"
        if config.lora:
            dtype = config.model.dtype
        elif self.trained:
            name = _result_folder(config, "model", "config.json")
        loftq = config.lora and config.lora.effective_init == "loftq" and not self.trained
        quantization = None if self.dense or loftq else config.quantization
        # A revision of the hub's repository; the result of a run is a local folder.
        revision = config.model.revision if name == config.model.name_or_path else None
        stored = read_model(find_folder(name, revision))
        model, params = load_pretrained(
            name,
            dtype=dtype,
            quantization=quantization,
            # Read dense (for LoftQ or a merge), the base still has the runs of layers of a
            # quantized one, which the adapter's leaves follow.
            stacked_for=config.quantization,
            mesh=self.mesh,
            revision=revision,
            vocab_size=vocab_size(config, self.tokenizer, stored, self.trained),
            attention=config.model.attention,
            progress=self.progress,
            cancel=self.cancel,
            num_labels=config.model.num_labels,
            seed=config.train.seed,
            # The result of a run has its own head already.
            untie=config.model.untie and name == config.model.name_or_path,
        )
        folder = adapter_folder(config, self.trained)
        if folder and model.config.vocab_size_in_files is not None:
            params = with_saved_embeddings(folder, model, params)
            # What was taken from there is dense; in a prequantized base it was before, too.
            if quantization is not None and not model.config.prequantized:
                params = quantize_params(params, quantization)
        return configure_model(config, model, self.tokenizer), params

    def adapter(self, params: Any) -> tuple[Any, lora.Adapter]:
        """The trained adapter, the one of ``lora.init_from``, or a new one."""
        asked = self.config.lora
        assert asked is not None
        folder = asked.init_from
        if self.trained:
            folder = _result_folder(self.config, "adapter", CONFIG_FILE)
        if not folder:
            return self._new_adapter(params, asked)
        adapter = load_adapter(folder, params)
        if self.config.is_classification and "score" not in adapter.weights:
            raise ConfigError(
                f"the adapter has no score head (task_type: {adapter.config.task_type})",
                where=str(folder),
                fix="name one that was trained with SEQ_CLS, or leave it out",
            )
        return params, adapter

    def _new_adapter(self, params: Any, asked: LoraConfig) -> tuple[Any, lora.Adapter]:
        key = jax.random.key(self.config.train.seed)
        if asked.effective_init != "loftq":
            return params, lora.init_adapter(key, params, asked)
        # LoftQ makes the adapter of what quantizing loses, so the base was loaded dense.
        assert self.config.quantization is not None
        return quantized_init.loftq(key, params, asked, self.config.quantization)

    def compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's result."""
        return function(*arguments)

    def place(self, tree: Any) -> Any:
        """The tree on the mesh; arrays that are there already are not copied."""
        return sharding.place(tree, sharding.shardings(tree, self.mesh))


def _result_folder(config: Config, kind: str, file: str) -> str:
    """The run's output folder; ConfigError if it does not hold ``file`` yet."""
    folder = config.train.output_dir
    if not (Path(folder) / file).exists():
        raise ConfigError(f"holds no trained {kind} yet", where=folder, fix="train it first")
    return folder
