"""The abstract twin of ``open_job``: a job whose arrays are ``jax.ShapeDtypeStruct``.

It is made of the base's ``config.json`` and, for a prequantized base, of the headers of its
safetensors files. No weight is read, and the mesh's devices need not exist on this machine.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from jlora import lora
from jlora.config import Config
from jlora.distributed import sharding
from jlora.errors import ConfigError
from jlora.io.hf import prequantized, read_model
from jlora.io.hf.folder import CONFIG_FILES, find_folder
from jlora.io.hf.match import tensors_by_leaf
from jlora.io.hf.read import open_tensors
from jlora.io.peft import abstract_adapter_from_folder
from jlora.models import Model, as_classifier, with_untied_head, with_vocab_size
from jlora.quant.params import quantize_params
from jlora.run.init_from import with_settings_of
from jlora.run.job import Job, build_job, check_trainable, configure_model, with_base_name
from jlora.run.new_tokens import vocab_size


def abstract_job(
    *,
    config: Config,
    tokenizer: Any,
    mesh: jax.sharding.Mesh,
    download: bool = False,
    gpu_capability: tuple[int, int] | None = None,
) -> Job:
    """The job that ``open_job`` would open for training, with shapes in place of its arrays.

    Every shape knows its sharding: a step that is compiled for them is the run's step. The job's
    settings are those of ``lora.init_from``'s adapter where that decides.

    Args:
      config: the settings.
      tokenizer: see ``open_tokenizer``; only classifiers need it.
      mesh: of devices that may be on another machine.
      download: fetch a prequantized base from the hub, weights and all, if its headers are needed.
      gpu_capability: the compute capability of the mesh's GPUs if they are not in this machine.
    """
    source = AbstractArrays(
        config=config,
        tokenizer=tokenizer,
        mesh=mesh,
        download=download,
        gpu_capability=gpu_capability,
    )
    job = build_job(config=config, tokenizer=tokenizer, source=source)
    if config.lora is None:
        return job
    return dataclasses.replace(job, config=with_settings_of(config, job.trainable.config, job.base))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractArrays:
    """Shapes in place of a job's arrays: an ``ArraySource`` that reads no weight."""

    config: Config
    tokenizer: Any
    mesh: jax.sharding.Mesh
    download: bool
    gpu_capability: tuple[int, int] | None = None

    def model_and_params(self) -> tuple[Model, Any]:
        """The model, and the shapes of the parameters that a run would load."""
        model = abstract_model(self.config, self.tokenizer)
        if self.download and model.config.prequantized:
            find_folder(self.config.model.name_or_path, self.config.model.revision)
            model = abstract_model(self.config, self.tokenizer)  # which now has the headers
        model = dataclasses.replace(model, gpu_capability=self.gpu_capability)
        return model, abstract_base(self.config, model)

    def adapter(self, params: Any) -> tuple[Any, lora.Adapter]:
        """The adapter's shapes; those of the base are the same with and without LoftQ."""
        return params, abstract_adapter(self.config, params)

    def compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The shapes of the function's result."""
        return jax.eval_shape(function, *arguments)

    def place(self, tree: Any) -> Any:
        """The shapes with their shardings."""
        return sharding.abstract_arrays(tree, self.mesh)


def abstract_model(config: Config, tokenizer: Any, *, trained: bool = False) -> Model:
    """The model that ``open_job`` would open, without its parameters.

    Of a repository on the hub only the configuration is downloaded.
    """
    name, revision = config.model.name_or_path, config.model.revision
    folder = find_folder(name, revision, CONFIG_FILES)
    model = read_model(
        folder, config.quantization, dtype=config.model.dtype, attention=config.model.attention
    )
    check_trainable(config, model)
    if config.model.untie:
        model = with_untied_head(model)
    model = with_vocab_size(model, vocab_size(config, tokenizer, model, trained))
    if (classes := config.model.num_labels) is not None:
        model = dataclasses.replace(model, config=as_classifier(model.config, classes))
    return configure_model(config, model, tokenizer)


def abstract_base(config: Config, model: Model) -> Any:
    """The shapes of the parameters that a run loads, quantized as the settings say.

    In full fine-tuning they are float32. The layout of a prequantized base (which leaves are
    quantized, block sizes) is read from the headers of its safetensors files.
    """
    dtype = config.model.dtype if config.lora else "float32"
    stored = dataclasses.replace(model, dtype=dtype)
    if model.config.prequantized:
        return _prequantized_base(config, stored)
    if config.quantization is None:
        return stored.shapes
    quantize = functools.partial(quantize_params, config=config.quantization)
    return jax.eval_shape(quantize, stored.shapes)


def _prequantized_base(config: Config, model: Model) -> Any:
    folder = find_folder(config.model.name_or_path, config.model.revision, CONFIG_FILES)
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            "the base model is already quantized: its layout is in the headers of its weight "
            "files, which are not on this machine",
            where=f"model.name_or_path: {config.model.name_or_path}",
            fix="download the model first, or name the model that it was quantized from",
        )
    with open_tensors(folder, model, config.train.seed) as (_, source):
        groups = tensors_by_leaf(model)
        return prequantized.prequantized_shapes(model.shapes, groups, source.prequantized)


def abstract_adapter(config: Config, base: Any) -> lora.Adapter:
    """The shapes of the adapter that a run would train on this base (arrays or shapes).

    Raises ConfigError for every pattern that matches nothing.
    """
    assert config.lora is not None
    if config.lora.init_from:
        return with_base_name(config, abstract_adapter_from_folder(config.lora.init_from, base))
    asked = config.lora
    if asked.init_needs_more_than_params:
        # LoftQ computes with values; its shapes are those of any other start.
        asked = dataclasses.replace(asked, init_lora_weights=True)
    init = functools.partial(lora.init_adapter, config=asked)
    return with_base_name(config, jax.eval_shape(init, jax.random.key(0), base))
