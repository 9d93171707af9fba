"""Rotary position embeddings (RoFormer, arXiv 2104.09864), and what a ``config.json`` says of them.

Tables are float32 whatever the model computes in.
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
    """``dynamic``: in documents of more than ``context`` tokens theta grows with the length."""

    context: int
    factor: float

    def at(self, plain: np.ndarray, length: Int[Array, "B T"]) -> Float[Array, "B T half"]:
        """The frequencies in documents of ``length`` tokens."""
        return rope_frequencies.dynamic(plain, self.factor, self.context, length)


@dataclasses.dataclass(frozen=True)
class LongRope:
    """``longrope``: documents of more than ``context`` tokens have frequencies of their own."""

    context: int
    frequencies: tuple[float, ...]

    def at(self, plain: np.ndarray, length: Int[Array, "B T"]) -> Float[Array, "B T half"]:
        """The frequencies in documents of ``length`` tokens."""
        beyond = length[..., None] > self.context
        return jnp.where(beyond, np.asarray(self.frequencies, np.float32), plain)


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions turn the pairs of a head; hashable, so that it can be static under jit."""

    frequencies: tuple[float, ...]
    """Radians per position of each pair; the rest of a head, if any, is not turned."""
    attention_scaling: float = 1.0
    """Multiplies cosines and sines."""
    beyond: DynamicNtk | LongRope | None = None
    """What changes in documents longer than the context that the model was trained in."""

    def table(
        self, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Table:
        """Cosines and sines for ``positions``.

        Where frequencies depend on the length it is that of the token's own document, its largest
        position + 1, so that packed documents are turned as they would be alone; transformers takes
        the largest of the batch, and for ``dynamic`` of the batches before it. Without
        ``segment_ids`` a row is one document. Of a document in a cache only the positions given
        here count, as in transformers.
        """
        frequencies = np.asarray(self.frequencies, np.float32)
        if self.beyond is not None:
            frequencies = self.beyond.at(frequencies, _lengths(positions, segment_ids))
        angles = positions[..., None].astype(jnp.float32) * frequencies
        return jnp.cos(angles) * self.attention_scaling, jnp.sin(angles) * self.attention_scaling


def _lengths(
    positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None
) -> Int[Array, "B T"]:
    def of_row(positions: Array, ids: Array) -> Array:
        documents = jnp.unique(ids, return_inverse=True, size=ids.size)[1]
        last = jax.ops.segment_max(positions, documents, num_segments=ids.size)
        return last[documents] + 1

    if segment_ids is None:
        return jnp.broadcast_to(positions.max(axis=1, keepdims=True) + 1, positions.shape)
    return jax.vmap(of_row)(positions, segment_ids)


def rotate(
    x: Float[Array, "B T heads dim"], table: Table, interleaved: bool = False
) -> Float[Array, "B T heads dim"]:
    """Turns the pairs of every head by the table's angles; computes in float32.

    The first 2 * half dimensions are rotary, half the table's last one: its pairs are
    (x[i], x[i + half]), or (x[2i], x[2i + 1]) where ``interleaved`` (Cohere's layout). The others
    pass as they are, and so does everything where cosines are 1 and sines 0.
    """
    cos, sin = (t[:, :, None] for t in table)
    end = 2 * cos.shape[-1]
    rotary, rest = x[..., :end].astype(jnp.float32), x[..., end:]
    if interleaved:
        first, second = rotary[..., ::2], rotary[..., 1::2]
    else:
        first, second = jnp.split(rotary, 2, axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        whole = jnp.stack(turned, axis=-1).reshape(rotary.shape)
    else:
        whole = jnp.concatenate(turned, axis=-1)
    return jnp.concatenate([whole.astype(x.dtype), rest], axis=-1)


_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "proportional": (),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "su": ("short_factor", "long_factor"),  # the name of longrope in the first Phi-3 checkpoints
}
"""The kinds of rope, and the settings without which there is none."""


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
      layer_type: for families whose sliding layers have settings of their own (Gemma 3): whose to
        read. Before transformers 5 ``rope_scaling`` and ``rope_theta`` were of "full_attention",
        and ``rope_local_base_freq`` was theta of "sliding_attention".
      theta: the family's, where the config has none.
      partial: the family's share of a head's dimensions that is rotary, where the config has none.
        None is a family that always turns whole heads; transformers ignores
        ``partial_rotary_factor`` there, and here it is an error.

    Raises ConfigError for kinds that are not supported, and for malformed settings.
    """
    rope = _settings(keys, layer_type)
    kind = rope.choice("rope_type", _NEEDED, rope.hf.get("type", "default"))
    if missing := [key for key in _NEEDED[kind] if key not in rope.hf]:
        raise ConfigError(f"{kind} needs {', '.join(missing)}", where=rope.where)
    share = _share(keys, rope, kind, partial)
    dim = head_dim if kind == "proportional" else int(head_dim * share)
    if dim % 2 or not dim:
        key = "head_dim" if dim == head_dim else "partial_rotary_factor"
        cause = f"{dim} of {head_dim} dimensions would be rotary; what turns are pairs"
        raise keys.fail(key, cause)
    name = "rope_local_base_freq" if layer_type == "sliding_attention" else "rope_theta"
    theta = rope.number("rope_theta", keys.number(name, theta, float), float)
    if theta <= 1:
        raise keys.fail(name, f"must be more than 1, not {theta}")
    original = rope.number("original_max_position_embeddings", max_positions)
    if layer_type is None:  # Phi-3 has it beside the settings, and that wins
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
    """The settings that hold for the layer type; empty where there are none."""

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
    """The share of a head's dimensions that is rotary."""
    key = "partial_rotary_factor"
    holder = keys if rope.hf.get(key) is None else rope
    share = holder.number(key, family or 1.0, float)
    if share > 1:
        raise holder.fail(key, f"must be at most 1, not {share}")
    if share < 1 and family is None and kind != "proportional":
        raise holder.fail(key, f"{share} is not supported: this family turns whole heads")
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
    # DeepSeek's two factors of mscale count only together; 0 is none
    keys = [key for key in ("mscale", "mscale_all_dim") if rope.hf.get(key) not in (None, 0)]
    each = [rope_frequencies.yarn_mscale(factor, rope.number(key, None, float)) for key in keys]
    scaling = each[0] / each[1] if len(each) == 2 else rope_frequencies.yarn_mscale(factor)
    return Rope(_tuple(frequencies), rope.number("attention_factor", scaling, float))


def _longrope(
    rope: ConfigReader, theta: float, dim: int, original: int, max_positions: int
) -> Rope:
    if original < 2:
        raise rope.fail("original_max_position_embeddings", f"must be at least 2, not {original}")

    def frequencies(key: str) -> tuple[float, ...]:
        given = rope.hf[key]
        if not isinstance(given, list) or len(given) != dim // 2:
            raise rope.fail(key, f"must be a list of {dim // 2} numbers, not {given!r}")
        each = [ConfigReader({key: value}, rope.where).number(key, None, float) for value in given]
        return _tuple(rope_frequencies.longrope(theta, dim, each))

    factor = rope.number("factor", max_positions / original, float)
    scaling = rope_frequencies.longrope_mscale(factor, original)
    return Rope(
        frequencies("short_factor"),
        rope.number("attention_factor", scaling, float),
        LongRope(original, frequencies("long_factor")),
    )


def _tuple(frequencies: np.ndarray) -> tuple[float, ...]:
    return tuple(frequencies.tolist())
