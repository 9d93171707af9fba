"""Leaves of the parameter tree, put together on their devices: the host never holds a whole one.

::

    on the devices  (L, in, out), made once, in its sharding
    on the host     one layer at a time, as in the file; every device receives its own part of it
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jlora.distributed import sharding

Index = tuple[int, ...]


def assemble_leaf(
    shape: Any,
    where: Any,
    indices: Iterable[Index],
    read: Callable[[Index], Any],
    turned: bool = False,
) -> Any:
    """A leaf of parts, each of which is read, put in its place and let go before the next one.

    Args:
      shape: an array or a packed one, with ``jax.ShapeDtypeStruct`` in the place of arrays.
      where: the same with NamedShardings; None leaves that to JAX's default device.
      indices: where parts begin on the leaf's leading axes; ``((),)`` for a leaf of one part.
      read: the part at an index: an array, or a packed one's children, on the host or on a device.
      turned: whether a part has its last two axes the other way round than the leaf.
    """
    children, kind = jax.tree.flatten(shape)
    places = [None] * len(children) if where is None else jax.tree.leaves(where)
    make, write = _programs(tuple(children), tuple(places))
    leaf: Any = None
    for index in indices:
        leaf = make() if index and leaf is None else leaf
        parts = zip(jax.tree.leaves(read(index)), places, strict=True)
        leaf = write(leaf, [_place(*each, index, turned) for each in parts], index, turned)
        del parts
        jax.block_until_ready(leaf)  # so that what was read is gone before the next is
    return jax.tree.unflatten(kind, leaf)


def _place(part: Any, place: NamedSharding | None, index: Index, turned: bool) -> jax.Array:
    """A part on the devices, split among them as the leaf is."""
    if place is None:
        return jnp.asarray(part)
    leaf = [*place.spec, *[None] * (len(index) + np.ndim(part) - len(place.spec))]
    axes = leaf[len(index) :]
    axes = [*axes[:-2], *axes[:-3:-1]] if turned else axes
    return sharding.place(part, NamedSharding(place.mesh, PartitionSpec(*axes)))


@functools.lru_cache(maxsize=256)
def _programs(
    shapes: tuple[jax.ShapeDtypeStruct, ...], places: tuple[NamedSharding | None, ...]
) -> tuple[Callable[[], list[jax.Array]], Callable[..., list[jax.Array]]]:
    """What makes an empty leaf, and (leaf, parts, index, turned) → the leaf with the parts in it.

    The second one works in the leaf's own memory, and no device sends another one anything.
    """

    def make() -> list[jax.Array]:
        return [jnp.zeros(child.shape, child.dtype) for child in shapes]

    def put(whole: jax.Array, part: jax.Array, index: tuple) -> jax.Array:
        start = (*index, *[0] * part.ndim)
        part = part.reshape((1,) * len(index) + part.shape)
        return jax.lax.dynamic_update_slice(whole, part, start)

    def write(leaf: Any, parts: list[jax.Array], index: tuple, turned: bool) -> list[jax.Array]:
        parts = [part.mT for part in parts] if turned else parts
        if leaf is None:
            return parts
        return [put(whole, part, index) for whole, part in zip(leaf, parts, strict=True)]

    where = list(places)
    return jax.jit(make, out_shardings=where), jax.jit(
        write, donate_argnums=0, static_argnames="turned", out_shardings=where
    )
