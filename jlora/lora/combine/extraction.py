"""``extract_adapter``: the low-rank part of what fine-tuning changed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.config import LoraConfig
from jlora.errors import ConfigError, DataError
from jlora.lora import Adapter, init_adapter
from jlora.lora.adapter import Tree, changed_leaf
from jlora.lora.combine.factors import adapter_factors, adapter_from_factors, other_leaves
from jlora.lora.combine.refusals import low_rank_faults, refuse
from jlora.lora.combine.truncation import truncate
from jlora.lora.targets import is_replaced, rank_of
from jlora.lora.weight import dense
from jlora.tree import paths

BaseLeaves = Mapping[paths.Path, paths.Leaf]


def extract_adapter(base_params: Tree, tuned_params: Tree, config: LoraConfig) -> Adapter:
    """The adapter that leads from a model to its fine-tuned successor, as nearly as its rank lets.

    The delta of every target is the nearest matrix of its rank to the difference of the weights;
    leaves of ``modules_to_save`` and ``bias`` are the successor's own.

    Args:
      base_params: the model; quantized leaves are dequantized.
      tuned_params: the successor's parameters, of the same structure and shapes.
      config: what to adapt, as for ``init_adapter``; first values play no part.

    Raises:
      DataError: the trees differ in structure.
      ConfigError: as ``init_adapter``; or leaves differ that the adapter would not hold.
    """
    base = {leaf.path: leaf for leaf in paths.leaves(base_params)}
    tuned = {leaf.path: leaf for leaf in paths.leaves(tuned_params)}
    _require_same(base, tuned)
    fresh = functools.partial(
        init_adapter, config=dataclasses.replace(config, init_lora_weights=True)
    )
    shapes = jax.eval_shape(fresh, jax.random.key(0), base_params)
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    others = other_leaves(empty)
    faults = [f"it gives no {'.'.join(path)}" for path in others if path not in base]
    refuse([*low_rank_faults(empty), *faults], "extract_adapter")
    if lost := list(_lost(base, tuned, empty.config)):
        listed = ", ".join(lost[:10]) + (f" and {len(lost) - 10} more" if lost[10:] else "")
        raise ConfigError(
            f"the models also differ where the adapter does not reach: {listed}",
            where="extract_adapter",
            fix="name them in target_modules or modules_to_save; biases come with bias=all",
        )
    modules = {}
    for path, f in adapter_factors(empty).items():
        a, b = _nearest(_weight(base, path), _weight(tuned, path), f.a.shape[-1])
        b = b / jnp.asarray(f.scales, jnp.float32)[:, None, None]
        modules[path] = f._replace(a=a, b=b, ranks=np.minimum(f.ranks, a.shape[-1]))
    saved = {path: _dense(tuned[path]).reshape(base[path].value.shape) for path in others}
    return adapter_from_factors(modules, saved, empty.config, empty.parts)


@functools.partial(jax.jit, static_argnames="rank")
def _nearest(
    before: Float[Array, "layers in out"], after: Float[Array, "layers in out"], rank: int
) -> tuple[Float[Array, "layers in k"], Float[Array, "layers k out"]]:
    """The difference cut to ``rank``, one layer at a time."""
    return jax.lax.map(lambda x: truncate(x[1] - x[0], rank), (before, after))


def _weight(leaves: BaseLeaves, path: paths.Path) -> Array:
    """The weight that the A at ``path`` adapts, or its part of a fused one: (layers, in, out)."""
    where = changed_leaf(path, leaves)
    values = _dense(leaves[where])
    return dict(_pieces(leaves, where, values)).get(path[:-1], values)


def _pieces(leaves: BaseLeaves, path: paths.Path, values: Any) -> Iterator[tuple[paths.Path, Any]]:
    """The parts of the fused projection with the kernel at ``path``; else the module as a whole."""
    module, leaf = path[:-1], leaves[path]
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    widths = paths.part_widths(module, shapes) if leaf.kind == "kernel" and module else ()
    if not widths:
        yield module, values
        return
    ends = np.cumsum(widths)
    for name, start, end in zip(paths.FUSED[module[-1]], ends - widths, ends, strict=True):
        yield (*module, name), values[..., start:end]


def _dense(leaf: paths.Leaf) -> Array:
    """The leaf's values, float32, with a layer axis (of one, if it is not stacked)."""
    value = jnp.asarray(dense(leaf.value)).astype(jnp.float32)
    return value if leaf.stack else value[None]


def _require_same(base: BaseLeaves, tuned: BaseLeaves) -> None:
    """Raises a DataError that lists leaves of one tree only, and those of other shapes."""
    faults = [f"{'.'.join(path)} is only in the base" for path in base.keys() - tuned.keys()]
    faults += [f"{'.'.join(path)} is only in the successor" for path in tuned.keys() - base.keys()]
    for path in base.keys() & tuned.keys():
        ours, theirs = tuple(base[path].value.shape), tuple(tuned[path].value.shape)
        if ours != theirs:
            faults.append(f"{'.'.join(path)} is {ours} and {theirs}")
    if faults:
        more = [f"… and {len(faults) - 10} more"] if faults[10:] else []
        listing = "\n  ".join(sorted(faults)[:10] + more)
        raise DataError(f"the two models differ in structure:\n  {listing}")


def _lost(base: BaseLeaves, tuned: BaseLeaves, config: LoraConfig) -> Iterator[str]:
    """Names of leaves and of parts of fused ones that differ in a layer where nothing holds it."""
    for path, leaf in base.items():
        differs = np.asarray(_dense(leaf) != _dense(tuned[path]))
        held = np.array([is_replaced(config, name, leaf.kind) for name in leaf.modules()])
        if leaf.kind in ("kernel", "embedding"):
            held |= _adapted(config, leaf.modules())
        for module, values in _pieces(base, path, differs):
            reached = held
            if paths.is_part(module):
                reached = held | _adapted(config, leaf.modules_at(module).names())
            if values[~reached].any():
                yield f"{leaf.modules_at(module).name()}.{leaf.kind}"


def _adapted(config: LoraConfig, names: Sequence[str]) -> np.ndarray:
    return np.array([rank_of(config, name) > 0 for name in names])
