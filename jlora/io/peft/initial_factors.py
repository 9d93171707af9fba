"""Loading PiSSA, OLoRA and LoftQ adapters, for which PEFT modifies the base.

PEFT repeats the initialisation, which subtracts the initial A @ B from the base, and overwrites A
and B. jlora keeps the base and stores the initial factors in the adapter (``Adapter.initial``),
so that several adapters can share one base.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax

from jlora.config import LoraConfig
from jlora.errors import ConfigError
from jlora.lora import Adapter, init_adapter
from jlora.lora.targets import find_targets
from jlora.ops.weights import has_quantized_base
from jlora.tree import paths

CONVERT = "convert it in PEFT: save_pretrained(…, path_initial_model_for_weight_conversion=…)"


def with_initial_factors(adapter: Adapter, params: Any, config: LoraConfig, file: Path) -> Adapter:
    """``adapter`` with the initial factors that ``config``, the file's, implies.

    Raises:
      ConfigError: they cannot be computed from ``params``.
    """
    kind = config.init_lora_weights
    if kind == "loftq":
        _check_loftq(adapter, params, config, file)
        return adapter
    named = dataclasses.replace(adapter.config, init_lora_weights=kind)
    if not config.init_splits_base:
        return dataclasses.replace(adapter, config=named)
    if "_niter_" in str(kind):
        raise _refusal(f"{kind} drew random numbers: its base cannot be computed again", file)
    if kind == "olora" and adapter.config.fan_in_fan_out:
        raise _refusal("PEFT's olora takes Conv1D's inputs for outputs: nothing fits then", file)
    bases = _bases(params, adapter.config)
    if any(has_quantized_base(base) for base in bases):
        raise _refusal(f"{kind} changed a base that was quantized then, and is quantized now", file)
    if any(isinstance(base, jax.ShapeDtypeStruct) for base in bases):
        raise _refusal(f"{kind} needs the base's values, not its shapes", file)
    initial = init_adapter(jax.random.key(0), params, named).initial
    return dataclasses.replace(adapter, config=named, initial=initial)


def abstract_initial_factors(adapter: Adapter, params: Any, config: LoraConfig) -> Adapter:
    """``with_initial_factors`` for an abstract adapter, without its checks."""
    kind = config.init_lora_weights
    if kind == "loftq":
        return adapter
    named = dataclasses.replace(adapter.config, init_lora_weights=kind)
    initial = None
    if config.init_splits_base:
        fresh = functools.partial(init_adapter, config=named)
        initial = jax.eval_shape(fresh, jax.random.key(0), params).initial
    return dataclasses.replace(adapter, config=named, initial=initial)


def _check_loftq(adapter: Adapter, params: Any, config: LoraConfig, file: Path) -> None:
    """ConfigError unless the base is quantized as LoftQ's first round leaves it."""
    iterations = config.loftq_config.loftq_iter
    if iterations > 1:
        raise _refusal(f"loftq changed its base {iterations} times, and did not keep it", file)
    if not all(has_quantized_base(base) for base in _bases(params, adapter.config)):
        raise ConfigError(
            "loftq trained on a quantized base",
            where=str(file),
            fix="load it with QuantConfig(bnb_4bit_use_double_quant=False)",
        )


def _bases(params: Any, config: LoraConfig) -> list[Any]:
    leaves = dict(paths.walk(params))
    return [leaves[target.leaf] for target in find_targets(params, config)[1]]


def _refusal(cause: str, file: Path) -> ConfigError:
    return ConfigError(cause, where=str(file), fix=CONVERT)
