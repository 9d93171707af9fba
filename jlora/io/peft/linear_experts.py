"""Adapters of experts and routers that were linear layers, as they were in transformers 4.

Every expert had layers, and factors, of its own. Since transformers 5 the matrices of all experts
are one parameter, gate and up are one matrix, and an adapter of it has a pair for each expert::

    block_sparse_moe.experts.3.w1  A₁ (in, r), B₁ (r, inner)   mlp.experts.gate_up_proj, expert 3:
    block_sparse_moe.experts.3.w3  A₃ (in, r), B₃ (r, inner)   A [A₁, A₃], B [[B₁, 0], [0, B₃]]
    block_sparse_moe.gate          A (in, r), B (r, E)         mlp.gate.weight: the same pair

(Qwen's names are ``mlp.experts.3.gate_proj`` and so on.) The file decides what is adapted: experts
and halves that it lacks have the delta zero, and smaller ranks are filled up with zeros. So the
delta is exactly the old one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jlora.config import LoraConfig
from jlora.io.peft.other_tools import core_of
from jlora.io.peft.tensors import PREFIX, TensorView
from jlora.lora import DELTA
from jlora.lora.targets import (
    listed_names,
    names_of_all,
    parameter_rank_of,
    rank_of,
    scaling_of,
    with_listed_targets,
    with_module_settings,
)
from jlora.tree import matching, paths

HALVES = {
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", None),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
}
"""Linear layer of an expert → the parameter that holds its weight today, and which half of it."""

OLD_BLOCK, BLOCK = "block_sparse_moe", "mlp"
"""Mixtral's name of the mixture in transformers 4, and today's."""


class LinearLayer(NamedTuple):
    """A linear layer in transformers 4, and where its weight is in transformers 5."""

    module: str
    """Its name, to which the settings apply."""
    parameter: str
    """The name of the parameter in one layer of the decoder."""
    leaf: paths.Leaf
    """The base's leaf of the parameter."""
    layer: int
    """The index in a stacked leaf."""
    expert: int | None = None
    half: int | None = None


Layers = Mapping[str, LinearLayer]
"""A tensor's name without ``.lora_A.weight`` or ``.lora_B.weight`` → its layer."""


def find_linear_experts(names: Iterable[str], params: Any, config: LoraConfig) -> Layers:
    """The linear layers of experts and routers that the tensors ``names`` of a file adapt.

    Not those that ``config``, the folder's, adapts as parameters. ``params`` may be abstract.
    """
    parameters = {
        core_of(PREFIX + name): (name, leaf, i)
        for leaf in paths.leaves(params)
        if paths.is_parameter(leaf.path)
        for i, name in enumerate(leaf.modules_at(leaf.path).names())
        if not matching.matches(name, config.target_parameters or ())
    }
    # By the tensors alone: peft 0.21 converts such adapters, too, but refuses one half of the fused
    # matrix, dropout, and ranks by pattern.
    found = {}
    for name in names:
        front, _, end = name.rpartition(".lora_")
        if end not in ("A.weight", "B.weight"):
            continue
        core = ".".join(core_of(front))
        path = core.replace(f".{OLD_BLOCK}.", f".{BLOCK}.")
        expert, half = None, None
        if match := re.fullmatch(rf"(.*\.experts)\.(\d+)\.({'|'.join(HALVES)})", path):
            last, half = HALVES[match[3]]
            path, expert = f"{match[1]}.{last}", int(match[2])
        else:
            path += ".weight"
        name, leaf, layer = parameters.get(tuple(path.split(".")), ("", None, 0))
        if leaf is not None and (expert or 0) < (1 if expert is None else leaf.shape[0]):
            module = front.removeprefix(PREFIX) if front.startswith(PREFIX) else f"model.{core}"
            found[front] = LinearLayer(module, name, leaf, layer, expert, half)
    return found


