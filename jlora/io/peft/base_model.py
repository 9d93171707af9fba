"""``base_model.json``: a fingerprint of the base model that an adapter was trained on.

PEFT's config has only the base's name, under which the weights may change. The file, beside PEFT's
two, has the format of the weights (dtypes, quantization) and their fingerprint. A base in another
format, such as the unquantized original, is compared by the leaves that are never quantized: norms
and biases.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jlora.config import LoraConfig
from jlora.files import storage_errors, write_atomic
from jlora.lora.targets import is_replaced
from jlora.quant.params import is_quantized, quant_config_of, scheme_text
from jlora.tree import paths
from jlora.tree.fingerprint import fingerprint

BASE_FILE = "base_model.json"
NEVER_QUANTIZED = ("scale", "bias")


def base_record(
    params: Any, config: LoraConfig, base_fingerprint: str | None = None
) -> dict[str, str]:
    """``kept``: the formats of the leaves; ``weights`` and ``norms``: fingerprints.

    Leaves that the adapter replaces (``modules_to_save``, trained biases) are not included. All
    processes of a run must call it. ``base_fingerprint`` is ``fingerprint(params)``, if known.
    """
    kept = [
        leaf
        for leaf in paths.leaves(params)
        if not all(is_replaced(config, name, leaf.kind) for name in leaf.modules())
    ]
    leaves = {leaf.path: leaf.value for leaf in kept}
    if base_fingerprint is None or len(leaves) < len(paths.leaves(params)):
        base_fingerprint = fingerprint(paths.nest(leaves))
    # In bfloat16, so that a base loaded in float32 matches the same one loaded in bfloat16.
    small = {
        p: jnp.asarray(x).astype(jnp.bfloat16)
        for p, x in _stacked_together(x for x in kept if x.kind in NEVER_QUANTIZED).items()
    }
    return {
        "kept": "; ".join(sorted({_format_text(leaf) for leaf in leaves.values()})),
        "norms": fingerprint(paths.nest(small)),
        "weights": base_fingerprint,
    }


def _stacked_together(leaves: Iterable[paths.Leaf]) -> dict[paths.Path, Any]:
    """The leaves by path, without runs of layers, which depend on what is quantized."""
    parts: dict[paths.Path, dict[int, Any]] = {}
    for leaf in leaves:
        path = paths.without_run(leaf.path, leaf.stack)
        first = paths.first_layer(leaf.stack) if leaf.stack else 0
        parts.setdefault(path, {})[first] = leaf.value
    return {
        path: jnp.concatenate([runs[first] for first in sorted(runs)])
        if len(runs) > 1
        else next(iter(runs.values()))
        for path, runs in parts.items()
    }


def write_base_record(directory: str | Path, base: dict[str, str]) -> None:
    """Writes ``base_model.json``."""
    write_atomic(Path(directory) / BASE_FILE, json.dumps(base, indent=2, sort_keys=True) + "\n")


def base_mismatch(directory: str | Path, params: Any, config: LoraConfig) -> Iterator[str]:
    """A message if ``params`` are not the base that the folder's adapter was trained on.

    None if the folder has no record, or if ``params`` are abstract.
    """
    file = Path(directory) / BASE_FILE
    if not file.is_file() or not all(isinstance(x, jax.Array) for x in jax.tree.leaves(params)):
        return
    with storage_errors(file):
        wanted = json.loads(file.read_text(encoding="utf-8"))
    base = base_record(params, config)
    same_format = base["kept"] == wanted["kept"]
    key = "weights" if same_format else "norms"
    if base[key] != wanted[key]:
        yield (
            f"the base model has other weights than the one that the adapter was trained on "
            f"({file.name}; delete it to use the adapter anyway)"
        )


def _format_text(leaf: Any) -> str:
    if is_quantized(leaf):
        return scheme_text(quant_config_of(leaf))
    return str(jnp.asarray(leaf).dtype)
