"""Rotary position embeddings (RoFormer, arXiv 2104.09864) and their settings in ``config.json``.

Tables are float32 whatever the compute dtype.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jlora.errors import ConfigError
from jlora.models import rope_frequencies
from jlora.models.config_reader import ConfigReader

Table = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]
"""Cosines and sines of the angles of each position, in float32."""


@dataclasses.dataclass(frozen=True)
class DynamicNtk:
    """``dynamic``: theta grows with the length of documents of more than ``context`` tokens."""

    context: int
    factor: float

    def at(self, plain: np.ndarray, length: Int[Array, "B T"]) -> Float[Array, "B T half"]:
        """The frequencies in documents of ``length`` tokens."""
        return rope_frequencies.dynamic(plain, self.factor, self.context, length)


@dataclasses.dataclass(frozen=True)
class LongRope:
    """``longrope``: documents of more than ``context`` tokens use other frequencies."""

    context: int
    frequencies: tuple[float, ...]

    def at(self, plain: np.ndarray, length: Int[Array, "B T"]) -> Float[Array, "B T half"]:
        """The frequencies in documents of ``length`` tokens."""
        beyond = length[..., None] > self.context
        return jnp.where(beyond, np.asarray(self.frequencies, np.float32), plain)


@dataclasses.dataclass(frozen=True)
class Rope:
    """A rotary embedding; hashable, so that it can be static under jit."""

    frequencies: tuple[float, ...]
    """Radians per position of each rotated pair; the rest of a head is not rotated."""
    attention_scaling: float = 1.0
    """Factor on cosines and sines."""
    beyond: DynamicNtk | LongRope | None = None
    """Change of frequencies in documents longer than the context used in pre-training."""

    def table(
        self, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Table:
        """Cosines and sines for ``positions``.

        Frequencies that depend on a length use that of the token's document (its largest position
        + 1), so that documents in packed rows get the same values as alone; transformers uses the
        longest row of the batch, and for ``dynamic`` of earlier batches, too. Without
        ``segment_ids`` a row is one document. With a KV cache only the positions given here count,
        as in transformers.
        """
        frequencies = np.asarray(self.frequencies, np.float32)
        if self.beyond is not None:
            frequencies = self.beyond.at(frequencies, _lengths(positions, segment_ids))
        angles = positions[..., None].astype(jnp.float32) * frequencies
        return jnp.cos(angles) * self.attention_scaling, jnp.sin(angles) * self.attention_scaling


def _lengths(
    positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None
) -> Int[Array, "B T"]:
    def row_lengths(positions: Array, ids: Array) -> Array:
        # Numbered anew: segment ids may have gaps, and segment_max needs a static bound.
        documents = jnp.unique(ids, return_inverse=True, size=ids.size)[1]
        last = jax.ops.segment_max(positions, documents, num_segments=ids.size)
        return last[documents] + 1

    if segment_ids is None:
        return jnp.broadcast_to(positions.max(axis=1, keepdims=True) + 1, positions.shape)
    return jax.vmap(row_lengths)(positions, segment_ids)


def rotate(
    x: Float[Array, "B T heads dim"], table: Table, interleaved: bool = False
) -> Float[Array, "B T heads dim"]:
    """Rotates the pairs of every head by the table's angles, in float32.

    The first 2 * half dimensions are rotated (half is the table's last axis); pairs are
    (x[i], x[i + half]), or (x[2i], x[2i + 1]) if ``interleaved`` (Cohere's layout). The other
    dimensions are unchanged.
    """
    cos, sin = (t[:, :, None] for t in table)
    end = 2 * cos.shape[-1]
    rotary, rest = x[..., :end].astype(jnp.float32), x[..., end:]
    if interleaved:
        first, second = rotary[..., ::2], rotary[..., 1::2]
    else:
        # Split and concatenated: rotating by a reversed axis was eight times slower on a CPU.
        first, second = jnp.split(rotary, 2, axis=-1)
    rotated = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        whole = jnp.stack(rotated, axis=-1).reshape(rotary.shape)
    else:
        whole = jnp.concatenate(rotated, axis=-1)
    return jnp.concatenate([whole.astype(x.dtype), rest], axis=-1)


_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "proportional": (),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "su": ("short_factor", "long_factor"),  # the name of longrope in the first Phi-3 checkpoints
}
"""The rope types and their required settings."""


def parse_rope(
    keys: ConfigReader,
    head_dim: int,
    max_positions: int,
    *,
    layer_type: str | None = None,
    theta: float = 10000.0,
    partial: float | None = None,
) -> Rope:
    """Reads ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before).

    Args:
      keys: the whole config.
      head_dim: dimensions of a head.
      max_positions: the config's ``max_position_embeddings``.
      layer_type: the type of layer to read the settings of, in families where they differ
        (Gemma 3). Before transformers 5 ``rope_scaling`` and ``rope_theta`` were those of
        "full_attention", and ``rope_local_base_freq`` was theta of "sliding_attention".
      theta: the family's default.
      partial: the family's default for the fraction of a head's dimensions that is rotated. None
        if the family always rotates whole heads: ``partial_rotary_factor`` is ignored then, as in
        transformers, except with a scaled rope type, where transformers fails and this is an error.

    Raises ConfigError for rope types that are not supported and for malformed settings.
    """
    rope = _settings(keys, layer_type)
    kind = rope.choice("rope_type", _REQUIRED, rope.hf.get("type", "default"))
    if missing := [key for key in _REQUIRED[kind] if key not in rope.hf]:
        raise ConfigError(f"{kind} needs {', '.join(missing)}", where=rope.where)
    share = _share(keys, rope, kind, partial)
    dim = head_dim if kind == "proportional" else int(head_dim * share)
    if dim % 2 or not dim:
        key = "head_dim" if dim == head_dim else "partial_rotary_factor"
        cause = f"{dim} of {head_dim} dimensions would be rotary; it must be a positive even number"
        raise keys.fail(key, cause)
    name = "rope_local_base_freq" if layer_type == "sliding_attention" else "rope_theta"
    theta = rope.number("rope_theta", keys.number(name, theta, float), float)
    if theta <= 1:
        raise keys.fail(name, f"must be more than 1, not {theta}")
    original = rope.number("original_max_position_embeddings", max_positions)
    if layer_type is None:  # Phi-3: the key outside of the rope settings has precedence
        original = keys.number("original_max_position_embeddings", original)

    plain = 1 / rope_frequencies.periods(theta, dim)
    match kind:
        case "default":
            return Rope(_tuple(plain))
        case "linear":
            return Rope(_tuple(plain / rope.number("factor", None, float)))
        case "proportional":
            factor = rope.number("factor", 1.0, float)
            return Rope(_tuple(rope_frequencies.proportional(plain, share, factor)))
        case "dynamic":
            if dim == 2:
                # Its exponents divide by the number of pairs minus 1.
                raise rope.fail("rope_type", "dynamic needs more than one pair of dimensions")
            beyond = DynamicNtk(max_positions, rope.number("factor", None, float))
            return Rope(_tuple(plain), beyond=beyond)
        case "llama3":
            return _llama3(rope, plain, original)
        case "yarn":
            return _yarn(rope, theta, dim, original, max_positions)
        case _:
            return _longrope(rope, theta, dim, original, max_positions)


def _settings(keys: ConfigReader, layer_type: str | None) -> ConfigReader:
    """The rope settings of the layer type; empty if the config has none."""

    def section(keys: ConfigReader, name: str) -> ConfigReader:
        value = keys.hf.get(name)
        if not isinstance(value, dict | None):
            raise keys.fail(name, f"must be an object, not {value!r}")
        return ConfigReader(value or {}, f"{keys.where}: {name}")

    def per_type(settings: ConfigReader) -> bool:
        return any(isinstance(value, dict) for value in settings.hf.values())

    scaling, rope = section(keys, "rope_scaling"), section(keys, "rope_parameters")
    if layer_type is None:
        rope = scaling if scaling.hf else rope
    elif layer_type in rope.hf or per_type(rope):
        rope = section(rope, layer_type)
    if layer_type == "full_attention" and scaling.hf:
        rope = ConfigReader({**rope.hf, **scaling.hf}, scaling.where)
    if per_type(rope):
        raise ConfigError("rope settings per layer type are not supported", where=rope.where)
    return rope


def _share(keys: ConfigReader, rope: ConfigReader, kind: str, family: float | None) -> float:
    """The fraction of a head's dimensions that is rotated."""
    key = "partial_rotary_factor"
    holder = keys if rope.hf.get(key) is None else rope
    share = holder.number(key, family or 1.0, float)
    if share > 1:
        raise holder.fail(key, f"must be at most 1, not {share}")
    if family is None and kind == "default":
        return 1.0
    if share < 1 and family is None and kind != "proportional":
        raise holder.fail(key, f"{share} is not supported: this family rotates whole heads")
    return share


def _llama3(rope: ConfigReader, plain: np.ndarray, original: int) -> Rope:
    keys = ("factor", "low_freq_factor", "high_freq_factor")
    factor, low, high = (rope.number(key, None, float) for key in keys)
    if high <= low:
        raise rope.fail("high_freq_factor", f"{high} must be more than low_freq_factor, {low}")
    return Rope(_tuple(rope_frequencies.llama3(plain, factor, low, high, original)))


def _yarn(rope: ConfigReader, theta: float, dim: int, original: int, max_positions: int) -> Rope:
    factor = rope.number("factor", max_positions / original, float)
    frequencies = rope_frequencies.yarn(
        theta,
        dim,
        factor,
        original,
        beta_fast=rope.number("beta_fast", 32.0, float),
        beta_slow=rope.number("beta_slow", 1.0, float),
        truncate=rope.flag("truncate", True),
    )
    # DeepSeek's two mscale factors are used only if both are given; 0 means not given.
    keys = [key for key in ("mscale", "mscale_all_dim") if rope.hf.get(key) not in (None, 0)]
    mscales = [rope_frequencies.yarn_mscale(factor, rope.number(key, None, float)) for key in keys]
    scaling = mscales[0] / mscales[1] if len(mscales) == 2 else rope_frequencies.yarn_mscale(factor)
    return Rope(_tuple(frequencies), rope.number("attention_factor", scaling, float))


def _longrope(
    rope: ConfigReader, theta: float, dim: int, original: int, max_positions: int
) -> Rope:
    # Its factor on cosines and sines divides by the logarithm of this number.
    if original < 2:
        raise rope.fail("original_max_position_embeddings", f"must be at least 2, not {original}")

    def frequencies(key: str) -> tuple[float, ...]:
        given = rope.hf[key]
        if not isinstance(given, list) or len(given) != dim // 2:
            raise rope.fail(key, f"must be a list of {dim // 2} numbers, not {given!r}")
        factors = [
            ConfigReader({key: value}, rope.where).number(key, None, float) for value in given
        ]
        return _tuple(rope_frequencies.longrope(theta, dim, factors))

    factor = rope.number("factor", max_positions / original, float)
    scaling = rope_frequencies.longrope_mscale(factor, original)
    return Rope(
        frequencies("short_factor"),
        rope.number("attention_factor", scaling, float),
        LongRope(original, frequencies("long_factor")),
    )


def _tuple(frequencies: np.ndarray) -> tuple[float, ...]:
    return tuple(frequencies.tolist())
