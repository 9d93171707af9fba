"""A job: mesh, model, parameters, adapter and tokenizer of a run, put together in one place.

Where the arrays come from is an argument: ``run/open_job.py`` loads them, ``run/abstract_job.py``
has shapes in their place. Both give the same Job, so a step compiled for the one is the other's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jlora import lora
from jlora.config import Config, TrainConfig
from jlora.errors import ConfigError
from jlora.io.hf.folder import hub_snapshot
from jlora.lora.targets import Target, find_targets, token_rows
from jlora.models import Model, as_classifier
from jlora.models.layer_scan import OFFLOAD
from jlora.training.optim import without_gradient_of_a
from jlora.training.step import Bind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A model with its frozen parameters, what is trained, and how the two are combined."""

    config: Config
    mesh: jax.sharding.Mesh
    model: Model
    tokenizer: Any
    base: Any
    """With an adapter, the model's parameters; empty in full fine-tuning."""
    trainable: Any
    """The Adapter, without its ``initial``, or in full fine-tuning the parameters in float32. In a
    multi-adapter run the leaves of the one Adapter have a leading axis of adapters."""
    bind: Bind
    targets: tuple[Target, ...] = ()
    initial: Any = None
    """What the adapter started from (PiSSA, OLoRA), see ``Adapter``; it is frozen."""

    @property
    def frozen(self) -> Any:
        """The first argument of ``bind``."""
        return self.base, self.initial

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters' names in a multi-adapter run; else empty."""
        return self.config.adapters

    @property
    def params(self) -> Any:
        """The parameters to evaluate or generate with."""
        return self.bind(self.frozen, self.trainable, None)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a reply: the model's and the tokenizer's."""
        eos = self.tokenizer.eos_token_id
        return tuple({*self.model.config.eos_token_ids, *([] if eos is None else [eos])})

    def per_adapter(self, trainable: Any) -> list[tuple[Job, Any]]:
        """For each adapter the job of a run that trains it alone, and its part of ``trainable``."""
        return [
            (dataclasses.replace(self, config=config), part)
            for config, part in split_adapters(self.config, trainable)
        ]


@runtime_checkable
class ArraySource(Protocol):
    """Where a job's arrays come from, and how new ones are made."""

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The devices."""
        ...

    def model_and_params(self) -> tuple[Model, Any]:
        """The model as the settings configure it, and its parameters."""
        ...

    def adapter(self, params: Any) -> tuple[Any, lora.Adapter]:
        """The base that the adapter belongs to (LoftQ quantizes it), and the adapter."""
        ...

    def compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(*arguments)``, or the shapes of its result."""
        ...

    def place(self, tree: Any) -> Any:
        """The tree with every array, or shape, where it belongs on the mesh."""
        ...


def build_job(*, config: Config, tokenizer: Any, source: ArraySource) -> Job:
    """The job of these settings; the only place where one is put together.

    Raises:
      ConfigError: a pattern matches nothing, or the model and the settings do not fit together.
    """
    model, base = source.model_and_params()
    check_trainable(config, model)
    trainable, initial, targets = base, None, []
    if config.lora is None:
        base = {}
    else:
        base, adapter = source.adapter(base)
        adapter = with_base_name(config, adapter)
        check_rows_of_untied(config, base, adapter)
        _, targets = find_targets(base, adapter.config)
        # Apart: the optimizer would decay the initial factors, and the step donates what is
        # trained.
        trainable, initial = dataclasses.replace(adapter, initial=None), adapter.initial
        if count := len(config.adapters):
            trainable = source.compute(lambda tree: _repeat(tree, count), trainable)
    base, trainable, initial = source.place((base, trainable, initial))
    return Job(
        config=config,
        mesh=source.mesh,
        model=model,
        tokenizer=tokenizer,
        base=base,
        trainable=trainable,
        bind=make_bind(config),
        targets=tuple(targets),
        initial=initial,
    )


def _repeat(tree: Any, count: int) -> Any:
    """The tree with a new leading axis: all adapters of a run start from the same values."""
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * count), tree)


def split_adapters(config: Config, trainable: Any) -> list[tuple[Config, Any]]:
    """Each adapter's settings and its part of ``trainable``; all of it if there is only one."""
    if not config.adapters:
        return [(config, trainable)]
    return [
        (config.for_adapter(name), jax.tree.map(lambda leaf, i=i: leaf[i], trainable))
        for i, name in enumerate(config.adapters)
    ]


