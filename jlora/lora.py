"""LoRA as pure transforms of trees (arXiv 2106.09685).

An adapter mirrors the nodes of the parameter tree it changes::

    params   {"model": {"layers": {"self_attn": {"q_proj": {"kernel": (L, in, out)}, …
    adapter  {"model": {"layers": {"self_attn": {"q_proj": {"lora_A": (L, in, r),
                                                            "lora_B": (L, r, out)}, …

A leaf of another name (``bias``, or any leaf of ``modules_to_save``) replaces the base's leaf of
that name. All leaves are float32 and all are trainable. Layers may differ in rank: the arrays have
the largest rank, and the columns a layer does not use are zero in both A and B, so that their
gradients are exactly zero and they stay zero.

``attach`` puts a delta on the weights, ``detach`` takes it off; ``merge`` folds it into them,
``unmerge`` takes it out again. What ``params`` is made of does not matter: arrays, or anything with
``shape``, ``dtype`` and ``dequantize()``.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora import paths
from jlora.config import LoraConfig
from jlora.errors import DataError
from jlora.targets import Target, find_targets, is_replaced, replaced_leaves, scaling_of

Tree = Mapping[str, Any]
DELTA = ("lora_A", "lora_B")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """A trainable adapter: ``weights`` as in the module's header, ``config`` static.

    ``config`` is the resolved LoraConfig: ``target_modules`` names what was matched.
    """

    weights: dict[str, Any]
    config: LoraConfig = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraWeight:
    """A weight with a low-rank delta: stands for ``base + scale * lora_A @ lora_B``.

    All children may carry a leading layer axis, which ``lax.scan`` slices off.
    """

    base: Any
    lora_A: Float[Array, "*layers in r"]
    lora_B: Float[Array, "*layers r out"]
    scale: Float[Array, "*layers"]
    dropout_key: Array | None = None
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The base weight's shape."""
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        """The base weight's rank."""
        return len(self.base.shape)

    @property
    def dtype(self):
        """The base weight's dtype."""
        return self.base.dtype

    def dequantize(self) -> Array:
        """The dense sum, in the base's dtype; computed in float32."""
        return _add_delta(self, sign=1.0)


def init_adapter(key: Array, params: Tree, config: LoraConfig) -> Adapter:
    """A fresh adapter for ``params``: with it the model is the base model, bitwise.

    A is drawn as PEFT draws it (kaiming-uniform with a=√5, that is U(-1/√in, 1/√in); a normal of
    standard deviation 1/r for ``init_lora_weights="gaussian"``) and B is zero.
    ``init_lora_weights=False`` draws B too, from U(-1/√r, 1/√r), for tests.

    Args:
      key: a JAX random key.
      params: a tree of arrays (see ``paths``); shapes are enough (``jax.ShapeDtypeStruct``) unless
        ``bias`` or ``modules_to_save`` copy values.
      config: what to adapt; every pattern in it must match something.

    Raises:
      ConfigError: a pattern matches nothing; the message lists near names.
    """
    config, targets = find_targets(params, config)
    flat: dict[paths.Path, Any] = {}
    for target in targets:
        a, b = _init_pair(_fold(key, target.path), target, config)
        flat[(*target.path, "lora_A")], flat[(*target.path, "lora_B")] = a, b
    for leaf in replaced_leaves(params, config):
        flat[leaf.path] = jnp.array(_dense(leaf.value), jnp.float32, copy=True)
    return Adapter(paths.nest(flat), config)


