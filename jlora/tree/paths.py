"""Names of leaves and modules in parameter trees, and which leaves are stacked.

A parameter tree is nested mappings whose leaves are arrays, or pytrees that stand for one array
(``NF4Array``, ``LoraWeight``). Lists and tuples are read as mappings from their indices, other
registered pytrees (Equinox modules, dataclasses) as mappings from their fields, an NNX ``Variable``
as its value. Values without a shape (None, numbers, functions of a module) are no leaves and are
passed through unchanged.

Leaf keys are Flax's: a linear layer has ``kernel`` (in, out) and perhaps ``bias``, an embedding
``embedding`` (vocabulary, dim), a norm ``scale`` and perhaps ``bias``. The fields of Equinox layers
are renamed, and their matrices transposed, to match (``EQUINOX_FIELDS``); no other module has to
know about that.

The layers of a scanned decoder are stacked: every leaf below a ``layers`` or ``h`` node has a
leading axis of length L. Such a leaf belongs to L modules::

    path    ("model", "layers", "self_attn", "q_proj", "kernel")      value (L, in, out)
    module  "model.layers.0.self_attn.q_proj" … "model.layers.{L-1}.self_attn.q_proj"

Layers with different leaves cannot be stacked together. Runs of consecutive layers with the same
leaves are, each below a node that is named after its first and last layer::

    path    ("model", "layers", "1-3", "mlp", "up_proj", "kernel")    value (3, in, out)
    module  "model.layers.1.mlp.up_proj" … "model.layers.3.mlp.up_proj"

Everything here works on names and shapes; the only arrays touched are Equinox matrices, transposed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Path = tuple[str, ...]

STACKED = ("layers", "h", "blocks")
"""Keys of nodes whose leaves are stacked, unless the node's children are layers or runs."""

RUN = re.compile(r"(\d+)-(\d+)")
"""Keys of the runs of layers below such a node: the numbers of the first and the last layer."""

OUTPUT_HEADS = ("lm_head", "score", "classifier", "embed_out", "output")
"""Last names of output heads, which ``all-linear`` and quantization skip."""

EXPERTS = ("gate_up_proj", "down_proj")
"""Leaves with one matrix [out, in] for each expert of a mixture: (E, out, in) in each layer."""

ROUTERS = ("gate", "router")
"""Last names of routers of mixtures, whose leaf ``weight`` is (E, in) in each layer."""

