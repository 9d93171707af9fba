"""The adapter: the trainable tree and its config, as one value.

Its leaves have PEFT's names and lie below the node of the module that they change::

    lora_A (…, in, r), lora_B (…, r, out)       W + s·A@B, for kernels, parts of fused ones, and the
                                                matrices of experts: (…, E, in, r), (…, E, r, out)
    lora_embedding_A (…, vocabulary, r),        the same for embeddings
    lora_embedding_B (…, r, dim)
    lora_bias (…, out)                          added to x@A@B (``lora_bias=True``)
    lora_magnitude_vector (…, out)              the norm of every column of W + s·A@B (DoRA)
    trainable_tokens_delta (n, dim)             n rows of an embedding, or n columns of an output
                                                head (``trainable_token_indices``)

A leaf of another name (``bias``, or any leaf of ``modules_to_save``) replaces the base's leaf of
that name. All leaves are float32 (bfloat16 rounds small updates away) and all are trainable. Layers
may differ in rank: stacked leaves have the largest, and the columns that a layer does not use are
zero in both A and B, so that their gradients are exactly zero and they stay zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jlora.config import FrozenMap, LoraConfig
from jlora.lora.targets import rank_of, scaling_of
from jlora.tree import paths

Tree = Any
"""A parameter tree: nested mappings, lists and registered pytrees of arrays; see ``paths``."""

DELTA = ("lora_A", "lora_B")
EMBEDDING_DELTA = ("lora_embedding_A", "lora_embedding_B")
PAIRS: dict[str, str] = dict([DELTA, EMBEDDING_DELTA])
"""The key of an A → that of its B."""
LORA_BIAS = "lora_bias"
MAGNITUDE = "lora_magnitude_vector"
TOKENS = "trainable_tokens_delta"
ADDED = (*DELTA, *EMBEDDING_DELTA, LORA_BIAS, MAGNITUDE, TOKENS)
"""Leaves that are added to a leaf of the base; any other replaces the base's leaf of its name."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """A trainable adapter: ``weights`` as in the module's docstring, and how to apply them.

    PiSSA and OLoRA take their first A and B from the base. ``initial`` holds a copy, and ``attach``
    subtracts its delta, so that the adapter applies to the unchanged base. No gradient reaches
    ``initial``, but weight decay would: give the optimizer ``weights`` only.
    """

    weights: dict[str, Any]
    config: LoraConfig = dataclasses.field(metadata={"static": True})
    """The resolved LoraConfig: ``target_modules`` holds the names that matched."""
    initial: Any = None
    """A tree like ``weights``, or None."""
    parts: Mapping[str, tuple[int, ...]] = dataclasses.field(
        default=FrozenMap(), metadata={"static": True}
    )
    """Fused projection whose parts are adapted → column counts of all parts; default: equal."""


def changed_leaf(path: paths.Path, base_paths: Container[paths.Path]) -> paths.Path:
    """The path of the base's leaf that the adapter's leaf at ``path`` changes.

    The leaf need not exist: it is for the caller to look it up in ``base_paths``.
    """
    if path[-1] not in ADDED:
        return path
    node = paths.whole_projection(path[:-1])
    if node in base_paths:  # an expert matrix has no module: the node is the leaf
        return node
    kernel, embedding = (*node, "kernel"), (*node, "embedding")
    embeds = path[-1] in (*EMBEDDING_DELTA, TOKENS) or kernel not in base_paths
    return embedding if embeds and embedding in base_paths else kernel


def scaling(config: LoraConfig, modules: paths.ModuleStack) -> Float[np.ndarray, "*layers"]:
    """alpha/r (alpha/√r with rsLoRA) of modules: a float32 scalar, or (layers,) if stacked."""
    values = np.array([scaling_of(config, name) for name in modules.names()], np.float32)
    return values if modules.stack else values.reshape(())


def bias_scaling(config: LoraConfig, modules: paths.ModuleStack) -> Float[np.ndarray, "*layers"]:
    """``scaling`` of a ``lora_bias``, and 0 in layers that are not adapted: their bias is fixed.

    A and B need no such zeros: in those layers they are zero themselves.
    """
    scale = scaling(config, modules)
    adapted = np.array([rank_of(config, name) > 0 for name in modules.names()])
    adapted = adapted.reshape(scale.shape)
    return np.where(adapted, scale, np.float32(0.0))
