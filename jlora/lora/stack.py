"""``AdapterStack``: several adapters in one tree, so that each row of a batch can use its own.

The stack has the leaves of all its adapters, each with an adapter axis of length N::

    adapters   lora_A (…, in, r)     lora_B (…, r, out)       "…": the layer axis, if any
    stack      lora_A (…, N, in, r)  lora_B (…, N, r, out)    r: the largest rank

Ranks that an adapter does not have, and modules that it lacks, are zeros, and their gradients are
exactly zero. Everything that differs between adapters is data, so that replacing an adapter in the
stack does not compile anything again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.config import FrozenMap
from jlora.errors import DataError, did_you_mean
from jlora.lora import terms
from jlora.lora.adapter import LORA_BIAS, PAIRS, Adapter, bias_scaling, scaling
from jlora.tree import paths

SCALING, BIAS_SCALING = SCALE_LEAVES = ("scaling", "bias_scaling")
# Counted from the end, since a layer axis may precede the adapter axis.
AXIS = {
    **dict.fromkeys((*PAIRS, *PAIRS.values()), -3),
    LORA_BIAS: -2,
    **dict.fromkeys(SCALE_LEAVES, -1),
}
"""Leaf → the adapter axis of a stack's leaf."""

RANK = {**dict.fromkeys(PAIRS, -1), **dict.fromkeys(PAIRS.values(), -2)}
"""Leaf → the rank axis of an adapter's leaf."""

