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
import math
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
from jlora.targets import Target, find_targets, rank_of, replaced_leaves, scaling_of

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
      params: nested mappings of arrays; shapes are enough (``jax.ShapeDtypeStruct``) unless
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
    for leaf in replaced_leaves(params, config, targets):
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
    stacks = paths.stacks(params)

    def overlay(node: Tree, changes: Tree, path: paths.Path) -> dict:
        unknown = [k for k in changes if k not in node and not _is_delta(node, changes, k)]
        if unknown:
            name = ".".join((*path, unknown[0]))
            raise DataError("the adapter changes a leaf that the model does not have", where=name)
        result = dict(node)
        for key, change in changes.items():
            if key in node and isinstance(change, Mapping):
                result[key] = overlay(node[key], change, (*path, key))
            elif key in node:
                result[key] = change.astype(node[key].dtype)
        if "kernel" in node and any(_is_delta(node, changes, k) for k in changes):
            stack = paths.stack_of(path, stacks)
            size = (node["kernel"].shape[0] if stack else None, node["kernel"].shape[-1])
            a, b, scale = _combine(size, changes, path, stack, adapter.config)
            _check_shapes(node["kernel"], a, b, path)
            keys = (
                _layer_keys(dropout_key, path, scale.shape) if adapter.config.lora_dropout else None
            )
            result["kernel"] = LoraWeight(
                node["kernel"], a, b, scale, keys, float(adapter.config.lora_dropout)
            )
        return result

    return overlay(params, adapter.weights, ())


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


def whole_projections(adapter: Adapter) -> Adapter:
    """The same adapter with LoRA on whole fused projections instead of on parts of them.

    The parts' ranks add up; their scales go into B, and alpha is set so that the scale is one. This
    is how formats that know no parts (PEFT's) can hold such an adapter.
    """
    config, stacks = adapter.config, paths.stacks(adapter.weights)
    fused_ranks: dict[str, int] = {}
    adapted: list[str] = []

    def convert(node: Tree, path: paths.Path) -> dict:
        result = {}
        stack = paths.stack_of((*path, ""), stacks)
        parts = {k: v for k, v in node.items() if path and k in paths.FUSED.get(path[-1], ())}
        for key, child in node.items():
            if key not in parts:
                mapping = isinstance(child, Mapping)
                result[key] = convert(child, (*path, key)) if mapping else child
        if parts:
            any_b = next(iter(parts.values()))["lora_B"]
            width = any_b.shape[-1] * len(paths.FUSED[path[-1]])
            layers = any_b.shape[0] if stack else None
            a, b, _ = _combine((layers, width), node, path, stack, config)
            result |= {"lora_A": a, "lora_B": b}
            fused_ranks[path[-1]] = a.shape[-1]
        if parts or "lora_A" in node:
            layers = result["lora_A"].shape[0] if stack else 1
            names = [paths.module_name(path, stack, i) for i in range(layers)]
            last = path[-1]
            probes = [[n.removesuffix(last) + p for p in parts] if parts else [n] for n in names]
            used = zip(names, probes, strict=True)
            adapted.extend(n for n, probe in used if any(rank_of(config, p) for p in probe))
        return result

    weights = convert(adapter.weights, ())
    if not fused_ranks:
        return adapter

    def still_used(patterns: Mapping) -> dict:
        hit = {p for p in patterns for n in adapted if paths.pattern_value({p: True}, n, False)}
        return {p: v for p, v in patterns.items() if p in hit}

    alphas = {k: math.sqrt(r) if config.use_rslora else r for k, r in fused_ranks.items()}
    config = dataclasses.replace(
        config,
        target_modules=tuple(adapted),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={**still_used(config.rank_pattern), **fused_ranks},
        alpha_pattern={**still_used(config.alpha_pattern), **alphas},
    )
    return Adapter(weights, config)


def scaling(config: LoraConfig, path: paths.Path, stack: paths.Path | None, layers: int | None):
    """alpha/r (alpha/√r with rsLoRA) of the module at ``path``: a float32 scalar or (layers,)."""
    names = [paths.module_name(path, stack, i) for i in range(layers or 1)]
    values = np.array([scaling_of(config, name) for name in names], np.float32)
    return values if stack else values[0]


