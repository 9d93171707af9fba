"""Rotary position embeddings (RoFormer, arXiv 2104.09864) in the half-split layout of transformers.

Tables are float32 whatever the model computes in.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jlora.models.keys import Keys

Table = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]
"""Cosines and sines of the angles of each position, in float32."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """One rope variant: ``default``, ``linear`` (all frequencies divided by ``factor``) or
    ``llama3`` (low frequencies divided, high ones kept, a ramp between).
    """

    head_dim: int
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def frequencies(self) -> np.ndarray:
        """Radians per position of each of the ``head_dim / 2`` pairs, float32."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim
        frequencies = 1.0 / self.theta**exponents
        if self.kind == "linear":
            frequencies = frequencies / self.factor
        if self.kind == "llama3":
            frequencies = self._llama3(frequencies)
        return frequencies.astype(np.float32)

    def _llama3(self, frequencies: np.ndarray) -> np.ndarray:
        context, low, high = (
            self.original_max_position_embeddings,
            self.low_freq_factor,
            self.high_freq_factor,
        )
        turns = context * frequencies / (2 * math.pi)  # full turns within the original context
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return kept * frequencies + (1 - kept) * frequencies / self.factor

    def table(self, positions: Int[Array, "B T"]) -> Table:
        """Cosines and sines for ``positions``."""
        angles = positions[..., None].astype(jnp.float32) * self.frequencies()
        return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T heads dim"], table: Table) -> Float[Array, "B T heads dim"]:
    """Rotates the pairs (x[i], x[i + dim/2]) of every head; computes in float32."""
    cos, sin = (t[:, :, None] for t in table)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def parse_rope(keys: Keys, head_dim: int, max_positions: int) -> Rope:
    """Reads ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before).

    Raises ConfigError for other rope types and for partial rotation.
    """
    name = "rope_scaling" if keys.hf.get("rope_scaling") else "rope_parameters"
    given = keys.hf.get(name) or {}
    if not isinstance(given, dict):
        raise keys.fail(name, f"must be an object, not {given!r}")
    rope = type(keys)(given, f"{keys.where}: {name}")
    if any(isinstance(value, dict) for value in given.values()):
        raise keys.fail(name, "rope settings per layer type are not supported")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise rope.fail("rope_type", f"{kind!r} is not supported")
    keys.only("partial_rotary_factor", 1)
    rope.only("partial_rotary_factor", 1)
    required = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }.get(kind, ())
    if missing := [key for key in required if key not in given]:
        raise keys.fail(name, f"{kind} needs {', '.join(missing)}")
    if head_dim % 2:
        raise keys.fail("head_dim", f"{head_dim} is odd; rotary embeddings turn pairs")
    theta = rope.number("rope_theta", keys.number("rope_theta", 10000.0, float), float)
    scaling: dict[str, Any] = {key: rope.number(key, None, float) for key in required}
    if kind == "llama3":
        original = rope.number("original_max_position_embeddings", max_positions)
        original = keys.number("original_max_position_embeddings", original)
        scaling["original_max_position_embeddings"] = original
    return Rope(head_dim=head_dim, theta=theta, kind=kind, **scaling)