FlatLeaves = dict[paths.Path, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdapterStack:
    """N adapters in one tree; see the module's docstring and ``stack_adapters``.

    Its gradient is in ``weights`` only; each adapter's comes from the rows that use it.
    """

    weights: dict[str, Any]
    scales: dict[str, Any]
    """``scaling`` (…, N) at each module's node, and ``bias_scaling`` of a lora_bias, which is 0 for
    adapters without one. No gradient reaches them."""
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    parts: Mapping[str, tuple[int, ...]] = dataclasses.field(
        default=FrozenMap(), metadata={"static": True}
    )
    """See ``Adapter``."""

    def __len__(self) -> int:
        return len(self.names)

    def ids(self, names: Sequence[str | None]) -> Int[Array, " rows"]:
        """``adapter_ids`` for rows, from the names of their adapters; None is the base model.

        Raises:
          DataError: there is no such adapter.
        """
        return jnp.array([-1 if n is None else self._index(n) for n in names], jnp.int32)

    def replace(self, which: str | int, adapter: Adapter) -> AdapterStack:
        """The stack with adapter ``which`` replaced by ``adapter``, under the same name.

        Shapes and static fields do not change, so that nothing is compiled again.

        Raises:
          DataError: the adapter does not fit into the stack: it has modules that no adapter of the
            stack has, or a higher rank. The message lists every misfit.
        """
        i, new = self._index(which), _leaves(adapter)
        old = self._flat()
        room = {p: _without_axis(leaf, p) for p, leaf in old.items()}
        faults = [*_unfit(adapter, new, room)]
        if any(self.parts.get(name) != widths for name, widths in adapter.parts.items()):
            faults.append("the parts of its fused projections have other widths")
        if faults:
            raise _error([f"{self.names[i]}: {fault}" for fault in faults])
        flat = {
            p: leaf.at[(..., i, *(slice(None),) * (-1 - AXIS[p[-1]]))].set(_padded(new, p, room[p]))
            for p, leaf in old.items()
        }
        return _of(flat, self.names, self.parts)

    def adapter(self, which: str | int, like: Adapter) -> Adapter:
        """Adapter ``which`` with its current values, in the shapes of ``like``, as it was stacked.

        Raises:
          DataError: ``like`` has ``initial``, which the stack holds combined with its weights.
        """
        if like.initial is not None:
            raise DataError("an adapter with `initial` values cannot be read back from a stack")
        i, flat = self._index(which), dict(paths.walk(self.weights))

        def cut(path: paths.Path, value: Any) -> Array:
            padded = jnp.take(flat[path], i, axis=AXIS[path[-1]])
            return padded[tuple(slice(size) for size in value.shape)]

        return dataclasses.replace(like, weights=paths.map_leaves(cut, like.weights))

    def _index(self, which: str | int) -> int:
        if which in self.names:
            return self.names.index(str(which))
        if isinstance(which, int) and 0 <= which < len(self):
            return which
        fix = did_you_mean(str(which), self.names) or f"there are {', '.join(self.names)}"
        raise DataError(f"no adapter {which!r} in the stack", where="adapter", fix=fix)

    def _flat(self) -> FlatLeaves:
        return dict(paths.walk(self.weights)) | dict(paths.walk(self.scales))


def stack_adapters(
    adapters: Sequence[Adapter] | Mapping[str, Adapter], *, r: int | None = None
) -> AdapterStack:
    """Stacks adapters for one base; their ranks, scales and modules may differ.

    ``attach(params, stack, adapter_ids=ids)`` then applies an adapter to each row of a batch.

    Args:
      adapters: in the order of ``adapter_ids``; those of a sequence are named "0", "1" ….
      r: the stack's rank, if an adapter of a higher rank may replace one of these later.

    Raises:
      DataError: an adapter has leaves that cannot differ between rows (replaced leaves of the base,
        rows of embeddings, DoRA, experts), or the adapters are of different bases. The message
        lists all of them.
    """
    listed = isinstance(adapters, Sequence)
    named = {str(i): a for i, a in enumerate(adapters)} if listed else dict(adapters)
    if not named:
        raise DataError("no adapters to stack", where="adapters", fix="give at least one")
    flats = {name: _leaves(adapter) for name, adapter in named.items()}
    room: dict[paths.Path, tuple[int, ...]] = {}
    parts: dict[str, tuple[int, ...]] = {}
    for name, flat in flats.items():
        parts |= named[name].parts
        for path, leaf in flat.items():
            rank = _rank(path, leaf.shape)
            largest = max(rank, r or 0, _rank(path, room.get(path, leaf.shape)))
            room.setdefault(path, _with_rank(path, leaf.shape, largest))
            room[path] = _with_rank(path, room[path], largest)
    faults = [
        f"{name}: {f}" for name, flat in flats.items() for f in _unfit(named[name], flat, room)
    ]
    for name, adapter in named.items():
        if any(parts[key] != widths for key, widths in adapter.parts.items()):
            faults.append(f"{name}: its parts of fused projections have other widths")
    if r is not None and (most := max(_rank(p, s) for p, s in room.items())) > r:
        faults.append(f"there are adapters of rank {most}, above r={r}")
    if faults:
        raise _error(faults)
    flat = {
        path: jnp.stack([_padded(flat, path, shape) for flat in flats.values()], AXIS[path[-1]])
        for path, shape in room.items()
    }
    return _of(flat, tuple(named), FrozenMap(parts))


def _of(
    flat: FlatLeaves, names: tuple[str, ...], parts: Mapping[str, tuple[int, ...]]
) -> AdapterStack:
    scales = {path: leaf for path, leaf in flat.items() if path[-1] in SCALE_LEAVES}
    weights = {path: leaf for path, leaf in flat.items() if path[-1] not in SCALE_LEAVES}
    return AdapterStack(paths.nest(weights), paths.nest(scales), names, parts)


def _leaves(adapter: Adapter) -> FlatLeaves:
    """An adapter's leaves for a stack, with its scales, and with ``initial`` subtracted."""
    flat: FlatLeaves = {}
    initial = dict(paths.walk(adapter.initial or {}))
    for leaf in paths.leaves(adapter.weights):
        *node, kind = leaf.path
        if kind not in AXIS:
            continue
        flat[leaf.path] = leaf.value
        name, scale = (BIAS_SCALING, bias_scaling) if kind == LORA_BIAS else (SCALING, scaling)
        scale = scale(adapter.config, leaf.modules_at(tuple(node)))
        flat[(*node, name)] = jnp.asarray(scale)
    for path in [p for p in initial if p[-1] in PAIRS]:
        a, b = path, (*path[:-1], PAIRS[path[-1]])
        scale = flat[(*path[:-1], SCALING)]
        pair = terms.subtract_factors((flat[a], flat[b], scale), (initial[a], initial[b], scale))
        flat[a], flat[b], flat[(*path[:-1], SCALING)] = pair
    return flat


def _unfit(
    adapter: Adapter, flat: FlatLeaves, room: Mapping[paths.Path, tuple[int, ...]]
) -> Iterator:
    """What does not fit of an adapter into a stack whose leaves have the shapes ``room``."""
    for path, _ in paths.walk(adapter.weights):
        if path[-1] not in AXIS:
            yield f"{'.'.join(path)} cannot differ between the rows of a batch"
    for name in adapter.config.target_parameters or ():
        yield f"the parameter {name} cannot have adapters that differ between rows"
    for path, leaf in flat.items():
        name, shape = ".".join(path), room.get(path)
        if shape is None:
            if path[-1] not in SCALE_LEAVES:
                yield f"{name} is of a module that no adapter of the stack has"
        elif _rank(path, leaf.shape) > _rank(path, shape):
            yield f"{name} has rank {_rank(path, leaf.shape)}, above {_rank(path, shape)}"
        elif _with_rank(path, leaf.shape, _rank(path, shape)) != shape:
            yield f"{name} {leaf.shape} does not fit {shape}: the adapter is for another base"


def _error(faults: Sequence[str]) -> DataError:
    return DataError(
        "; ".join(faults),
        where="adapters",
        fix="stack adapters of one base that have lora_A, lora_B and lora_bias only; attach or "
        "merge the others one at a time",
    )


def _rank(path: paths.Path, shape: tuple[int, ...]) -> int:
    return shape[RANK[path[-1]]] if path[-1] in RANK else 0


def _with_rank(path: paths.Path, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """The shape with another rank, if it has a rank axis."""
    axis = RANK.get(path[-1])
    return shape if axis is None else (*shape[:axis], rank, *shape[len(shape) + axis + 1 :])


def _without_axis(leaf: Array, path: paths.Path) -> tuple[int, ...]:
    """The shape of a stack's leaf without the adapter axis."""
    axis = leaf.ndim + AXIS[path[-1]]
    return (*leaf.shape[:axis], *leaf.shape[axis + 1 :])


def _padded(flat: FlatLeaves, path: paths.Path, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """An adapter's leaf padded with zeros to ``shape``; all zeros if it has none."""
    empty = jnp.zeros(shape)
    if path not in flat:
        return empty
    return empty.at[tuple(slice(size) for size in flat[path].shape)].set(flat[path])
