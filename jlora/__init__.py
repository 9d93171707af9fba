"""LoRA and QLoRA fine-tuning in JAX: adapters and packed weights are pytrees.

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
    from jlora import nf4
    from jlora.adapter_io import load_adapter, save_adapter
    from jlora.bases import loftq, residual
    from jlora.combine import add_weighted_adapter, extract_adapter, reduce_rank
    from jlora.config import LoraConfig, QuantConfig
    from jlora.dot import dot, embed
    from jlora.foreign.linen import from_linen
    from jlora.foreign.nnx import from_nnx
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
    from jlora.models import load_pretrained, save_pretrained, untie
    from jlora.quantization import quantize_params as quantize

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
    "save_adapter",
    "save_pretrained",
    "stack_adapters",
    "unmerge",
    "untie",
]

_HOME = {
    "Adapter": "lora",
    "AdapterStack": "lora",
    "LoraConfig": "config",
    "QuantConfig": "config",
    "add_weighted_adapter": "combine",
    "attach": "lora",
    "detach": "lora",
    "dot": "dot",
    "embed": "dot",
    "eva": "lora",
    "extract_adapter": "combine",
    "from_linen": "foreign.linen",
    "from_nnx": "foreign.nnx",
    "init_adapter": "lora",
    "load_adapter": "adapter_io",
    "load_pretrained": "models",
    "loftq": "bases",
    "merge": "lora",
    "quantize": "quantization:quantize_params",
    "reduce_rank": "combine",
    "residual": "bases",
    "save_adapter": "adapter_io",
    "save_pretrained": "models",
    "stack_adapters": "lora",
    "unmerge": "lora",
    "untie": "models",
}
"""Public name → its module, and its name there where that differs."""


class _Package(ModuleType):
    """The package's own module type: imports names on first use, and keeps functions functions.

    ``jlora.merge``, ``jlora.quantize`` and ``jlora.dot`` are functions *and* submodules (commands,
    a file of the design). Importing a submodule sets it as an attribute of its package, which
    would hide the function; that one assignment is left out. ``from jlora.merge import main`` and
    ``python -m jlora.merge`` find the submodule in ``sys.modules`` and are not concerned.
    """

    def __getattr__(self, name: str) -> Any:
        if name == "nf4":
            return importlib.import_module("jlora.nf4")
        if name not in _HOME:
            raise AttributeError(f"module 'jlora' has no attribute {name!r}")
        module, _, attribute = _HOME[name].partition(":")
        value = getattr(importlib.import_module(f"jlora.{module}"), attribute or name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
