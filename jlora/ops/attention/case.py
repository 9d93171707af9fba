"""The properties of an attention call that decide which backend can compute it."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

UNKNOWN_DOCUMENTS = 2**31 - 1
"""The number of documents in a row where nothing is known of it but that int32 holds it."""


def most_documents(segment_ids: Array | np.ndarray | None) -> int:
    """The most documents that a row may have, by the type of the segment ids.

    The number decides between kernels, so it has to be known when a program is traced; values are
    not, types are. Without ids a row is one document, and with booleans one document (True) and
    padding after it (False); uint8 has at most 255; other types may have any number.
    """
    if segment_ids is None or segment_ids.dtype == jnp.bool_:
        return 1
    return 255 if segment_ids.dtype == jnp.uint8 else UNKNOWN_DOCUMENTS


@dataclasses.dataclass(frozen=True)
class Case:
    """The static properties of a call: known when it is traced."""

    dtype: str
    length: int
    """Tokens per row."""
    head_dim: int
    documents: int = 1
    """The most documents in a row, see ``most_documents``."""
    traced_window: bool = False
    """Whether the window is a traced value, as when layers with different windows are scanned."""
    softcap: bool = False
    sinks: bool = False
    capability: tuple[int, int] | None = None
    """The compute capability of the GPU that the program is for; None without a GPU."""
    gpu_is_absent: bool = False
    """Whether that GPU is not in this machine: kernels cannot be tried on it and are trusted."""
