"""Conversion between another framework's parameter tree and a tree of jlora's weights.

    LinenScan_0 / attn / query / kernel (L, D, H, hd)
    ⇄ LinenScan_0 / layers / attn / query / kernel (L, D, H·hd)

Kernels become matrices (in, out), and stacked layers get a ``layers`` node (see ``paths``).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jlora.errors import ConfigError, did_you_mean
from jlora.interop.kernel import BiasLayout, Kernel, Layout
from jlora.lora.weight import dense, is_weight_leaf
from jlora.tree import matching, paths

ForeignKey = tuple[Any, ...]
"""A leaf's path in the foreign tree, with that tree's keys."""


class MergedWarning(UserWarning):
    """Warns of layers that compute with merged, dense weights: their product cannot be factored."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A foreign leaf's path in jlora's tree, and the layout that makes it a matrix or vector."""

    path: paths.Path
    layout: Layout | BiasLayout | None = None
    factored: bool = False


@dataclasses.dataclass(frozen=True)
class View:
    """The correspondence of a foreign tree's leaves and jlora's."""

    places: dict[ForeignKey, Place]

    def to_weights(self, leaves: Mapping[ForeignKey, Any]) -> dict:
        """The foreign leaves as a tree of jlora's weights."""
        weights = {}
        for key, leaf in leaves.items():
            place = self.places[key]
            weights[place.path] = place.layout.to_matrix(leaf) if place.layout else leaf
        return paths.nest(weights)

    def dense(self, params: Any) -> dict[ForeignKey, Any]:
        """The foreign leaves of a tree of weights, dense and in their original shapes."""
        return self._leaves(params, lambda place, weight: _foreign_array(place, dense(weight)))

    def factored(self, params: Any) -> dict[ForeignKey, Any]:
        """The foreign leaves of a tree of weights; adapted and quantized ones as ``Kernel``.

        A leaf whose product cannot be factored is merged, with a ``MergedWarning``.
        """
        merged = []

        def leaf(place: Place, weight: Any) -> Any:
            if not is_weight_leaf(weight):
                return _foreign_array(place, weight)
            if place.factored and isinstance(place.layout, Layout):
                return Kernel(weight, place.layout)
            if getattr(weight, "bias", None) is not None:
                raise ConfigError(
                    "this layer's product cannot be factored, and its merged kernel cannot include "
                    "lora_bias",
                    where=".".join(place.path),
                    fix="leave the layer out of target_modules, or train without lora_bias",
                )
            if not place.layout:
                merged.append(".".join(place.path))
            return _foreign_array(place, weight.dequantize())

        leaves = self._leaves(params, leaf)
        if merged:
            names = ", ".join(merged)
            message = "the products of these layers cannot be factored; their weights are merged"
            warnings.warn(f"{message}: {names}", MergedWarning, stacklevel=3)
        return leaves

    def _leaves(self, params: Any, f: Callable[[Place, Any], Any]) -> dict[ForeignKey, Any]:
        weights = dict(paths.walk(params))
        return {key: f(place, weights[place.path]) for key, place in self.places.items()}


def view(
    leaves: Mapping[ForeignKey, Any],
    shapes: Mapping[ForeignKey, tuple[int, ...]],
    layouts: Mapping[ForeignKey, Layout],
    as_matrices: Sequence[str],
) -> View:
    """The correspondence for the leaves of a foreign tree.

    Args:
      leaves: the tree's leaves.
      shapes: shapes of one layer, as far as known; a leaf with one more axis is stacked.
      layouts: layouts of the kernels whose products can be factored.
      as_matrices: modules with other kernels (convolutions) to read as matrices (all axes but the
        last, last axis). Their adapters are merged in every step.

    Raises:
      ConfigError: ``as_matrices`` names no module with such a kernel.
    """
    layouts = {key: at for key, at in layouts.items() if _stacking(leaves[key], at.shape) < 2}
    stacks = _stacks(leaves, shapes)
    places = {}
    for key in leaves:
        node = next((s for s in stacks if key[: len(s)] == s), ())
        unmarked = node and str(node[-1]) not in paths.STACKED
        path = (*node, "layers", *key[len(node) :]) if unmarked else key
        layout = layouts.get(key) or _bias(key, leaves, layouts)
        places[key] = Place(tuple(map(str, path)), layout, key in layouts)
    for key in _named(as_matrices, leaves, layouts):
        shape = tuple(shapes.get(key, leaves[key].shape))
        layout = Layout(shape, tuple(range(len(shape) - 1)), (len(shape) - 1,))
        places[key] = dataclasses.replace(places[key], layout=layout)
    return View(places)


def _foreign_array(place: Place, weight: Any) -> Any:
    return place.layout.from_matrix(weight) if place.layout else weight


def _bias(
    key: ForeignKey, leaves: Mapping[ForeignKey, Any], layouts: Mapping[ForeignKey, Layout]
) -> BiasLayout | None:
    """The layout of a bias of many axes, if its layer's kernel has a layout."""
    kernel = (*key[:-1], "kernel")
    if key[-1] != "bias" or kernel not in layouts:
        return None
    layers = len(leaves[kernel].shape) - len(layouts[kernel].shape)
    shape = tuple(leaves[key].shape[layers:])
    fits = [n for n in shape if n != 1] == [n for n in layouts[kernel].sizes_out if n != 1]
    return BiasLayout(shape) if fits and len(shape) > 1 else None


def _stacking(leaf: Any, shape: tuple[int, ...]) -> int:
    """The number of layer axes before one layer's shape: 0 or 1; 2 if the shapes do not match."""
    extra = len(leaf.shape) - len(shape)
    return extra if extra in (0, 1) and tuple(leaf.shape[extra:]) == tuple(shape) else 2


def _stacks(
    leaves: Mapping[ForeignKey, Any], shapes: Mapping[ForeignKey, tuple[int, ...]]
) -> list[ForeignKey]:
    """The outermost nodes whose leaves all have a layer axis of the same length."""
    found: list[ForeignKey] = []
    for key, shape in shapes.items():
        if key not in leaves or _stacking(leaves[key], shape) != 1:
            continue
        for depth in range(1, len(key)):
            below = {k: v for k, v in leaves.items() if k[:depth] == key[:depth]}
            known = (_stacking(v, shapes[k]) == 1 for k, v in below.items() if k in shapes)
            if len({v.shape[:1] for v in below.values()}) == 1 and all(known):
                if key[:depth] not in found:
                    found.append(key[:depth])
                break
    return found


def _named(
    names: Sequence[str], leaves: Iterable[ForeignKey], factored: Mapping[ForeignKey, Layout]
) -> list[ForeignKey]:
    found = []
    kernels = {".".join(map(str, k[:-1])): k for k in leaves if k[-1] == "kernel"}
    kernels = {name: key for name, key in kernels.items() if key not in factored}
    for name in names:
        hits = [key for module, key in kernels.items() if matching.matches(module, [name])]
        if not hits:
            raise ConfigError(
                f"no module {name!r} has a kernel whose product cannot be factored",
                where="as_matrices",
                fix=did_you_mean(name, kernels) or f"choose from: {', '.join(kernels) or 'none'}",
            )
        found += hits
    return found
