"""Initializations that change the base, too: the residual of PiSSA and OLoRA, and LoftQ."""

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
    """A base from which PiSSA's or OLoRA's initial factors are subtracted, and its adapter.

    PEFT stores such a pair: ``save_pretrained`` writes the residual base and ``save_adapter`` the
    adapter with A and B as they are. Together they compute what ``params`` and ``adapter`` compute,
    up to rounding to the base's dtype.

    Args:
      params: the base as it was loaded.
      adapter: one with ``initial``; any other is returned unchanged, with ``params``.
      requantize: how to quantize the residual of a quantized base. Dense leaves of ``params`` that
        these settings quantize are quantized, too.

    Raises:
      ConfigError: the base is quantized, and ``requantize`` is not given.
    """
    if adapter.initial is None:
        return dict(params), adapter
    if requantize is None and _is_quantized_tree(params):
        raise ConfigError(
            "the base is quantized, and its residual has to be quantized again",
            where="jlora.residual",
            fix="pass residual(…, requantize=QuantConfig(…)), or load the base dense",
        )
    initial = dataclasses.replace(adapter, weights=adapter.initial, initial=None)
    remainder: Any = unmerge(params, initial)
    config = dataclasses.replace(adapter.config, init_lora_weights=True)
    plain = dataclasses.replace(adapter, config=config, initial=None)
    return quantize_params(remainder, requantize) if requantize else remainder, plain


def loftq(
    key: Array, params: Any, config: LoraConfig, quantization: QuantConfig
) -> tuple[dict, Adapter]:
    """A quantized base, and an adapter that compensates its error (LoftQ, arXiv 2310.08659).

    Each of ``loftq_config.loftq_iter`` rounds quantizes the base minus ``s·A@B``, and sets A and B
    to the best rank-r approximation of ``params`` minus the quantized base. After one round the
    base is ``quantize(params, quantization)``; after more it is another one, which must be saved
    with the adapter (``save_pretrained(…, quantized=True)``). Targets that are not quantized start
    as with ``init_lora_weights=True``.

    PEFT ignores the adapter's scale here: its A and B equal these where ``lora_alpha`` is r.

    Args:
      key: a JAX random key.
      params: the dense parameters.
      config: the adapter's config; ``init_lora_weights`` need not be ``"loftq"``.
      quantization: 4-bit nf4 settings.

    Returns:
      The quantized parameters and the adapter.

    Raises:
      ConfigError: see ``init_adapter``; or ``quantization`` is not 4-bit nf4, or ``params`` are
        quantized already or have an adapter attached.
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
            "the base is already quantized: the error that LoftQ compensates is not known",
            where="lora.init_lora_weights",
            fix="load it dense; loftq quantizes it",
        )
    config = dataclasses.replace(config, init_lora_weights="loftq")
    quantized = quantize_params(params, quantization)
    adapter = init_adapter(key, quantized, config, original=params)
    for _ in range(config.loftq_config.loftq_iter - 1):
        # Only these: unmerge refuses leaves that the adapter replaced.
        quantized = quantize_params(unmerge(params, _kernel_deltas(adapter)), quantization)
        adapter = init_adapter(key, quantized, config, original=params)
    return quantized, adapter


def _is_quantized_tree(params: Any) -> bool:
    """Whether any leaf is quantized, with an adapter attached or not."""
    return any(has_quantized_base(leaf) for _, leaf in paths.walk(params))


def _kernel_deltas(adapter: Adapter) -> Adapter:
    """The adapter with A and B of kernels only."""
    leaves = {path: leaf for path, leaf in paths.walk(adapter.weights) if path[-1] in DELTA}
    return dataclasses.replace(adapter, weights=paths.nest(leaves))