def with_target_parameters(config: LoraConfig, layers: Layers, params: Any) -> LoraConfig:
    """The config of an adapter with these experts and routers in ``target_parameters``.

    The two halves of a matrix have twice the rank. ``lora_dropout``, which has no effect on a
    trained adapter, is 0: for parameters PEFT refuses another.
    """
    leaves = paths.leaves(params)
    settings = {}
    for leaf in leaves:
        is_parameter = paths.is_parameter(leaf.path)
        if is_parameter or leaf.kind in ("kernel", "embedding"):
            rank = parameter_rank_of if is_parameter else rank_of
            names = _modules(leaf).names()
            settings |= {n: (r, scaling_of(config, n)) for n in names if (r := rank(config, n))}
    for parameter, (ranks, scale) in _of_parameters(config, layers).items():
        # By the scale: peft 0.21 doubles alpha with the rank, which is √2 too strong with rsLoRA.
        settings[parameter] = (sum(ranks.values()), scale)
    linear, parameters = (
        listed_names(
            [
                (_modules(leaf), [name in settings for name in _modules(leaf).names()])
                for leaf in leaves
                if leaf.kind in kinds and paths.is_parameter(leaf.path) == is_parameter
            ],
            bare,
        )
        for kinds, is_parameter, bare in (
            (("kernel", "embedding"), False, names_of_all(config)),
            ((*paths.EXPERTS, "weight"), True, ()),
        )
    )
    config = with_module_settings(config, settings)
    return with_listed_targets(config, linear, target_parameters=parameters, lora_dropout=0.0)


def linear_views(
    layers: Layers, arrays: Mapping[paths.Path, np.ndarray], config: LoraConfig
) -> dict[str, TensorView]:
    """The tensors of these layers, by their names in the file, as views of the adapter's leaves.

    ``arrays`` are the leaves of an adapter by path; ``config`` is the folder's.
    """
    found = {}
    settings = _of_parameters(config, layers)
    for front, layer in layers.items():
        a, b = (arrays[(*layer.leaf.path, kind)] for kind in DELTA)
        if layer.leaf.stack:
            a, b = a[layer.layer], b[layer.layer]
        if layer.expert is not None:
            a, b = a[layer.expert], b[layer.expert]
        ranks, _ = settings[layer.parameter]
        r, start = _rank(config, layer.module), ranks.get(0, 0) if layer.half else 0
        columns = slice(None)
        if layer.half is not None:
            width = b.shape[-1] // 2
            columns = slice(width * layer.half, width * (layer.half + 1))
        pair = a[:, start : start + r].T, b[start : start + r, columns].T
        for kind, view in zip(DELTA, pair, strict=True):
            found[f"{front}.{kind}.weight"] = TensorView(view, view.shape)
    return found


def with_one_scale(
    tensors: Mapping[str, np.ndarray], layers: Layers, config: LoraConfig
) -> dict[str, np.ndarray]:
    """The tensors of a file, the scales that differ within one parameter multiplied into B."""
    scales = {name: scale for name, (_, scale) in _of_parameters(config, layers).items()}
    found = dict(tensors)
    for front, layer in layers.items():
        factor = scaling_of(config, layer.module) / scales[layer.parameter]
        if factor != 1 and (name := f"{front}.lora_B.weight") in found:
            found[name] = factor * found[name]
    return found


def _of_parameters(
    config: LoraConfig, layers: Layers
) -> dict[str, tuple[dict[int | None, int], float]]:
    """Parameter → the largest rank in each half of it, and the scale of its first layer."""
    found: dict[str, tuple[dict[int | None, int], float]] = {}
    for layer in layers.values():
        ranks, _ = found.setdefault(layer.parameter, ({}, scaling_of(config, layer.module)))
        ranks[layer.half] = max(ranks.get(layer.half, 0), _rank(config, layer.module))
    return found


def _rank(config: LoraConfig, module: str) -> int:
    return matching.pattern_value(config.rank_pattern, module, config.r)


def _modules(leaf: paths.Leaf) -> paths.ModuleStack:
    """The names by which a config selects a leaf: a parameter's own, or its module's."""
    return leaf.modules_at(leaf.path if paths.is_parameter(leaf.path) else leaf.path[:-1])
