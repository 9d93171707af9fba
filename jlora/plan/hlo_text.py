"""Parses the text of optimized HLO: instructions, their types and the sizes of those."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

HLO_DTYPE_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
SHAPE = re.compile(r"\b(pred|[suf]\d+\w*|bf16|c64|c128)\[([\d,]*)\]")
PLACED = re.compile(SHAPE.pattern + r"(?:\{([^}]*)\})?")
"""An array's type and layout; ``S(n)`` in it is a memory space other than the device's HBM."""
INSTRUCTION_NAME = re.compile(r"%([\w.\-]+)")


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    """Attributes; of a constant also its value, of a parameter its number, in parentheses."""
    root: bool


def parse_instruction(line: str) -> Instruction | None:
    """The instruction on a line; None if there is none."""
    match = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if match is None:
        return None
    rest = line[match.end() :]
    end = closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    opcode, paren, rest = rest.partition("(")
    if not paren:
        return None
    end = closing(f"({rest}") - 1
    arguments, rest = rest[:end], rest[end + 1 :]
    if opcode in ("constant", "parameter"):  # the value or the number is no operand
        rest = f"({arguments}){rest}"
    operands = tuple(INSTRUCTION_NAME.findall(arguments))
    return Instruction(match[2], type_, opcode, operands, rest, bool(match[1]))


def closing(text: str) -> int:
    """Index of the parenthesis that closes the first one in ``text``."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    return len(text)


def n_bytes(type_: str) -> float:
    """Bytes of all arrays of a type, which may be a tuple."""
    # The types that are not in the table, such as f8e4m3fn, mostly have 8 bits.
    return sum(
        HLO_DTYPE_BYTES.get(dtype, 1) * math.prod(numbers(dims))
        for dtype, dims in SHAPE.findall(type_)
    )


def in_memory(type_: str) -> float:
    """Bytes of those arrays of a type that are in device memory (HBM)."""
    return sum(
        n_bytes(match[0]) for match in PLACED.finditer(type_) if "S(" not in (match[3] or "")
    )


def numbers(text: str) -> list[int]:
    """All integers in ``text``."""
    return [int(n) for n in re.findall(r"\d+", text)]


def dims_of(type_: str) -> list[int]:
    """Shape of the first array of a type; empty if there is none."""
    match = SHAPE.search(type_)
    return numbers(match[2]) if match else []