def configure_model(config: Config, model: Model, tokenizer: Any) -> Model:
    """The model with its classes' names, and with the compute dtype and remat of the settings."""
    if config.is_classification:
        names = config.model.id2label or ()
        model_config = as_classifier(model.config, len(names), names, tokenizer.pad_token_id)
        model = dataclasses.replace(model, config=model_config)
    elif model.config.num_labels:
        raise ConfigError(
            "is a classifier, but the rows have no classes",
            where=f"model.name_or_path: {config.model.name_or_path}",
            fix="name a language model, or use rows of format: classification",
        )
    return with_remat(dataclasses.replace(model, dtype=config.compute_dtype), config.train)


def with_remat(model: Model, settings: TrainConfig) -> Model:
    """The model with the rematerialisation of the settings.

    That of ``auto``, which is decided where the step is compiled, is on: nothing else has a
    backward pass.
    """
    remat = OFFLOAD if settings.activation_offloading else settings.gradient_checkpointing
    return dataclasses.replace(model, gradient_checkpointing=True if remat == "auto" else remat)


def with_base_name(config: Config, adapter: lora.Adapter) -> lora.Adapter:
    """The adapter with the base's name in its config, and with the dropout of the settings.

    Experts and routers have no dropout, and PEFT refuses another value than 0 beside them.

    The name is that on the hub if it is known: from the settings, or because the base is in the
    hub's cache.
    """
    asked = config.lora
    assert asked is not None
    name, revision = config.model.name_or_path, config.model.revision
    name, revision = hub_snapshot(name) or (name, revision)
    adapter_config = dataclasses.replace(
        adapter.config,
        lora_dropout=0.0 if adapter.config.target_parameters else asked.lora_dropout,
        base_model_name_or_path=asked.base_model_name_or_path or name,
        revision=asked.revision or revision,
    )
    return dataclasses.replace(adapter, config=adapter_config)


def check_trainable(config: Config, model: Model) -> None:
    """ConfigError when a prequantized model is to be trained in full."""
    if model.config.prequantized and config.lora is None:
        raise ConfigError(
            "the base model is already quantized, and quantized weights cannot be trained in full",
            where=f"model.name_or_path: {config.model.name_or_path}",
            fix="add a lora section, or name the model that it was quantized from",
        )


def check_rows_of_untied(config: Config, base: Any, adapter: lora.Adapter) -> None:
    """ConfigError when rows of an embedding are trained that ``model.untie`` separates."""
    tables = [leaf for leaf, _ in token_rows(base, adapter.config) if leaf.kind == "embedding"]
    if config.model.untie and tables:
        raise ConfigError(
            f"the tokens of {tables[0].module()} are trained: in PEFT a tied head follows them, "
            "an untied one does not, so the adapter would give other logits on the tied base",
            where="model.untie",
            fix="leave it out, or save the untied base (jlora.untie, jlora.save_pretrained) and "
            "name its folder",
        )


def make_bind(config: Config) -> Bind:
    """How frozen and trainable parameters are combined: see ``Job.bind``."""
    if config.lora is None:
        return _CastToCompute(config.compute_dtype)
    return bind_adapter_with_frozen_a if config.train.lorafa else bind_adapter


def bind_adapter(frozen: Any, adapter: lora.Adapter, dropout_key: Any) -> Any:
    """The base with the adapter attached; without a key there is no dropout."""
    base, initial = frozen
    return lora.attach(base, dataclasses.replace(adapter, initial=initial), dropout_key=dropout_key)


def bind_adapter_with_frozen_a(frozen: Any, adapter: lora.Adapter, dropout_key: Any) -> Any:
    """``bind_adapter`` for LoRA-FA: no gradient flows to A."""
    return bind_adapter(frozen, without_gradient_of_a(adapter), dropout_key)


@dataclasses.dataclass(frozen=True)
class _CastToCompute:
    """Full fine-tuning: the float32 master weights, cast to the compute dtype.

    A class, because two functions made by a closure are never equal and would be compiled twice.
    """

    dtype: str

    def __call__(self, frozen: Any, params: Any, dropout_key: Any) -> Any:
        del frozen, dropout_key
        return jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(self.dtype)), params)
