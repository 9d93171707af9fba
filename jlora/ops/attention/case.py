"""What a choice between backends depends on."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """What is known of a call when it is traced."""

    dtype: str
    length: int
    """Tokens in a row."""
    head_dim: int
    segments: bool = False
    """There are segment ids: rows may be padded or hold several documents."""
    traced_window: bool = False
    """The window is a value of the program, as where layers with different ones are scanned."""
    softcap: bool = False
    sinks: bool = False
    capability: tuple[int, int] | None = None
    """The compute capability of the GPU that is here; None where none is."""