FUSED: dict[str, tuple[str, ...]] = {
    "c_attn": ("q_proj", "k_proj", "v_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Fused projections (GPT-2's, Phi-3's) and the names of their parts, in column order.

An adapter may have a node for a part, below that of the projection: ``(…, "c_attn", "q_proj")``.
The part's module name is that of an unfused model: ``….attn.q_proj``.
"""

EQUINOX_FIELDS = {
    ("equinox", "Linear", "weight"): ("kernel", True),
    ("equinox", "Embedding", "weight"): ("embedding", False),
}
"""(package, class, field) → Flax's key, and whether the matrix is stored as [out, in]."""

TORCH_NAMES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}
"""Kind of leaf → the last part of its name in torch, where they differ."""

LEAST_AXES = {"kernel": 2, "embedding": 2, "lora_A": 2, "lora_B": 2, "scale": 1, "bias": 1}
LEAST_AXES |= {"lora_magnitude_vector": 1, "lora_bias": 1}
"""The least number of axes of a leaf in one layer: a leaf with no more is not stacked."""


class ModuleStack(NamedTuple):
    """The modules that a node of a tree stands for: one, or one a layer below a stacked node."""

    path: Path
    stack: Path | None = None
    """The path of the stacked node that contains it."""
    layers: int | None = None

    def name(self, layer: int | None = None) -> str:
        """``("model", "layers", "q")`` stacked at ``("model", "layers")`` → ``model.layers.3.q``.

        ``layer`` is the index of a stacked module; None gives ``*``, or the layers of the run.
        """
        # PEFT names a part as the projection of an unfused model, without the fused one's name.
        path = (*self.path[:-2], self.path[-1]) if is_part(self.path) else self.path
        if self.stack is None:
            return ".".join(path)
        run = RUN.fullmatch(self.stack[-1])
        front, every = (self.stack[:-1], run[0]) if run else (self.stack, "*")
        number = every if layer is None else str(first_layer(self.stack) + layer)
        return ".".join((*front, number, *path[len(self.stack) :]))

    def names(self) -> list[str]:
        """The dotted names of all its modules, in layer order."""
        numbers = [None] if self.stack is None else range(self.layers or 0)
        return [self.name(i) for i in numbers]


class Leaf(NamedTuple):
    """A leaf of a tree with its path; a stacked leaf has a leading axis of ``layers`` layers."""

    path: Path
    value: Any
    stack: Path | None
    """The path of the stacked node that contains it."""
    layers: int | None

    @property
    def kind(self) -> str:
        """The leaf's own key: ``kernel``, ``bias``, ``embedding`` or ``scale``."""
        return self.path[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one layer's array, without the layer axis."""
        return tuple(self.value.shape[1:] if self.stack else self.value.shape)

    def modules_at(self, node: Path) -> ModuleStack:
        """The modules at another node that is stacked as this leaf is."""
        return ModuleStack(node, self.stack, self.layers)

    def module(self, layer: int | None = None) -> str:
        """The dotted name of the leaf's module; see ``ModuleStack.name``."""
        return self.modules_at(self.path[:-1]).name(layer)

    def modules(self) -> list[str]:
        """The dotted names of the leaf's modules, one a layer if it is stacked."""
        return self.modules_at(self.path[:-1]).names()


def run_key(layers: range) -> str:
    """The key of the node of a run of layers."""
    return f"{layers[0]}-{layers[-1]}"


def first_layer(stack: Path) -> int:
    """The number of the first layer of a stacked node."""
    run = RUN.fullmatch(stack[-1])
    return int(run[1]) if run else 0


def without_run(path: Path, stack: Path | None) -> Path:
    """A path in the stacked node ``stack`` without the key of a run, if that is the node's key."""
    is_run = stack and RUN.fullmatch(stack[-1])
    return (*stack[:-1], *path[len(stack) :]) if stack and is_run else path


def is_parameter(path: Path) -> bool:
    """Whether a leaf's path is that of a bare parameter: of experts or of a router.

    Such matrices are [out, in]; adapters name them with the leaf's own key (``mlp.gate.weight``).
    """
    *_, module, name = ("", *path)
    return name in EXPERTS or (name == "weight" and module in ROUTERS)


def is_part(module: Path) -> bool:
    """Whether a node is a part of a fused projection."""
    return len(module) > 1 and module[-1] in FUSED.get(module[-2], ())


def whole_projection(module: Path) -> Path:
    """The fused projection that a part belongs to; any other module itself."""
    return module[:-1] if is_part(module) else module


def part_widths(module: Path, shapes: Mapping[Path, tuple[int, ...]]) -> tuple[int, ...]:
    """The column counts of a fused projection's parts; () if ``module`` is none.

    With grouped-query attention, the query part has as many columns as ``o_proj`` has inputs, and
    key and value share the rest equally. Other projections have equal parts.
    """
    names = FUSED.get(module[-1], ())
    if not names:
        return ()
    total, out = shapes[(*module, "kernel")][-1], (*module[:-1], "o_proj", "kernel")
    if "q_proj" in names and out in shapes:
        queries = shapes[out][0]
        return (queries, *((total - queries) // 2,) * 2)
    return (total // len(names),) * len(names)


def walk(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields (path, leaf) in the order of the tree's keys."""
    children = _children(tree)
    if children is not None:
        for key, child in children:
            yield from walk(child, (*path, str(key)))
    elif _is_array(leaf := _value(tree)):
        yield path, leaf


def map_leaves(f: Callable[[Path, Any], Any], tree: Any, path: Path = ()) -> Any:
    """The tree with each leaf replaced by ``f(path, leaf)``.

    Mappings become plain dicts; lists, tuples and other registered pytrees keep their types.
    """
    children = _children(tree)
    if children is None:
        leaf = _value(tree)
        return f(path, leaf) if _is_array(leaf) else leaf
    new = {key: map_leaves(f, child, (*path, str(key))) for key, child in children}
    if isinstance(tree, Mapping):
        return new
    return type(tree)(new.values()) if type(tree) in (list, tuple) else _rebuilt(tree, new)


def _children(node: Any) -> list[tuple[Any, Any]] | None:
    """The children of a node by key; None for a leaf."""
    if isinstance(node, Mapping):
        return list(node.items())
    # Not isinstance: a NamedTuple is a pytree with fields, whose names are its keys.
    if type(node) in (list, tuple):
        return list(enumerate(node))
    if node is None or _is_array(node) or hasattr(node, "get_value"):
        return None
    fields, _ = _fields(node)
    if fields is None:
        return None
    keyed = [(_flax_key(node, field), child) for field, child in fields.items()]
    return [(key, _transposed(child) if out_in else child) for (key, out_in), child in keyed]


def _rebuilt(node: Any, children: Mapping[Any, Any]) -> Any:
    """A registered pytree with new children, given by the keys of ``_children``."""
    fields, treedef = _fields(node)
    new = []
    for field in fields or ():
        key, out_in = _flax_key(node, field)
        new.append(_transposed(children[key]) if out_in else children[key])
    return treedef.unflatten(new)


def _fields(node: Any) -> tuple[dict[str, Any] | None, Any]:
    """The fields of a registered pytree and its treedef; None and a treedef for a leaf."""
    import jax

    # One level: `walk` decides at each node below whether it is a leaf, such as a quantized array.
    found, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    if any(not path for path, _ in found):
        return None, treedef
    return {jax.tree_util.keystr(path, simple=True): child for path, child in found}, treedef


def _flax_key(node: Any, field: str) -> tuple[str, bool]:
    """Flax's key for a field of ``node``, and whether its matrix is stored as [out, in]."""
    for kind in type(node).__mro__:
        if found := EQUINOX_FIELDS.get((kind.__module__.partition(".")[0], kind.__name__, field)):
            return found
    return field, False


def _transposed(value: Any) -> Any:
    """``value.mT``, or the ``jax.ShapeDtypeStruct`` of that shape."""
    if hasattr(value, "mT"):
        return value.mT
    if not _is_array(value):
        return value
    *lead, rows, columns = value.shape
    return value.update(shape=(*lead, columns, rows), sharding=None)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape")


def _value(leaf: Any) -> Any:
    """The leaf itself, or the value of an NNX ``Variable``."""
    return leaf.get_value() if hasattr(leaf, "get_value") else leaf


def get(tree: Mapping, path: Path) -> Any:
    """The node at ``path``; KeyError if there is none."""
    for key in path:
        tree = tree[key]
    return tree


def nest(leaves: Mapping[Path, Any]) -> dict:
    """Nested dicts from a flat mapping of paths: the inverse of ``dict(walk(tree))``."""
    tree: dict = {}
    for path, value in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def stack_of(path: Path, stacks: Sequence[Path]) -> Path | None:
    """The stacked node that contains ``path``, or None."""
    return next((s for s in stacks if path[: len(s)] == s), None)


def stacked_nodes(tree: Any) -> list[Path]:
    """The paths of a tree's stacked nodes (see the module's docstring), outermost only."""
    found: list[Path] = []

    def visit(node: Any, path: Path) -> None:
        children = _children(node) or []
        if _may_be_stacked(path, [str(key) for key, _ in children]):
            below = dict(walk(node)) if children else {}
            layers = {leaf.shape[0] if leaf.shape else None for leaf in below.values()}
            axes = (len(leaf.shape) > LEAST_AXES.get(p[-1], 0) for p, leaf in below.items())
            if len(layers) == 1 and all(axes):
                found.append(path)
                return
        for key, child in children:
            visit(child, (*path, str(key)))

    visit(tree, ())
    return found


def _may_be_stacked(path: Path, children: Sequence[str]) -> bool:
    """Whether a node's name and its children's say that its leaves are stacked."""
    if len(path) > 1 and path[-2] in STACKED and RUN.fullmatch(path[-1]):
        return True
    numbered = any(key.isdigit() or RUN.fullmatch(key) for key in children)
    return bool(path) and path[-1] in STACKED and not numbered


def leaves(tree: Any) -> list[Leaf]:
    """All leaves of a tree, in the order of its keys."""
    nodes = stacked_nodes(tree)
    result = []
    for path, value in walk(tree):
        stack = stack_of(path, nodes)
        result.append(Leaf(path, value, stack, value.shape[0] if stack else None))
    return result
