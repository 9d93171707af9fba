"""What a command works on: mesh, model, parameters, adapter and tokenizer, put together once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jlora import lora
from jlora.config import Config, QuantConfig
from jlora.data import load_tokenizer
from jlora.distributed import sharding
from jlora.errors import ConfigError
from jlora.io.hf import load_pretrained
from jlora.io.peft import CONFIG_FILE, load_adapter
from jlora.lora.targets import Target, find_targets
from jlora.models import Model, as_classifier
from jlora.models.layer_scan import OFFLOAD
from jlora.training import quantized_init
from jlora.training.optim import without_gradient_of_a

Load = Callable[[str, str], tuple[Model, Any]]
"""(name, dtype) → a model and its parameters."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A model with its frozen parameters, what is trained, and how the two go together.

    With an adapter ``base`` is the model's parameters, ``initial`` what the adapter started from
    (see ``Adapter``), and ``trainable`` the Adapter without it; in full fine-tuning ``base`` is
    empty and ``trainable`` the parameters in float32. Several adapters that are trained together
    are one Adapter whose leaves have a leading axis.
    """

    config: Config
    mesh: jax.sharding.Mesh
    model: Model
    tokenizer: Any
    base: Any
    trainable: Any
    bind: Callable[[Any, Any, Any], Any]
    targets: tuple[Target, ...] = ()
    initial: Any = None

    @property
    def frozen(self) -> Any:
        """What ``bind`` takes besides what is trained."""
        return self.base, self.initial

    def each(self, trainable: Any) -> list[tuple[Job, Any]]:
        """The job of every adapter, with its share of ``trainable``: of several trained together,
        as if they were trained apart.
        """
        return [
            (dataclasses.replace(self, config=config), own)
            for config, own in each_adapter(self.config, trainable)
        ]

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of adapters that are trained together."""
        return self.config.adapters

    @property
    def params(self) -> Any:
        """The parameters to evaluate or generate with."""
        return self.bind(self.frozen, self.trainable, None)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a reply: the model's and the tokenizer's."""
        own = self.tokenizer.eos_token_id
        return tuple({*self.model.config.eos_token_ids, *([] if own is None else [own])})


def each_adapter(config: Config, trainable: Any) -> list[tuple[Config, Any]]:
    """The settings and the share of ``trainable`` of every adapter; all, where there is one."""
    if not config.adapters:
        return [(config, trainable)]
    return [
        (config.alone(name), jax.tree.map(lambda leaf, i=i: leaf[i], trainable))
        for i, name in enumerate(config.adapters)
    ]


def open_tokenizer(config: Config) -> Any:
    """The base model's tokenizer, with ``data.chat_template`` if that is given.

    A classifier's always has a padding token, which tells transformers where a text ends.
    """
    name, revision = config.model.name_or_path, config.model.revision
    tokenizer = load_tokenizer(name, config.data.chat_template, revision)
    if config.classifies and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def open_job(
    config: Config,
    tokenizer: Any,
    *,
    trained: bool,
    dense: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Job:
    """Loads the model that the settings name, and what is trained of it.

    Args:
      config: the settings.
      tokenizer: see ``open_tokenizer``.
      trained: take the result of the run in ``train.output_dir``; else a fresh adapter (or
        ``lora.init_from``), or the base model to be trained in full.
      dense: leave the base as it is where the settings would quantize it.
      progress: see ``load_pretrained``.
    """
    if trained and config.adapters:
        raise ConfigError(
            f"there are {len(config.adapters)} adapters: {', '.join(config.adapters)}",
            where=config.train.output_dir,
            fix=f"name one's folder, such as {config.train.output_dir}/{config.adapters[0]}",
        )
    mesh = sharding.make_mesh(config.mesh)
    open_ = _open_adapter if config.lora else _open_full
    loftq = config.lora and config.lora.begins_with == "loftq" and not trained
    quantization = None if dense or loftq else config.quantization  # LoftQ packs the base itself
    load = functools.partial(_load, config, quantization, mesh, progress, tokenizer)
    with jax.set_mesh(mesh):
        return open_(config, mesh, load, tokenizer, trained)


def _open_adapter(
    config: Config, mesh: jax.sharding.Mesh, load: Load, tokenizer: Any, trained: bool
) -> Job:
    assert config.lora is not None
    model, params = load(config.model.name_or_path, config.model.dtype)
    source = _result(config, "adapter", CONFIG_FILE) if trained else config.lora.init_from
    if source:
        adapter = load_adapter(source, params)
        if config.classifies and "score" not in adapter.weights:
            raise ConfigError(
                f"the adapter has no score head (task_type: {adapter.config.task_type})",
                where=str(source),
                fix="name one that was trained with SEQ_CLS, or leave it out",
            )
    else:
        params, adapter = _fresh_adapter(config, mesh, params)
    adapter = named(config, adapter)
    trainable, initial = dataclasses.replace(adapter, initial=None), adapter.initial
    if names := config.adapters:
        trainable = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(names)), trainable)
    both = trainable, initial
    trainable, initial = sharding.place(both, sharding.shardings(both, mesh))
    _, targets = find_targets(params, adapter.config)
    bind = binding(config)
    return Job(config, mesh, model, tokenizer, params, trainable, bind, tuple(targets), initial)


def _fresh_adapter(
    config: Config, mesh: jax.sharding.Mesh, params: Any
) -> tuple[Any, lora.Adapter]:
    """The base and the first adapter; LoftQ packs the base, which was read dense for it."""
    assert config.lora is not None
    key = jax.random.key(config.train.seed)
    if config.lora.begins_with != "loftq":
        return params, lora.init_adapter(key, params, config.lora)
    assert config.quantization is not None
    params, adapter = quantized_init.loftq(key, params, config.lora, config.quantization)
    return sharding.place(params, sharding.shardings(params, mesh)), adapter


def named(config: Config, adapter: lora.Adapter) -> lora.Adapter:
    """The adapter with the base's name in its config, and the dropout of the settings."""
    own = config.lora
    assert own is not None
    named = dataclasses.replace(
        adapter.config,
        lora_dropout=own.lora_dropout,
        base_model_name_or_path=own.base_model_name_or_path or config.model.name_or_path,
        revision=own.revision or config.model.revision,
    )
    return dataclasses.replace(adapter, config=named)


