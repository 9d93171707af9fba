"""LoRA and QLoRA fine-tuning in JAX: adapters and quantized weights are pytrees.

    model, params = jlora.load_pretrained(path, quantization=jlora.QuantConfig())
    adapter = jlora.init_adapter(jax.random.key(0), params, jlora.LoraConfig(r=16))
    logits = model(jlora.attach(params, adapter), input_ids)

Names are imported on first use, so that ``import jlora`` costs nothing and a mistake in a
configuration file is reported without waiting for JAX.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jlora.config import LoraConfig, QuantConfig
    from jlora.distributed import sharding
    from jlora.interop.linen import from_linen
    from jlora.interop.nnx import from_nnx
    from jlora.io.hf import load_pretrained, save_pretrained
    from jlora.io.peft import (
        embeddings_to_save,
        load_adapter,
        save_adapter,
        with_adapter_embeddings,
    )
    from jlora.lora import (
        Adapter,
        AdapterStack,
        attach,
        detach,
        eva,
        init_adapter,
        merge,
        stack_adapters,
        unmerge,
    )
    from jlora.lora.combine import add_weighted_adapter, extract_adapter, reduce_rank
    from jlora.models import resize_token_embeddings, untie
    from jlora.ops.dot import dot, embed
    from jlora.quant import nf4
    from jlora.quant.params import quantize_params as quantize
    from jlora.training.quantized_init import loftq, residual

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterStack",
    "LoraConfig",
    "QuantConfig",
    "__version__",
    "add_weighted_adapter",
    "attach",
    "detach",
    "dot",
    "embed",
    "embeddings_to_save",
    "eva",
    "extract_adapter",
    "from_linen",
    "from_nnx",
    "init_adapter",
    "load_adapter",
    "load_pretrained",
    "loftq",
    "merge",
    "nf4",
    "quantize",
    "reduce_rank",
    "residual",
    "resize_token_embeddings",
    "save_adapter",
    "save_pretrained",
    "sharding",
    "stack_adapters",
    "unmerge",
    "untie",
    "with_adapter_embeddings",
]

_FUNCTIONS = {
    "Adapter": "lora",
    "AdapterStack": "lora",
    "LoraConfig": "config",
    "QuantConfig": "config",
    "add_weighted_adapter": "lora.combine",
    "attach": "lora",
    "detach": "lora",
    "dot": "ops.dot",
    "embed": "ops.dot",
    "embeddings_to_save": "io.peft",
    "eva": "lora",
    "extract_adapter": "lora.combine",
    "from_linen": "interop.linen",
    "from_nnx": "interop.nnx",
    "init_adapter": "lora",
    "load_adapter": "io.peft",
    "load_pretrained": "io.hf",
    "loftq": "training.quantized_init",
    "merge": "lora",
    "quantize": "quant.params:quantize_params",
    "reduce_rank": "lora.combine",
    "residual": "training.quantized_init",
    "resize_token_embeddings": "models",
    "save_adapter": "io.peft",
    "save_pretrained": "io.hf",
    "stack_adapters": "lora",
    "unmerge": "lora",
    "untie": "models",
    "with_adapter_embeddings": "io.peft",
}
"""Public name → the module that defines it, and its name there where that differs."""

_MODULES = {"nf4": "quant.nf4", "sharding": "distributed.sharding"}
"""Public name of a module → the module."""


class _Alias(ModuleType):
    """Stands for a module of ``_MODULES`` in ``sys.modules``, for ``import jlora.nf4``."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # inspect asks every module for these: no reason to import jax
            raise AttributeError(name)
        return getattr(importlib.import_module(f"jlora.{_MODULES[self.__name__[6:]]}"), name)


class _Package(ModuleType):
    """The package's own module type: imports public names on first use.

    ``jlora.merge`` and ``jlora.quantize`` are functions *and* commands. Importing a submodule sets
    it as an attribute of its package, which would hide the function; those two assignments are
    left out. ``python -m jlora.merge`` and ``from jlora.merge import main`` are not concerned.
    """

    def __getattr__(self, name: str) -> Any:
        if name in _MODULES:
            value: Any = importlib.import_module(f"jlora.{_MODULES[name]}")
        elif name in _FUNCTIONS:
            module, _, attribute = _FUNCTIONS[name].partition(":")
            value = getattr(importlib.import_module(f"jlora.{module}"), attribute or name)
        else:
            raise AttributeError(f"module 'jlora' has no attribute {name!r}")
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _FUNCTIONS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
for _name in _MODULES:
    sys.modules[f"jlora.{_name}"] = _Alias(f"jlora.{_name}")
