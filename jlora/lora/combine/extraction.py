"""``extract_adapter``: a low-rank approximation of what fine-tuning changed."""

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
    """The adapter that best approximates a fine-tuned model, given its base.

    The delta of every target is the best approximation of its rank to the difference of the
    weights (truncated SVD); leaves of ``modules_to_save`` and ``bias`` are copied.

    Args:
      base_params: the base; quantized leaves are dequantized.
      tuned_params: the fine-tuned parameters, of the same structure and shapes.
      config: what to adapt, as for ``init_adapter``; ``init_lora_weights`` has no effect.

    Raises:
      DataError: the trees differ in structure.
      ConfigError: as ``init_adapter``; or leaves differ that the adapter does not cover.
    """
    base = {leaf.path: leaf for leaf in paths.leaves(base_params)}
    tuned = {leaf.path: leaf for leaf in paths.leaves(tuned_params)}
    _require_same(base, tuned)
    # Only the shapes are used, which are the same for all initial values; these need no base
    # values.
    fresh = functools.partial(
        init_adapter, config=dataclasses.replace(config, init_lora_weights=True)
    )
    shapes = jax.eval_shape(fresh, jax.random.key(0), base_params)
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    others = other_leaves(empty)
    faults = [f"the adapter cannot hold {'.'.join(path)}" for path in others if path not in base]
    refuse([*low_rank_faults(empty), *faults], "extract_adapter")
    if lost := list(_lost(base, tuned, empty.config)):
        listed = ", ".join(lost[:10]) + (f" and {len(lost) - 10} more" if lost[10:] else "")
        raise ConfigError(
            f"the models also differ in leaves that the adapter does not cover: {listed}",
            where="extract_adapter",
            fix="name them in target_modules or modules_to_save; for biases set bias=all",
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
    """The difference truncated to ``rank``, one layer at a time."""
    return jax.lax.map(lambda x: truncate(x[1] - x[0], rank), (before, after))


def _weight(leaves: BaseLeaves, path: paths.Path) -> Array:
    """The weight that the A at ``path`` adapts, or its part of a fused one: (layers, in, out)."""
    base_path = changed_leaf(path, leaves)
    values = _dense(leaves[base_path])
    return dict(_pieces(leaves, base_path, values)).get(path[:-1], values)


def _pieces(leaves: BaseLeaves, path: paths.Path, values: Any) -> Iterator[tuple[paths.Path, Any]]:
    """Module → its columns: the parts of a fused projection, or the one module of another leaf."""
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
    """The leaf's dense values in float32, with a layer axis (of length 1 if it is not stacked)."""
    value = jnp.asarray(dense(leaf.value)).astype(jnp.float32)
    return value if leaf.stack else value[None]


def _require_same(base: BaseLeaves, tuned: BaseLeaves) -> None:
    """DataError, listing leaves that are in one tree only or differ in shape."""
    faults = [f"{'.'.join(path)} is only in the base" for path in base.keys() - tuned.keys()]
    faults += [
        f"{'.'.join(path)} is only in the tuned model" for path in tuned.keys() - base.keys()
    ]
    for path in base.keys() & tuned.keys():
        shapes = tuple(base[path].value.shape), tuple(tuned[path].value.shape)
        if shapes[0] != shapes[1]:
            faults.append(f"{'.'.join(path)} is {shapes[0]} and {shapes[1]}")
    if faults:
        more = [f"… and {len(faults) - 10} more"] if faults[10:] else []
        listing = "\n  ".join(sorted(faults)[:10] + more)
        raise DataError(f"the two models differ in structure:\n  {listing}")


def _lost(base: BaseLeaves, tuned: BaseLeaves, config: LoraConfig) -> Iterator[str]:
    """Names of leaves, or parts of fused ones, that differ in a layer that nothing covers."""
    for path, leaf in base.items():
        # Exactly: a leaf that fine-tuning changed ever so little would be lost without a word.
        differs = np.asarray(_dense(leaf) != _dense(tuned[path]))
        covered = np.array([is_replaced(config, name, leaf.kind) for name in leaf.modules()])
        if leaf.kind in ("kernel", "embedding"):
            covered |= _adapted(config, leaf.modules())
        for module, values in _pieces(base, path, differs):
            module_covered = covered
            if paths.is_part(module):
                module_covered = covered | _adapted(config, leaf.modules_at(module).names())
            if values[~module_covered].any():
                yield f"{leaf.modules_at(module).name()}.{leaf.kind}"


def _adapted(config: LoraConfig, names: Sequence[str]) -> np.ndarray:
    return np.array([rank_of(config, name) > 0 for name in names])