def _open_full(
    config: Config, mesh: jax.sharding.Mesh, load: Load, tokenizer: Any, trained: bool
) -> Job:
    name = _result(config, "model", "config.json") if trained else config.model.name_or_path
    model, params = load(name, "float32")
    check_trainable(config, model)
    return Job(config, mesh, model, tokenizer, {}, params, binding(config))


def check_trainable(config: Config, model: Model) -> None:
    """ConfigError when a model that came packed is to be trained in full."""
    if model.config.prequantized and config.lora is None:
        raise ConfigError(
            "the base model came packed, and packed weights cannot be trained in full",
            where=f"model.name_or_path: {config.model.name_or_path}",
            fix="add a lora section, or name the model that it was packed from",
        )


def _result(config: Config, kind: str, file: str) -> str:
    """The run's folder; ConfigError while it does not hold ``file``."""
    folder = config.train.output_dir
    if not (Path(folder) / file).exists():
        raise ConfigError(f"holds no trained {kind} yet", where=folder, fix="train it first")
    return folder


def binding(config: Config) -> Callable[[Any, Any, Any], Any]:
    """How what is frozen and what is trained go together: see ``Job.bind``."""
    if config.lora is None:
        return _Cast(config.compute_dtype)
    return attach_fa if config.train.lorafa else attach


def attach(frozen: Any, adapter: lora.Adapter, key: Any) -> Any:
    """The base with the adapter on it; ``key`` draws its dropout, None means none."""
    base, initial = frozen
    return lora.attach(base, dataclasses.replace(adapter, initial=initial), dropout_key=key)


def attach_fa(frozen: Any, adapter: lora.Adapter, key: Any) -> Any:
    """``attach`` for LoRA-FA: no gradient flows to A."""
    return attach(frozen, without_gradient_of_a(adapter), key)


@dataclasses.dataclass(frozen=True)
class _Cast:
    """Full fine-tuning's parameters in the type that is computed in; the masters stay float32."""

    dtype: str

    def __call__(self, frozen: Any, params: Any, key: Any) -> Any:
        del frozen, key
        return jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(self.dtype)), params)


def _load(
    config: Config,
    quantization: QuantConfig | None,
    mesh: jax.sharding.Mesh,
    progress: Callable[[int, int], None] | None,
    tokenizer: Any,
    name: str,
    dtype: str,
) -> tuple[Model, Any]:
    revision = config.model.revision if name == config.model.name_or_path else None
    model, params = load_pretrained(
        name,
        dtype=dtype,
        quantization=quantization,
        mesh=mesh,
        revision=revision,
        attention=config.model.attention,
        progress=progress,
        num_labels=config.model.num_labels,
        seed=config.train.seed,
    )
    return settled(config, model, tokenizer), params


def settled(config: Config, model: Model, tokenizer: Any) -> Model:
    """The model with its classes' names, and computing as the settings say."""
    if config.classifies:
        names = config.model.id2label or ()
        named = as_classifier(model.config, len(names), names, tokenizer.pad_token_id)
        model = dataclasses.replace(model, config=named)
    elif model.config.num_labels:
        raise ConfigError(
            "holds a classifier, but the rows have no classes",
            where=f"model.name_or_path: {config.model.name_or_path}",
            fix="name a language model, or rows of format: classification",
        )
    remat = OFFLOAD if config.train.activation_offloading else config.train.gradient_checkpointing
    return dataclasses.replace(model, dtype=config.compute_dtype, gradient_checkpointing=remat)