def attach(params: Tree, adapter: Adapter, *, dropout_key: Array | None = None) -> dict:
    """The tree with the adapter on it: kernels become ``LoraWeight``; nothing is computed densely.

    Args:
      params: the frozen tree.
      adapter: an adapter made for it.
      dropout_key: draws the dropout of ``config.lora_dropout`` when given (training); every module
        and layer gets a key of its own.

    Raises:
      DataError: the adapter has nodes that ``params`` lacks, or of another shape.
    """
    leaves = {leaf.path: leaf for leaf in paths.leaves(params)}
    changes: dict[paths.Path, dict[paths.Path, Array]] = {}
    for path, value in paths.walk(adapter.weights):
        changed = (*paths.whole(path[:-1]), "kernel") if path[-1] in DELTA else path
        if changed not in leaves:
            name = ".".join(path)
            raise DataError("the adapter changes a leaf that the model does not have", where=name)
        changes.setdefault(changed, {})[path] = value

    def change(path: paths.Path, value: Any) -> Any:
        if path not in changes:
            return value
        leaf, own = leaves[path], dict(changes[path])
        if path in own:
            value = _replace(leaf, own.pop(path), adapter.config)
        return _with_delta(leaf, value, own, adapter.config, dropout_key) if own else value

    return paths.map_leaves(change, params)


def detach(attached: Tree) -> dict:
    """The tree without its deltas: ``detach(attach(params, adapter))`` has ``params``' own leaves.

    Leaves that the adapter replaced (``bias``, ``modules_to_save``) stay replaced.
    """
    return paths.map_leaves(
        lambda _, leaf: leaf.base if isinstance(leaf, LoraWeight) else leaf, attached
    )


def merge(params: Tree, adapter: Adapter) -> dict:
    """``params`` with the adapter folded in: every leaf a dense array of its base's dtype.

    Sums are computed in float32 and rounded once. Quantized leaves come out dense and are never
    requantized: that would lose what the adapter learned.
    """
    return paths.map_leaves(lambda _, leaf: _dense(leaf), attach(params, adapter))


def unmerge(merged: Tree, adapter: Adapter) -> dict:
    """Takes out of ``merged`` the deltas that ``merge`` folded in, to the rounding of its dtype.

    Raises:
      DataError: the adapter replaced leaves (``bias``, ``modules_to_save``), whose former values
        are not known here.
    """
    replaced = [p for p, _ in paths.walk(adapter.weights) if p[-1] not in DELTA]
    if replaced:
        raise DataError(
            "the adapter replaced this leaf, and the merged tree does not hold its former value",
            where=".".join(replaced[0]),
            fix="keep the base parameters, and merge anew instead of unmerging",
        )

    def subtract(_, leaf):
        return _add_delta(leaf, sign=-1.0) if isinstance(leaf, LoraWeight) else leaf

    return paths.map_leaves(subtract, attach(merged, adapter))


def scaling(config: LoraConfig, path: paths.Path, stack: paths.Path | None, layers: int | None):
    """alpha/r (alpha/√r with rsLoRA) of the module at ``path``: a float32 scalar or (layers,)."""
    names = paths.module_names(path, stack, layers)
    values = np.array([scaling_of(config, name) for name in names], np.float32)
    return values if stack else values[0]


def _init_pair(key: Array, target: Target, config: LoraConfig) -> tuple[Array, Array]:
    (fan_in, fan_out), ranks = target.shape, np.array(target.ranks, np.float32)
    ranks = ranks[:, None, None] if target.stack else ranks[0]
    lead, r = ranks.shape[:-2], max(target.ranks)
    used, rank = np.arange(r) < ranks, np.maximum(ranks, 1)
    key_a, key_b = jax.random.split(key)
    if config.init_lora_weights == "gaussian":
        a = jax.random.normal(key_a, (*lead, fan_in, r)) / rank
    else:
        a = _uniform(key_a, (*lead, fan_in, r), fan_in)
    if config.init_lora_weights is False:
        b = _uniform(key_b, (*lead, r, fan_out), rank)
    else:
        b = jnp.zeros((*lead, r, fan_out))
    return jnp.where(used, a, 0.0), jnp.where(used.mT if target.stack else used[:, None], b, 0.0)


def _uniform(key: Array, shape: tuple[int, ...], fan_in: Any) -> Array:
    """Torch's own first values of a linear layer (kaiming-uniform with a=√5)."""
    bound = 1 / np.sqrt(np.asarray(fan_in, np.float32))
    return jax.random.uniform(key, shape, minval=-1.0) * bound


