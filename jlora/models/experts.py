"""Sparse mixtures of experts: a router picks a few MLPs for every token (arXiv 2101.03961).

Parameters that transformers keeps as bare tensors have its names and its layout here too::

    gate.weight (E, D)   experts.gate_up_proj (E, 2 · inner, D)   experts.down_proj (E, D, inner)
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Experts:
    """The sizes of a mixture and how it routes."""

    number: int
    per_token: int
    intermediate_size: int
