"""The properties of an attention call that decide which backend can compute it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """The static properties of a call: known when it is traced."""

    dtype: str
    length: int
    """Tokens per row."""
    head_dim: int
    segments: bool = False
    """Whether the call has segment ids: rows may be padded or hold several documents."""
    traced_window: bool = False
    """Whether the window is a traced value, as when layers with different windows are scanned."""
    softcap: bool = False
    sinks: bool = False
    capability: tuple[int, int] | None = None
    """The compute capability of the GPU that the program is for; None without a GPU."""
    gpu_is_absent: bool = False
    """Whether that GPU is not in this machine: kernels cannot be tried on it and are trusted."""