def _fold(key: Array, path: paths.Path) -> Array:
    """A key of its own for every path, whatever else is in the tree."""
    return jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))


def _replace(leaf: paths.Leaf, value: Array, config: LoraConfig) -> Array:
    """``value`` in the base's dtype, in the layers that train; the base's own in the others.

    Their gradients are then exactly zero.
    """
    trains = np.array([is_replaced(config, name, leaf.kind) for name in leaf.modules()])
    if value.shape != tuple(leaf.value.shape):
        raise _unfit(leaf, f"value {tuple(value.shape)} does")
    value = value.astype(leaf.value.dtype)
    if trains.all():
        return value
    return jnp.where(trains.reshape(-1, *(1 for _ in leaf.shape)), value, _dense(leaf.value))


def _with_delta(
    leaf: paths.Leaf,
    base: Any,
    pairs: Mapping[paths.Path, Any],
    config: LoraConfig,
    dropout_key: Array | None,
) -> LoraWeight:
    lead, (fan_in, fan_out) = tuple(base.shape[:-2]), base.shape[-2:]
    for path, a in pairs.items():
        if path[-1] == "lora_A":
            b, r = pairs[(*path[:-1], "lora_B")], a.shape[-1]
            parts = len(paths.FUSED[path[-3]]) if paths.is_part(path[:-1]) else 1
            if a.shape != (*lead, fan_in, r) or b.shape != (*lead, r, fan_out // parts):
                raise _unfit(leaf, f"A {a.shape} and B {b.shape} do")
    a, b, scale = combine(leaf, pairs, config)
    key, dropout = dropout_key, float(config.lora_dropout)
    if key is not None and dropout:
        key = _fold(key, leaf.path[:-1])
        key = jax.random.split(key, leaf.layers) if leaf.layers else key
    return LoraWeight(base, a, b, scale, key if dropout else None, dropout)


def _unfit(leaf: paths.Leaf, what: str) -> DataError:
    return DataError(
        f"the adapter's {what} not fit the weight {tuple(leaf.value.shape)}",
        where=leaf.module(),
        fix="use the base model that the adapter was trained on",
    )


def combine(
    leaf: paths.Leaf, pairs: Mapping[paths.Path, Any], config: LoraConfig
) -> tuple[Any, Any, Array]:
    """A (…, in, r), B (…, r, out) and scale (…) of the kernel ``leaf``.

    Parts of a fused projection are set side by side: their As are concatenated, their Bs are placed
    at the part's columns with zeros elsewhere, each already scaled.

    Args:
      leaf: the kernel; only its path and its layers are used.
      pairs: ``lora_A`` and ``lora_B`` by path, of the kernel's module or of its parts.
      config: gives the scales.
    """
    module = leaf.path[:-1]
    if (*module, "lora_A") in pairs:
        scale = jnp.asarray(scaling(config, module, leaf.stack, leaf.layers))
        return pairs[(*module, "lora_A")], pairs[(*module, "lora_B")], scale
    a, b = [], []
    names = paths.FUSED[module[-1]]
    for i, name in enumerate(names):
        part = (*module, name)
        if (*part, "lora_A") not in pairs:
            continue
        scale = scaling(config, part, leaf.stack, leaf.layers)
        columns = np.asarray(scale)[..., None, None] * pairs[(*part, "lora_B")]
        others = [jnp.zeros_like(columns)] * len(names)
        a.append(pairs[(*part, "lora_A")])
        b.append(jnp.concatenate([*others[:i], columns, *others[i + 1 :]], -1))
    return jnp.concatenate(a, -1), jnp.concatenate(b, -2), jnp.ones_like(jnp.asarray(scale))


def _dense(leaf) -> Array:
    return leaf.dequantize() if hasattr(leaf, "dequantize") else leaf


def _add_delta(w: LoraWeight, sign: float) -> Array:
    delta = jnp.matmul(w.lora_A, w.lora_B, precision="highest") * w.scale[..., None, None]
    return (_dense(w.base).astype(jnp.float32) + sign * delta).astype(w.dtype)
