"""Bases that change along with an adapter's first values: residuals, and LoftQ's."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtyping import Array

from jlora.config import LoraConfig, QuantConfig
from jlora.errors import ConfigError
from jlora.lora import DELTA, Adapter, init_adapter, unmerge
from jlora.ops.weights import has_adapter, has_quantized_base
from jlora.quant.params import quantize_params
from jlora.tree import paths


def residual(
    params: Any, adapter: Adapter, *, requantize: QuantConfig | None = None
) -> tuple[dict, Adapter]:
    """The base without what PiSSA or OLoRA took out of it, and the adapter for that base.

    This is how PEFT holds such a pair: ``save_pretrained`` writes the one and ``save_adapter`` the
    other, A and B as they are. Together they mean what ``params`` and ``adapter`` mean, up to
    rounding to the base's dtype.

    Args:
      params: the base as it was loaded.
      adapter: one with ``initial``; any other comes back with ``params`` as they are.
      requantize: how to pack the residual of a packed base, which is dense; leaves that ``params``
        has dense and this would pack are packed too.

    Raises:
      ConfigError: the base is packed, and ``requantize`` does not say how to pack it again.
    """
    if adapter.initial is None:
        return dict(params), adapter
    if requantize is None and _is_quantized_tree(params):
        raise ConfigError(
            "the base is packed, and its residual is other values",
            where="jlora.residual",
            fix="name how to pack it, residual(…, requantize=QuantConfig(…)), or load it dense",
        )
    taken = dataclasses.replace(adapter, weights=adapter.initial, initial=None)
    left: Any = unmerge(params, taken)
    config = dataclasses.replace(adapter.config, init_lora_weights=True)
    plain = dataclasses.replace(adapter, config=config, initial=None)
    return quantize_params(left, requantize) if requantize else left, plain


def loftq(
    key: Array, params: Any, config: LoraConfig, quantization: QuantConfig
) -> tuple[dict, Adapter]:
    """The base packed, and an adapter that makes up for what was lost (LoftQ, arXiv 2310.08659).

    In each of ``loftq_config.loftq_iter`` rounds the base less ``s·A@B`` is packed, and A and B are
    the best approximation of ``params`` less the packed base. With one round the base is
    ``quantize(params, quantization)``; after more it is another, to be kept with the adapter
    (``save_pretrained(…, quantized=True)``). Targets that stay dense start as with True.

    PEFT's A and B do not take the adapter's scale into account: they are these where
    ``lora_alpha`` is r.

    Args:
      key: a JAX random key.
      params: the dense parameters.
      config: the adapter's, with ``init_lora_weights="loftq"``.
      quantization: how to pack; 4 bits, nf4.

    Raises:
      ConfigError: see ``init_adapter``; or ``quantization`` is not nf4.
    """
    if not quantization.load_in_4bit or quantization.bnb_4bit_quant_type != "nf4":
        raise ConfigError(
            "loftq is for 4-bit nf4 bases", where="quantization", fix="use load_in_4bit and nf4"
        )
    if any(has_adapter(leaf) for _, leaf in paths.walk(params)):
        raise ConfigError(
            "the base has an adapter attached",
            where="jlora.loftq",
            fix="jlora.detach it, or jlora.merge it into the base first",
        )
    if _is_quantized_tree(params):
        raise ConfigError(
            "the base is packed: what that lost is not known any more",
            where="lora.init_lora_weights",
            fix="load it dense; loftq packs it",
        )
    config = dataclasses.replace(config, init_lora_weights="loftq")
    packed = quantize_params(params, quantization)
    adapter = init_adapter(key, packed, config, original=params)
    for _ in range(config.loftq_config.loftq_iter - 1):
        packed = quantize_params(unmerge(params, _factors(adapter)), quantization)
        adapter = init_adapter(key, packed, config, original=params)
    return packed, adapter


def _is_quantized_tree(params: Any) -> bool:
    return any(has_quantized_base(leaf) for _, leaf in paths.walk(params))


def _factors(adapter: Adapter) -> Adapter:
    """The adapter's A and B of kernels alone."""
    leaves = {path: leaf for path, leaf in paths.walk(adapter.weights) if path[-1] in DELTA}
    return dataclasses.replace(adapter, weights=paths.nest(leaves))
