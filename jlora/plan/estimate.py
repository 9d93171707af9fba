"""Memory of a step without a compiler for its device: shapes exactly, activations by formula."""

from __future__ import annotations

from typing import Any

from jlora.program import Program
from jlora.progress import Plan


def memory(program: Program, plan: Plan, length: int) -> Any:
    """To be done."""
    raise NotImplementedError
