"""What cannot be combined, and why: every reason at once, before anything is computed."""

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
"""The combination types and what each prunes by."""

BY_FACTOR = {name for name in PRUNES if not name.endswith("svd")} - {"cat"}
"""The types that merge A with A and B with B, whose ranks must be equal for it."""


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
    """What is wrong with the settings of ``add_weighted_adapter``, or means nothing."""
    if combination_type not in PRUNES:
        near = did_you_mean(combination_type, PRUNES) or f"there are {', '.join(PRUNES)}"
        yield f"combination_type: there is no {combination_type!r}; {near}"
        return
    if density is None:
        if PRUNES[combination_type]:
            yield f"{combination_type} needs a density"
    elif not PRUNES[combination_type]:
        yield f"{combination_type} prunes nothing: leave out density"
    elif not 0 < density <= 1:
        yield f"density: {density} is not in (0, 1]"
    if PRUNES[combination_type] == "random" and key is None:
        yield f"{combination_type} draws at random: give a key, such as jax.random.key(0)"
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
    """What keeps adapters from being combined."""
    for i, adapter in enumerate(adapters):
        yield from low_rank_faults(adapter, f"adapter {i}")
        if others := sorted({".".join(path) for path in other_leaves(adapter)}):
            more = f" and {len(others) - 3} more" if others[3:] else ""
            yield f"adapter {i} has more than A and B: {', '.join(others[:3])}{more}"
    yield from _not_one_tree(modules)
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.parts):
        widths = {adapter.parts[name] for adapter in adapters if name in adapter.parts}
        if len(widths) > 1:
            yield f"{name} has parts of {' and '.join(map(str, sorted(widths)))} columns"
    for path in dict.fromkeys(path for own in modules for path in own):
        some = {i: own[path] for i, own in enumerate(modules) if path in own}
        module = next(iter(some.values())).leaf.module()
        shapes = {i: (*f.a.shape[:-1], f.b.shape[-1]) for i, f in some.items()}
        if len(set(shapes.values())) > 1:
            listed = (f"{s[1:]} in {s[0]} layers (adapter {i})" for i, s in shapes.items())
            yield f"{module} is {' and '.join(listed)}"
        elif by_factor:
            layers = zip(*(f.ranks.tolist() for f in some.values()), strict=True)
            if uneven := next((rs for rs in layers if len({*rs} - {0}) > 1), None):
                yield f"{module} has ranks {uneven}: use cat or an svd type, or reduce_rank"


def _not_one_tree(modules: Sequence[Mapping[paths.Path, ModuleFactors]]) -> Iterator[str]:
    """Messages if nodes of different adapters cannot stand in one tree."""
    everywhere = {path: f for own in modules for path, f in own.items()}
    homes: dict[str, paths.Path] = {}
    stacks: dict[paths.Path | None, int] = {}
    for path, f in everywhere.items():
        part = path[:-1]
        if paths.is_part(part) and (*paths.whole_projection(part), path[-1]) in everywhere:
            yield f"{part[-2]} is adapted as a whole and by its part {part[-1]}"
        if any(homes.setdefault(name, path) != path for name in f.leaf.modules()):
            yield f"{f.leaf.module()} is stacked in one adapter and not in another"
        layers = len(f.ranks)
        if f.leaf.stack and stacks.setdefault(f.leaf.stack, layers) != layers:
            yield f"{'.'.join(f.leaf.stack)} has {stacks[f.leaf.stack]} layers, or {layers}"


def low_rank_faults(adapter: Adapter, name: str = "the adapter") -> Iterator[str]:
    """Why an adapter's pairs do not stand for ``scale · A @ B`` of a matrix each, if so."""
    if adapter.initial is not None:
        kind = adapter.config.init_lora_weights
        yield f"{name} counts from its first values ({kind}): turn it into an ordinary one first"
    for leaf in paths.leaves(adapter.weights):
        if leaf.kind in PAIRS and len(leaf.shape) != 2:
            yield f"{name} adapts experts ({leaf.module()})"
