"""Faults of a combination of adapters: all are found before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from jaxtyping import Array

from jlora.errors import ConfigError, did_you_mean
from jlora.lora import Adapter
from jlora.lora.adapter import PAIRS
from jlora.lora.combine.factors import ModuleFactors, other_leaves
from jlora.tree import paths

PRUNES = {
    "svd": None,
    "linear": None,
    "cat": None,
    "ties": "magnitude",
    "ties_svd": "magnitude",
    "dare_ties": "random",
    "dare_linear": "random",
    "dare_ties_svd": "random",
    "dare_linear_svd": "random",
    "magnitude_prune": "magnitude",
    "magnitude_prune_svd": "magnitude",
}
"""Combination type → how it prunes."""

BY_FACTOR = {name for name in PRUNES if not name.endswith("svd")} - {"cat"}
"""The types that merge A with A and B with B, which requires equal ranks."""


def refuse(faults: Sequence[str], where: str) -> None:
    """Raises one ConfigError that lists all faults, if there are any."""
    if faults:
        raise ConfigError("; ".join(faults), where=where)


def setting_faults(
    combination_type: str,
    svd_rank: int | None,
    svd_clamp: float | None,
    density: float | None,
    key: Array | None,
) -> Iterator[str]:
    """Settings of ``add_weighted_adapter`` that are invalid or have no effect."""
    if combination_type not in PRUNES:
        near = did_you_mean(combination_type, PRUNES) or f"there are {', '.join(PRUNES)}"
        yield f"combination_type: {combination_type!r} is unknown; {near}"
        return
    if density is None:
        if PRUNES[combination_type]:
            yield f"{combination_type} needs a density"
    elif not PRUNES[combination_type]:
        yield f"{combination_type} does not prune: leave out density"
    elif not 0 < density <= 1:
        yield f"density: {density} is not in (0, 1]"
    if PRUNES[combination_type] == "random" and key is None:
        yield f"{combination_type} is random: give a key, such as jax.random.key(0)"
    if not combination_type.endswith("svd") and (svd_rank, svd_clamp) != (None, None):
        yield f"{combination_type} has no SVD: leave out svd_rank and svd_clamp"
    if svd_rank is not None and svd_rank < 1:
        yield f"svd_rank: {svd_rank} is not positive"
    if svd_clamp is not None and not 0.5 < svd_clamp <= 1:
        yield f"svd_clamp: {svd_clamp} is not in (0.5, 1]: it is a quantile of signed values"


def adapter_faults(
    adapters: Sequence[Adapter],
    modules: Sequence[Mapping[paths.Path, ModuleFactors]],
    by_factor: bool,
) -> Iterator[str]:
    """Reasons why the adapters cannot be combined."""
    for i, adapter in enumerate(adapters):
        yield from low_rank_faults(adapter, f"adapter {i}")
        if others := sorted({".".join(path) for path in other_leaves(adapter)}):
            more = f" and {len(others) - 3} more" if others[3:] else ""
            yield f"adapter {i} has leaves besides A and B: {', '.join(others[:3])}{more}"
    yield from _not_one_tree(modules)
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.parts):
        widths = {adapter.parts[name] for adapter in adapters if name in adapter.parts}
        if len(widths) > 1:
            yield f"{name} has parts of {' and '.join(map(str, sorted(widths)))} columns"
    for path in dict.fromkeys(path for flat in modules for path in flat):
        having = {i: flat[path] for i, flat in enumerate(modules) if path in flat}
        module = next(iter(having.values())).leaf.module()
        shapes = {i: (*f.a.shape[:-1], f.b.shape[-1]) for i, f in having.items()}
        if len(set(shapes.values())) > 1:
            listed = (f"{s[1:]} in {s[0]} layers (adapter {i})" for i, s in shapes.items())
            yield f"{module} is {' and '.join(listed)}"
        elif by_factor:
            layers = zip(*(f.ranks.tolist() for f in having.values()), strict=True)
            if uneven := next((rs for rs in layers if len({*rs} - {0}) > 1), None):
                yield f"{module} has ranks {uneven}: use cat or an svd type, or reduce_rank"


def _not_one_tree(modules: Sequence[Mapping[paths.Path, ModuleFactors]]) -> Iterator[str]:
    """Messages for nodes of different adapters that do not fit into one tree."""
    union = {path: f for flat in modules for path, f in flat.items()}
    path_of_name: dict[str, paths.Path] = {}
    stacks: dict[paths.Path | None, int] = {}
    for path, f in union.items():
        part = path[:-1]
        if paths.is_part(part) and (*paths.whole_projection(part), path[-1]) in union:
            yield f"both {part[-2]} and its part {part[-1]} are adapted"
        if any(path_of_name.setdefault(name, path) != path for name in f.leaf.modules()):
            yield f"{f.leaf.module()} is stacked in one adapter and not in another"
        layers = len(f.ranks)
        if f.leaf.stack and stacks.setdefault(f.leaf.stack, layers) != layers:
            yield f"{'.'.join(f.leaf.stack)} has {stacks[f.leaf.stack]} layers, or {layers}"


def low_rank_faults(adapter: Adapter, name: str = "the adapter") -> Iterator[str]:
    """Reasons why an adapter is not one ``scale · A @ B`` for each matrix."""
    if adapter.initial is not None:
        kind = adapter.config.init_lora_weights
        yield f"{name} has initial values ({kind}) to subtract: make it an ordinary one first"
    for leaf in paths.leaves(adapter.weights):
        if leaf.kind in PAIRS and len(leaf.shape) != 2:
            yield f"{name} adapts experts ({leaf.module()})"
        elif leaf.kind in PAIRS and leaf.path[-2] == "weight":
            yield f"{name} adapts a router ({leaf.module()})"
