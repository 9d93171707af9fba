"""Frequencies of the rope variants, in float32.

They follow transformers' ``modeling_rope_utils``, including the order of its roundings: an error of
one unit in the last place of a frequency is a hundredth of a radian at position 100000. float64
rounded once at the end would differ from torch in a third of the frequencies; float32 exponents,
powers rounded once from float64 and a float32 inverse differ in one of a hundred.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

Frequencies = Float32[np.ndarray, " half"]
"""Radians per position of each rotated pair."""


def periods(theta: float, dim: int) -> Frequencies:
    """Positions per radian of the ``dim / 2`` pairs, ``theta ** (2i / dim)``."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return (theta ** exponents.astype(np.float64)).astype(np.float32)


def proportional(plain: Frequencies, share: float, factor: float) -> Frequencies:
    """The first ``share`` of a head's pairs, divided by ``factor``; the others are not rotated."""
    rotated = np.arange(plain.size) < int(share * plain.size)
    return np.where(rotated, plain / factor, 0)


def llama3(
    plain: Frequencies, factor: float, low_freq_factor: float, high_freq_factor: float, context: int
) -> Frequencies:
    """Llama 3.1: frequencies of fewer than ``low_freq_factor`` turns within the original context
    are divided by ``factor``, those of more than ``high_freq_factor`` unchanged, with a linear
    ramp in between.
    """
    turns = context / (2 * math.pi / plain)
    unchanged = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return (1 - unchanged) * plain / factor + unchanged * plain


def yarn(
    theta: float,
    dim: int,
    factor: float,
    context: int,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
) -> Frequencies:
    """YaRN (arXiv 2309.00071), NTK by parts: pairs of more than ``beta_fast`` turns within the
    original context are unchanged, those of fewer than ``beta_slow`` divided by ``factor``, with a
    linear ramp in between; ``truncate`` rounds the ramp's ends outwards to whole pairs.
    """

    def pair_with(turns: float) -> float:
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with(beta_fast), pair_with(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    # transformers' guard against a ramp of no width.
    if low == high:
        high += 0.001
    whole = periods(theta, dim)
    divided = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    unchanged = 1 - divided
    return 1 / (factor * whole) * (1 - unchanged) + 1 / whole * unchanged


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's factor on cosines and sines: the attention temperature for longer contexts."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def longrope(theta: float, dim: int, factors: list[float]) -> Frequencies:
    """LongRoPE (arXiv 2402.13753): each frequency divided by a separate factor."""
    return 1 / (np.asarray(factors, np.float32) * periods(theta, dim))


def longrope_mscale(factor: float, context: int) -> float:
    """LongRoPE's factor on cosines and sines, for ``factor`` times the original context."""
    return math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0


def dynamic(
    plain: Frequencies, factor: float, context: int, length: Int[Array, "B T"]
) -> Float[Array, "B T half"]:
    """Dynamic NTK: beyond ``context`` tokens theta grows so that the slowest pair is divided by
    ``1 + factor * (length / context - 1)`` and the fastest is unchanged.
    """
    beyond = jnp.maximum(length - context, 0).astype(jnp.float32)
    stretch = 1 + factor * (beyond / context)
    exponents = -np.arange(plain.size, dtype=np.float32) / np.float32(plain.size - 1)
    return jnp.asarray(plain) * stretch[..., None] ** exponents
