"""Names of leaves in nested dicts of arrays, and PEFT's rules for matching them.

A parameter tree is nested mappings whose leaves are arrays (or pytrees that stand for one, such as
``NF4Array``). Lists and tuples count as mappings from numbers, other registered pytrees (Equinox
modules, dataclasses) as mappings from their fields; an NNX ``Variable`` stands for its value; what
has no shape (None, numbers and functions that a module holds) is nothing, and stays. Leaf keys are
Flax's: a linear layer is ``kernel`` (in, out), perhaps with a ``bias``, an embedding ``embedding``
(vocabulary, dim), a norm ``scale``, perhaps with a ``bias``. Layers that name or turn their matrix
otherwise are seen so too (``FOREIGN``), and nothing else knows of it.

The layers of a scanned decoder are stacked: every leaf below a ``layers`` or ``h`` node has a
leading axis of length L. Such a leaf stands for L modules::

    path    ("model", "layers", "self_attn", "q_proj", "kernel")      value (L, in, out)
    module  "model.layers.0.self_attn.q_proj" … "model.layers.{L-1}.self_attn.q_proj"

Everything here works on names and shapes; no array is touched but those ``FOREIGN`` turns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Path = tuple[str, ...]

STACKED = ("layers", "h", "blocks")
"""Keys whose children carry a leading layer axis, unless the children are numbered."""

OUTPUT_HEADS = ("lm_head", "score", "classifier", "embed_out", "output")
"""Last names of output projections, which ``all-linear`` and quantization leave alone."""

EXPERTS = ("gate_up_proj", "down_proj")
"""Leaves that hold a matrix [out, in] for every expert of a mixture, (E, out, in) in each layer."""

FUSED: dict[str, tuple[str, ...]] = {
    "c_attn": ("q_proj", "k_proj", "v_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Fused projections (GPT-2's, Phi-3's) and the usual names of their parts, in column order.

An adapter may have nodes for parts, below the projection's: ``(…, "c_attn", "q_proj")``. The part's
name as a module is that of an unfused model: ``….attn.q_proj``.
"""

FOREIGN = {
    ("equinox", "Linear", "weight"): ("kernel", True),
    ("equinox", "Embedding", "weight"): ("embedding", False),
}
"""(package, class, field) of other codebases' layers → Flax's key, and whether it is [out, in]."""

LEAST_AXES = {"kernel": 2, "embedding": 2, "lora_A": 2, "lora_B": 2, "scale": 1, "bias": 1}
LEAST_AXES |= {"lora_magnitude_vector": 1, "lora_bias": 1}
"""How many axes a leaf has in one layer, at least."""