def _init_pair(key: Array, target: Target, config: LoraConfig) -> tuple[Array, Array]:
    fan_in, fan_out = target.shape
    r = max(target.ranks)
    lead = (len(target.ranks),) if target.stack else ()
    key_a, key_b = jax.random.split(key)
    used = np.arange(r) < np.asarray(target.ranks).reshape((*lead, 1))
    if config.init_lora_weights == "gaussian":
        width = 1 / np.maximum(np.asarray(target.ranks), 1).reshape((*lead, 1, 1))
        a = jax.random.normal(key_a, (*lead, fan_in, r)) * width.astype(np.float32)
    else:
        bound = 1 / np.sqrt(fan_in)
        a = jax.random.uniform(key_a, (*lead, fan_in, r), minval=-bound, maxval=bound)
    b = jnp.zeros((*lead, r, fan_out))
    if config.init_lora_weights is False:
        bound = 1 / np.sqrt(r)
        b = jax.random.uniform(key_b, b.shape, minval=-bound, maxval=bound)
    return jnp.where(used[..., None, :], a, 0.0), jnp.where(used[..., :, None], b, 0.0)


def _fold(key: Array, path: paths.Path) -> Array:
    """A key of its own for every path, whatever else is in the tree."""
    return jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))


def _layer_keys(key: Array | None, path: paths.Path, lead: tuple[int, ...]) -> Array | None:
    return (
        None
        if key is None
        else jax.random.split(_fold(key, path), lead)
        if lead
        else _fold(key, path)
    )


def _is_delta(node: Tree, changes: Tree, key: str) -> bool:
    """Whether ``key`` of an adapter node is (part of) a delta on the node's kernel."""
    if key in DELTA:
        return True
    return "kernel" in node and key not in node and isinstance(changes[key], Mapping)


def _combine(
    size: tuple[int | None, int],
    changes: Tree,
    path: paths.Path,
    stack: paths.Path | None,
    config: LoraConfig,
) -> tuple[Array, Array, Array]:
    """A (…, in, r), B (…, r, out) and scale (…) of a kernel with ``size`` = (layers, out).

    Parts of a fused projection are set side by side: their As are concatenated, their Bs are placed
    at the part's columns with zeros elsewhere, each already scaled.
    """
    layers, out = size
    if "lora_A" in changes:
        scale = jnp.asarray(scaling(config, path, stack, layers))
        return changes["lora_A"], changes["lora_B"], scale
    names = paths.FUSED[path[-1]]
    width = out // len(names)
    a, b = [], []
    for i, name in enumerate(names):
        if name not in changes:
            continue
        part = changes[name]
        scale = np.asarray(scaling(config, (*path[:-1], name), stack, layers))[..., None, None]
        after = out - (i + 1) * width
        pad = [(0, 0)] * (part["lora_B"].ndim - 1) + [(i * width, after)]
        a.append(part["lora_A"])
        b.append(jnp.pad(part["lora_B"] * scale, pad))
    one = jnp.ones(() if layers is None else (layers,), jnp.float32)
    return jnp.concatenate(a, -1), jnp.concatenate(b, -2), one


def _check_shapes(kernel, a, b, path: paths.Path) -> None:
    lead, (fan_in, fan_out) = tuple(kernel.shape[:-2]), kernel.shape[-2:]
    r = a.shape[-1]
    if tuple(a.shape) != (*lead, fan_in, r) or tuple(b.shape) != (*lead, r, fan_out):
        raise DataError(
            f"the adapter's A {tuple(a.shape)} and B {tuple(b.shape)} do not fit the weight "
            f"{tuple(kernel.shape)}",
            where=".".join(path),
            fix="use the base model that the adapter was trained on",
        )


def _dense(leaf) -> Array:
    return leaf.dequantize() if hasattr(leaf, "dequantize") else leaf


def _add_delta(w: LoraWeight, sign: float) -> Array:
    delta = jnp.matmul(w.lora_A, w.lora_B, precision="highest") * w.scale[..., None, None]
    return (_dense(w.base).astype(jnp.float32) + sign * delta).astype(w.dtype)
