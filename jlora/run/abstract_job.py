"""A run as shapes: what ``open_job`` would open, made of the base's ``config.json`` alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jlora import lora
from jlora.config import Config
from jlora.distributed import sharding
from jlora.errors import ConfigError
from jlora.io.hf import prequantized, read_model
from jlora.io.hf.folder import DESCRIPTION, find_folder, open_shards
from jlora.io.hf.names import tensors
from jlora.io.hf.read import check, with_score
from jlora.io.peft import describe_adapter
from jlora.lora.targets import find_targets
from jlora.models import Model, as_classifier
from jlora.quant.params import quantize_params
from jlora.run.job import Job, binding, check_trainable, named, settled


def describe_job(config: Config, model: Model, tokenizer: Any, mesh: jax.sharding.Mesh) -> Job:
    """The job that ``open_job`` would open for training, with a shape in place of every array.

    Every shape knows where the array would lie: a step that is compiled for them is the run's.
    ``model`` is ``describe_model``'s; the mesh's devices may be of a machine that is not there.
    """
    base = base_shapes(config, model)
    bind = binding(config)
    if config.lora is None:
        trainable = sharding.abstract_arrays(base, mesh)
        return Job(config, mesh, model, tokenizer, {}, trainable, bind)
    adapter = adapter_shapes(config, base)
    _, targets = find_targets(base, adapter.config)
    trainable = dataclasses.replace(adapter, initial=None)
    if names := config.adapters:
        several = functools.partial(jax.tree.map, lambda leaf: jnp.stack([leaf] * len(names)))
        trainable = jax.eval_shape(several, trainable)
    base, trainable, initial = (
        sharding.abstract_arrays(tree, mesh) for tree in (base, trainable, adapter.initial)
    )
    return Job(config, mesh, model, tokenizer, base, trainable, bind, tuple(targets), initial)


def describe_model(config: Config, tokenizer: Any) -> Model:
    """The model that ``open_job`` would open, without its parameters.

    Of a hub's repository only the description is downloaded.
    """
    name, revision = config.model.name_or_path, config.model.revision
    folder = find_folder(name, revision, DESCRIPTION)
    model = read_model(folder, dtype=config.model.dtype, attention=config.model.attention)
    check_trainable(config, model)
    if (classes := config.model.num_labels) is not None:
        model = dataclasses.replace(model, config=as_classifier(model.config, classes))
    return settled(config, model, tokenizer)


def base_shapes(config: Config, model: Model) -> Any:
    """The shapes of the parameters that a run reads: packed, or float32 if all of it trains.

    How a folder that came packed is packed stands in its files' headers; no weight is read.
    """
    dtype = config.model.dtype if config.lora else "float32"
    stored = dataclasses.replace(model, dtype=dtype)
    if model.config.prequantized:
        return _packed_shapes(config, stored)
    if config.quantization is None:
        return stored.shapes
    return jax.eval_shape(
        functools.partial(quantize_params, config=config.quantization), stored.shapes
    )


def _packed_shapes(config: Config, model: Model) -> Any:
    folder = find_folder(config.model.name_or_path, config.model.revision, DESCRIPTION)
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            "the base model came packed, and how stands in its weights, which are not here",
            where=f"model.name_or_path: {config.model.name_or_path}",
            fix="download the model first, or name the model that it was packed from",
        )
    groups: dict[Any, list[Any]] = {}
    for tensor in tensors(model):
        groups.setdefault(tensor.path, []).append(tensor)
    with open_shards(folder) as shards:
        if model.config.num_labels is not None:
            shards = with_score(shards, model, config.train.seed)
        source = check(shards, model, folder)
        return prequantized.packed_shapes(model.shapes, groups, source.packed)


def adapter_shapes(config: Config, shapes: Any) -> lora.Adapter:
    """What a run would train on a base of these shapes: the adapter's shapes, and its config.

    Raises ConfigError for every pattern that matches nothing.
    """
    assert config.lora is not None
    if config.lora.init_from:
        adapter = describe_adapter(config.lora.init_from, shapes)
    else:
        own = config.lora  # LoftQ's first values have the shapes of any other's
        plain = dataclasses.replace(own, init_lora_weights=True) if own.needs_more else own
        fresh = functools.partial(lora.init_adapter, config=plain)
        adapter = jax.eval_shape(fresh, jax.random.key(0), shapes)
    return named(config, adapter)