class Leaf(NamedTuple):
    """One leaf of a tree; ``layers`` is the length of its leading layer axis, if it is stacked."""

    path: Path
    value: Any
    stack: Path | None  # the path of the stacked node it lies under
    layers: int | None

    @property
    def kind(self) -> str:
        """The leaf's own key: ``kernel``, ``bias``, ``embedding`` or ``scale``."""
        return self.path[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one layer's array, without the layer axis."""
        return tuple(self.value.shape[1:] if self.stack else self.value.shape)

    def module(self, layer: int | None = None) -> str:
        """The module's dotted name, with ``layer`` as its number (``*`` when None) if stacked."""
        return module_name(self.path[:-1], self.stack, layer)

    def modules(self) -> list[str]:
        """The names of all modules that the leaf stands for, in layer order."""
        return module_names(self.path[:-1], self.stack, self.layers)


def is_part(module: Path) -> bool:
    """Whether a node stands for a part of a fused projection."""
    return len(module) > 1 and module[-1] in FUSED.get(module[-2], ())


def whole(module: Path) -> Path:
    """The projection that a part belongs to; any other module is whole itself."""
    return module[:-1] if is_part(module) else module


def part_widths(module: Path, shapes: Mapping[Path, tuple[int, ...]]) -> tuple[int, ...]:
    """How many columns each part of the fused projection ``module`` has; () if it is not one.

    With grouped-query attention, queries are as wide as what ``o_proj`` reads, and keys and values
    share the rest; other projections have equal parts.
    """
    names = FUSED.get(module[-1], ())
    if not names:
        return ()
    total, out = shapes[(*module, "kernel")][-1], (*module[:-1], "o_proj", "kernel")
    if "q_proj" in names and out in shapes:
        queries = shapes[out][0]
        return (queries, *((total - queries) // 2,) * 2)
    return (total // len(names),) * len(names)


def module_name(path: Path, stack: Path | None, layer: int | None) -> str:
    """``("model", "layers", "q")`` stacked at ``("model", "layers")`` → ``model.layers.3.q``."""
    if is_part(path):
        path = (*path[:-2], path[-1])
    if stack is None:
        return ".".join(path)
    number = "*" if layer is None else str(layer)
    return ".".join((*stack, number, *path[len(stack) :]))


def module_names(path: Path, stack: Path | None, layers: int | None) -> list[str]:
    """The names of all modules at ``path``: one a layer if it is stacked."""
    numbers = [None] if stack is None else range(layers or 0)
    return [module_name(path, stack, i) for i in numbers]


def walk(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields (path, leaf) of a tree in key order of insertion."""
    children = _children(tree)
    if children is not None:
        for key, child in children:
            yield from walk(child, (*path, str(key)))
    elif _is_array(leaf := _value(tree)):
        yield path, leaf


def map_leaves(f: Callable[[Path, Any], Any], tree: Any, path: Path = ()) -> Any:
    """The same nesting, mappings as plain dicts, with each leaf replaced by ``f(path, leaf)``.

    Lists, tuples and other registered pytrees keep their types.
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
    if type(node) in (list, tuple):
        return list(enumerate(node))
    if node is None or _is_array(node) or hasattr(node, "get_value"):
        return None
    fields, _ = _fields(node)
    if fields is None:
        return None
    seen = [(_seen(node, field), child) for field, child in fields.items()]
    return [(key, turned(child) if turn else child) for (key, turn), child in seen]


def _rebuilt(node: Any, children: Mapping[Any, Any]) -> Any:
    """A registered pytree with other children, by the keys of ``_children``."""
    fields, treedef = _fields(node)
    new = []
    for field in fields or ():
        key, turn = _seen(node, field)
        new.append(turned(children[key]) if turn else children[key])
    return treedef.unflatten(new)


def _fields(node: Any) -> tuple[dict[str, Any] | None, Any]:
    """The fields of a registered pytree, and its definition; no fields for what is a leaf."""
    import jax

    found, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    if any(not path for path, _ in found):
        return None, treedef
    return {jax.tree_util.keystr(path, simple=True): child for path, child in found}, treedef


def _seen(node: Any, field: str) -> tuple[str, bool]:
    """The key that a field of ``node`` goes by, and whether its matrix is seen transposed."""
    for kind in type(node).__mro__:
        if found := FOREIGN.get((kind.__module__.partition(".")[0], kind.__name__, field)):
            return found
    return field, False


def turned(value: Any) -> Any:
    """The transposed matrix, or matrices; what has no ``mT`` but a shape gets another shape."""
    if hasattr(value, "mT"):
        return value.mT
    if not _is_array(value):
        return value
    *lead, rows, columns = value.shape
    return value.update(shape=(*lead, columns, rows), sharding=None)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape")


def _value(leaf: Any) -> Any:
    return leaf.get_value() if hasattr(leaf, "get_value") else leaf


def get(tree: Mapping, path: Path) -> Any:
    """The node at ``path``; KeyError when it is not there."""
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
    """The stacked node that ``path`` lies under, or None."""
    return next((s for s in stacks if path[: len(s)] == s), None)


def stacks(tree: Any) -> list[Path]:
    """The stacked nodes of a tree (see the module's header), outermost only."""
    found: list[Path] = []

    def visit(node: Any, path: Path) -> None:
        children = _children(node) or []
        if path and path[-1] in STACKED and not any(str(key).isdigit() for key, _ in children):
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


def leaves(tree: Any) -> list[Leaf]:
    """All leaves with their stacking."""
    nodes = stacks(tree)
    result = []
    for path, value in walk(tree):
        stack = stack_of(path, nodes)
        result.append(Leaf(path, value, stack, value.shape[0] if stack else None))
    return result


# PEFT's matching rules (peft.tuners.tuners_utils.check_target_module_exists and
# peft.utils.other.get_pattern_key, peft 0.21).


def matches(name: str, pattern: str | Sequence[str]) -> bool:
    """A string is a full regular expression; a sequence holds names or ``.name`` suffixes."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == p or name.endswith(f".{p}") for p in pattern)


def layer_number(name: str, layers_pattern: str | Sequence[str] | None = None) -> int | None:
    """The first number in a module's name, or the one that follows ``layers_pattern``."""
    if not layers_pattern:
        expressions = [r".*?\.[^.]*\.(\d+)\."]
    else:
        patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
        expressions = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns]
    for expression in expressions:
        if match := re.match(expression, name):
            return int(match.group(1))
    return None


def pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern, in order, that ends ``name`` at a dot; else ``default``."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def pattern_table(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """The patterns by which ``pattern_value`` gives each name its value: its inverse.

    They are last names where one value holds for all of the name, else full names, so that no two
    match one module: a table's order is lost in a file with sorted keys.
    """
    by_last: dict[str, set[Any]] = {}
    for name, value in values.items():
        by_last.setdefault(name.rpartition(".")[2], set()).add(value)
    table = {}
    for name, value in values.items():
        last = name.rpartition(".")[2]
        if value != default:
            table[last if len(by_last[last]) == 1 else name] = value
    return table
