"""A foreign tree of parameters as jlora sees weights, and the way back.

    LinenScan_0 / attn / query / kernel (L, D, H, hd)
    ⇄ LinenScan_0 / layers / attn / query / kernel (L, D, H·hd)

Kernels are matrices (in, out), and what is stacked lies below a node that says so (``paths``).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jlora.errors import ConfigError, did_you_mean
from jlora.interop.kernel import Flat, Kernel, Layout
from jlora.lora.weight import dense, is_weight_leaf
from jlora.tree import matching, paths

Key = tuple[Any, ...]
"""A leaf's path in the foreign tree, its keys as they are there."""


class MergedWarning(UserWarning):
    """Layers whose product cannot be factored run on merged weights, dense."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a leaf is seen, and as what: with a layout it is a matrix, or a vector."""

    path: paths.Path
    layout: Layout | Flat | None = None
    factored: bool = False


@dataclasses.dataclass(frozen=True)
class View:
    """The leaves of a foreign tree by their paths in it."""

    places: dict[Key, Place]

    def see(self, leaves: Mapping[Key, Any]) -> dict:
        """The foreign leaves as a tree of weights."""
        seen = {}
        for key, leaf in leaves.items():
            place = self.places[key]
            seen[place.path] = place.layout.to_matrix(leaf) if place.layout else leaf
        return paths.nest(seen)

    def dense(self, params: Any) -> dict[Key, Any]:
        """The foreign leaves of a tree of weights, in their own shapes and dense."""
        return self._leaves(params, lambda place, weight: _own(place, dense(weight)))

    def factored(self, params: Any) -> dict[Key, Any]:
        """The foreign leaves of a tree of weights; adapted and packed ones are a ``Kernel``.

        Where a layer's product cannot be factored, the merged leaf; a ``MergedWarning`` names it.
        """
        merged = []

        def leaf(place: Place, weight: Any) -> Any:
            if not is_weight_leaf(weight):
                return _own(place, weight)
            if place.factored and isinstance(place.layout, Layout):
                return Kernel(weight, place.layout)
            if getattr(weight, "bias", None) is not None:
                raise ConfigError(
                    "this layer's product cannot be factored, and its merged kernel has no place "
                    "for what lora_bias adds",
                    where=".".join(place.path),
                    fix="leave the layer out of target_modules, or train without lora_bias",
                )
            if not place.layout:
                merged.append(".".join(place.path))
            return _own(place, weight.dequantize())

        leaves = self._leaves(params, leaf)
        if merged:
            names = ", ".join(merged)
            message = f"jlora cannot factor the products of these, and merges them: {names}"
            warnings.warn(message, MergedWarning, stacklevel=3)
        return leaves

    def _leaves(self, params: Any, f: Callable[[Place, Any], Any]) -> dict[Key, Any]:
        weights = dict(paths.walk(params))
        return {key: f(place, weights[place.path]) for key, place in self.places.items()}


def view(
    leaves: Mapping[Key, Any],
    shapes: Mapping[Key, tuple[int, ...]],
    layouts: Mapping[Key, Layout],
    as_matrices: Sequence[str],
) -> View:
    """How the leaves of a foreign tree are seen.

    Args:
      leaves: all of them.
      shapes: those of one layer, as far as they are known; a leaf with one axis more is stacked.
      layouts: of the kernels whose products can be factored.
      as_matrices: modules whose kernels are seen as (all axes but the last, last axis) though
        theirs cannot: convolutions. They are merged in every step, as asked.

    Raises:
      ConfigError: ``as_matrices`` names no module with such a kernel.
    """
    layouts = {key: at for key, at in layouts.items() if _stacking(leaves[key], at.shape) < 2}
    stacks = _stacks(leaves, shapes)
    places = {}
    for key in leaves:
        node = next((s for s in stacks if key[: len(s)] == s), ())
        lost = node and not any(str(k) in paths.STACKED for k in node[-1:])
        path = (*node, "layers", *key[len(node) :]) if lost else key
        layout = layouts.get(key) or _bias(key, leaves, layouts)
        places[key] = Place(tuple(map(str, path)), layout, key in layouts)
    for key in _named(as_matrices, leaves, layouts):
        shape = tuple(shapes.get(key, leaves[key].shape))
        layout = Layout(shape, tuple(range(len(shape) - 1)), (len(shape) - 1,))
        places[key] = dataclasses.replace(places[key], layout=layout)
    return View(places)


def _own(place: Place, weight: Any) -> Any:
    return place.layout.from_matrix(weight) if place.layout else weight


def _bias(key: Key, leaves: Mapping[Key, Any], layouts: Mapping[Key, Layout]) -> Flat | None:
    """How a bias of many axes is seen, if it is the bias of a layer with a layout."""
    kernel = (*key[:-1], "kernel")
    if key[-1] != "bias" or kernel not in layouts:
        return None
    layers = len(leaves[kernel].shape) - len(layouts[kernel].shape)
    shape = tuple(leaves[key].shape[layers:])
    fits = [n for n in shape if n != 1] == [n for n in layouts[kernel].sizes_out if n != 1]
    return Flat(shape) if fits and len(shape) > 1 else None


def _stacking(leaf: Any, shape: tuple[int, ...]) -> int:
    """How many layer axes a leaf has in front of one layer's shape; 2 stands for what is odd."""
    extra = len(leaf.shape) - len(shape)
    return extra if extra in (0, 1) and tuple(leaf.shape[extra:]) == tuple(shape) else 2


def _stacks(leaves: Mapping[Key, Any], shapes: Mapping[Key, tuple[int, ...]]) -> list[Key]:
    """The outermost nodes of which every leaf has a layer axis, of the same length."""
    found: list[Key] = []
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
    names: Sequence[str], leaves: Iterable[Key], factored: Mapping[Key, Layout]
) -> list[Key]:
    found = []
    kernels = {".".join(map(str, k[:-1])): k for k in leaves if k[-1] == "kernel"}
    kernels = {name: key for name, key in kernels.items() if key not in factored}
    for name in names:
        hits = [key for module, key in kernels.items() if matching.matches(module, [name])]
        if not hits:
            raise ConfigError(
                f"no module {name!r} has a kernel whose product cannot be factored",
                where="as_matrices",
                fix=did_you_mean(name, kernels) or f"there is: {', '.join(kernels) or 'none'}",
            )
        found += hits
    return found
