"""PEFT's rules for matching module names against patterns.

They follow ``peft.tuners.tuners_utils.check_target_module_exists`` and
``peft.utils.other.get_pattern_key`` of peft 0.21.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


def matches(name: str, pattern: str | Sequence[str]) -> bool:
    """A string is a full regular expression; a sequence holds names or ``.name`` suffixes."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == p or name.endswith(f".{p}") for p in pattern)


def layer_number(name: str, layers_pattern: str | Sequence[str] | None = None) -> int | None:
    """The first number in a module's name, or the one that follows ``layers_pattern``."""
    if not layers_pattern:
        expressions = [r".*?\.[^.]*\.(\d+)\."]
    else:
        patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
        expressions = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns]
    for expression in expressions:
        if match := re.match(expression, name):
            return int(match.group(1))
    return None


def pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern, in order, that ends ``name`` at a dot; else ``default``."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def pattern_table(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """The patterns by which ``pattern_value`` gives each name its value: its inverse.

    They are last names where one value holds for all of the name, else full names, so that no two
    match one module: a table's order is lost in a file with sorted keys.
    """
    by_last: dict[str, set[Any]] = {}
    for name, value in values.items():
        by_last.setdefault(name.rpartition(".")[2], set()).add(value)
    table = {}
    for name, value in values.items():
        last = name.rpartition(".")[2]
        if value != default:
            table[last if len(by_last[last]) == 1 else name] = value
    return table
