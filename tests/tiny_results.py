"""A run's folder as training writes it, and the commands that use it, in this process."""

from __future__ import annotations

import functools
from argparse import Namespace
from types import ModuleType
from typing import Any
from unittest import mock

import jax
import numpy as np
from tiny_runs import OFF, TARGETS, Place

import jlora
from jlora import config
from jlora.distributed import sharding

LORA = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}


def make_result(place: Place) -> Place:
    """Saves an adapter with large random A and B in the run's folder."""
    _, params = jlora.load_pretrained(str(place.base), dtype="float32")
    settings = jlora.LoraConfig(**LORA, init_lora_weights=False)
    adapter = jax.jit(jlora.init_adapter, static_argnums=2)(jax.random.key(1), params, settings)
    jlora.save_adapter(place.output, adapter)
    return place


def run(
    place: Place, command: ModuleType, *overrides: str, lora: Any = LORA, **sections: Any
) -> None:
    """Calls the command's ``run`` on one device; errors are raised."""
    settings = config.load(place.write(lora=lora, **sections), [OFF, *overrides])
    mesh = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    with mock.patch.object(sharding, "make_mesh", mesh):
        command.run(settings, Namespace())


def trained(place: Place, *, quantized: bool = False) -> tuple[Any, Any]:
    """The model and its parameters with the adapter attached, by jlora's public functions."""
    quantization = jlora.QuantConfig(bnb_4bit_compute_dtype="float32") if quantized else None
    model, params = jlora.load_pretrained(
        str(place.base), dtype="float32", quantization=quantization
    )
    return model, jlora.attach(params, jlora.load_adapter(place.output, params))


def logits(model: Any, params: Any) -> np.ndarray:
    """Logits of some tokens."""
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (2, 24), dtype=np.int32)
    return np.asarray(model(params, ids))
