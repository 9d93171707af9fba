"""Which base model an adapter was trained on: ``base_model.json`` beside PEFT's two files.

PEFT's config names the base; a name says nothing of what lies under it. The file holds how the
weights were kept in memory and a fingerprint of them. A base that is kept otherwise, such as the
original of a packed one, is compared by the leaves that packing leaves alone: norms and biases.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
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
SMALL = ("scale", "bias")


def record(params: Any, config: LoraConfig, base_fingerprint: str | None = None) -> dict[str, str]:
    """``kept``, how the leaves are kept; ``weights`` and ``norms``, fingerprints of all and some.

    Leaves that the adapter replaces as a whole are left out: they are the adapter's. All processes
    of a run must call it. ``base_fingerprint`` is ``fingerprint(params)`` where that is known.
    """
    leaves = {
        leaf.path: leaf.value
        for leaf in paths.leaves(params)
        if not all(is_replaced(config, name, leaf.kind) for name in leaf.modules())
    }
    if base_fingerprint is None or len(leaves) < len(paths.leaves(params)):
        base_fingerprint = fingerprint(paths.nest(leaves))
    small = {p: jnp.asarray(x).astype(jnp.bfloat16) for p, x in leaves.items() if p[-1] in SMALL}
    return {
        "kept": "; ".join(sorted({_kept(leaf) for leaf in leaves.values()})),
        "norms": fingerprint(paths.nest(small)),
        "weights": base_fingerprint,
    }


def write_base_record(directory: str | Path, base: dict[str, str]) -> None:
    """Writes ``base_model.json``."""
    write_atomic(Path(directory) / BASE_FILE, json.dumps(base, indent=2, sort_keys=True) + "\n")


def differences(directory: str | Path, params: Any, config: LoraConfig) -> Iterator[str]:
    """A message if ``params`` are not those that the folder's adapter was trained on.

    Nothing where the folder does not say, or where ``params`` are shapes.
    """
    file = Path(directory) / BASE_FILE
    if not file.is_file() or not all(isinstance(x, jax.Array) for x in jax.tree.leaves(params)):
        return
    with storage_errors(file):
        wanted = json.loads(file.read_text(encoding="utf-8"))
    base = record(params, config)
    alike = base["kept"] == wanted["kept"]
    if base["weights" if alike else "norms"] != wanted["weights" if alike else "norms"]:
        yield (
            f"the base model has other weights than the one that the adapter was trained on "
            f"({file.name}; delete it to use the adapter all the same)"
        )


def _kept(leaf: Any) -> str:
    if is_quantized(leaf):
        return scheme_text(quant_config_of(leaf))
    return str(jnp.asarray(leaf).dtype)
