"""Faults of a LoraConfig for a tree: patterns without a match, unsupported combinations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from jlora.config import LoraConfig
from jlora.errors import nearest
from jlora.lora.targets.names import SCORE_HEADS
from jlora.lora.targets.rules import has_token_rows, is_saved, is_target, token_indices
from jlora.lora.targets.target import Target
from jlora.tree import matching, paths

TIED_HEADS = ("lm_head", "embed_out")
"""Names of heads that models without one tie to the embedding."""

NO_HEAD = (
    " does not exist: the output head is tied to the embedding; untie it with model.untie: true, "
    "in Python with model, params = jlora.untie(model, params)"
)

# In peft 0.21, rows of both with the same indices are one tensor and with other indices two; beside
# a head that is trained otherwise, rows of the embedding fail.
FOLLOWS_ROWS = (
    " does not exist: the output head is tied to the embedding, and follows its trained rows; "
    "leave it out"
)


def target_faults(
    config: LoraConfig,
    leaves: Sequence[paths.Leaf],
    candidates: Sequence[Target],
    targets: Sequence[Target],
) -> list[str]:
    """A message for each fault; ``config`` is resolved."""
    modules = sorted({name for leaf in leaves for name in leaf.modules()})
    return [
        *_unmatched(config, modules, candidates, targets),
        *_not_adaptable(config, modules, candidates),
        *_unsupported(config, targets),
        *_many_axes(config, leaves),
        *_tokens(config, leaves, targets),
    ]


def _unmatched(
    config: LoraConfig,
    modules: Sequence[str],
    candidates: Sequence[Target],
    targets: Sequence[Target],
) -> Iterator[str]:
    """A message for every pattern that matches nothing."""
    linear = [n for c in candidates for n in c.names if not c.is_parameter]
    parameters = [n for c in candidates for n in c.names if c.is_parameter]
    adapted = [n for t in targets for n, r in zip(t.names, t.ranks, strict=True) if r]

    def check(key: str, pattern: str, hits: Iterator[bool], names: Sequence[str]) -> Iterator[str]:
        if any(hits):
            return
        has_head = any(n.endswith(paths.OUTPUT_HEADS) for n in modules)
        # Elsewhere, as in exclude_modules, nobody wants the head to be trained.
        trains = key in ("target_modules", "modules_to_save")
        if trains and pattern in TIED_HEADS and not has_head:
            yield f"{key}: {pattern}{NO_HEAD}"
        else:
            yield f"{key}: {pattern!r} matches nothing{_near(pattern, names)}"

    for key in ("target_modules", "exclude_modules"):
        value = getattr(config, key) or ()
        for p in [value] if isinstance(value, str) else value:
            probe = p if isinstance(value, str) else (p,)
            yield from check(key, p, (matching.matches(n, probe) for n in linear), linear)
    for p in config.target_parameters or ():
        hits = (matching.matches(n, (p,)) for n in parameters)
        yield from check("target_parameters", p, hits, parameters)
    for key in ("rank_pattern", "alpha_pattern"):
        for p in getattr(config, key):
            hits = (matching.pattern_value({p: True}, n, False) for n in adapted)
            yield from check(key, p, hits, adapted)
    saved = config.modules_to_save or ()
    if config.task_type == "SEQ_CLS":
        if not any(is_saved(n, head) for n in modules for head in SCORE_HEADS):
            yield "task_type: SEQ_CLS needs a model with a score head (load it with num_labels)"
        # PEFT adds both names to modules_to_save, and a model has one of them at most.
        saved = [m for m in saved if m not in SCORE_HEADS]
    for m in saved:
        yield from check("modules_to_save", m, (is_saved(n, m) for n in modules), modules)
    yield from _missing_layers(config, linear)


def _missing_layers(config: LoraConfig, linear: Sequence[str]) -> Iterator[str]:
    wanted = config.layers_to_transform
    if wanted is None or isinstance(config.target_modules, str):
        return
    numbers = (matching.layer_number(n, config.layers_pattern) for n in linear)
    present = {i for i in numbers if i is not None}
    wanted = (wanted,) if isinstance(wanted, int) else wanted
    if missing := [i for i in wanted if i not in present]:
        last = max(present, default=-1)
        yield f"layers_to_transform: no layer {missing}; layers are numbered 0 to {last}"


def _not_adaptable(
    config: LoraConfig, modules: Sequence[str], candidates: Sequence[Target]
) -> Iterator[str]:
    """A message if a regular expression also matches a module that is not linear, as in PEFT."""
    if not isinstance(config.target_modules, str):
        return
    known = {n for c in candidates for n in c.names if not c.is_parameter}
    for name in modules:
        parts = name.split(".")
        nodes = (".".join(parts[: i + 1]) for i in range(len(parts)))
        for node in nodes:
            if node not in known and is_target(config, node):
                yield f"target_modules: it also matches {node}, which is not a linear layer"
                return


def _unsupported(config: LoraConfig, targets: Sequence[Target]) -> Iterator[str]:
    """A message for every setting that does not apply to one of the targets."""
    parameters = [t for t in targets if t.is_parameter]
    for key in ("lora_dropout", "use_dora", "lora_bias"):
        if parameters and getattr(config, key):
            yield f"{key}: is not possible for experts and routers (target_parameters)"
    kind = config.init_lora_weights
    if parameters and isinstance(kind, str) and kind != "gaussian":
        yield f"init_lora_weights: {kind} is not possible for experts and routers"
    for t in targets:
        decomposed = t.kind == "kernel" and (config.init_splits_base or kind == "loftq")
        if decomposed and max(t.ranks) > min(t.shape):
            yield f"init_lora_weights: {t.names[0]} {t.shape} has no {max(t.ranks)} directions"
    if config.lora_bias and any(t.kind == "embedding" for t in targets):
        yield "lora_bias: is not possible for embeddings"
    for t in targets:
        if config.use_dora and paths.is_part(t.path):
            parts = [o.ranks for o in targets if o.path[:-1] == t.path[:-1]]
            if len(parts) < len(t.widths) or len({tuple(map(bool, ranks)) for ranks in parts}) > 1:
                yield (
                    f"use_dora: {t.path[-1]} is a part of {t.path[-2]}, and PEFT's format has no "
                    f"magnitudes of a part: name {t.path[-2]} or all its parts"
                )
                return


def _many_axes(config: LoraConfig, leaves: Sequence[paths.Leaf]) -> Iterator[str]:
    """A message for a target whose kernel has more than two axes: its inputs are ambiguous."""
    for leaf in leaves:
        named = leaf.kind == "kernel" and any(is_target(config, n) for n in leaf.modules())
        if named and len(leaf.shape) > 2:
            yield (
                f"target_modules: {leaf.module()} has a kernel {leaf.shape}, whose shape does not "
                "say which axes are inputs; load the model with jlora.from_linen or jlora.from_nnx "
                "(name convolutions in their as_matrices, or in exclude_modules)"
            )


def _tokens(
    config: LoraConfig, leaves: Sequence[paths.Leaf], targets: Sequence[Target]
) -> Iterator[str]:
    """A message for rows that an embedding does not have, and for rows that are trained twice."""
    wanted = config.trainable_token_indices
    if not wanted:
        return
    tables = [leaf for leaf in leaves if has_token_rows(leaf)]
    names = [leaf.module() for leaf in tables]
    for end in wanted if isinstance(wanted, Mapping) else ():
        if not any(matching.matches(name, (end,)) for name in names):
            cause = f" is no embedding or output head{_near(end, names)}"
            if end in TIED_HEADS:
                cause = FOLLOWS_ROWS if len(wanted) > 1 else NO_HEAD
            yield f"trainable_token_indices: {end!r}{cause}"
    if not isinstance(wanted, Mapping) and not any(token_indices(config, n) for n in names):
        known = ", ".join(names)
        yield f"trainable_token_indices: name the embedding, as in {{name: [1, 2]}} ({known})"
    adapted = {name for t in targets for name in t.names}
    for leaf in tables:
        name, rows = leaf.module(), token_indices(config, leaf.module())
        tokens = leaf.shape[0] if leaf.kind == "embedding" else leaf.shape[1]
        if missing := [i for i in rows if i >= tokens]:
            yield f"trainable_token_indices: {name} has {tokens} rows, not {missing}"
        if rows and (
            name in adapted or any(is_saved(name, m) for m in config.modules_to_save or ())
        ):
            yield f"trainable_token_indices: {name} is trained already, by LoRA or in full"


def _near(pattern: str, names: Sequence[str]) -> str:
    """The most similar last names, or all of them."""
    short = sorted({n.rsplit(".", 1)[-1] for n in names})
    close = nearest(pattern.rsplit(".", 1)[-1], short) or short
    return f" (there is: {', '.join(close)})" if close else ""
