"""Reads the rows of a source in its format, and reports malformed ones by file and line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jlora.config import SourceConfig
from jlora.data.formats import FORMATS, detect_format
from jlora.data.messages import BadRow
from jlora.data.row_keys import UnknownKeys
from jlora.data.rows import Row
from jlora.data.sources import read_raw_rows
from jlora.errors import DataError

MAX_LISTED = 5
"""How many bad rows an error lists."""


@dataclass
class LoadedRows:
    """The good rows of one source, and an error for each bad row that was skipped."""

    rows: list[Row] = field(default_factory=list)
    bad: list[DataError] = field(default_factory=list)
    unknown_keys: UnknownKeys = field(default_factory=UnknownKeys)
    """Keys that the source's format does not read."""


def load_rows(source: SourceConfig, on_bad_row: str = "error") -> LoadedRows:
    """All rows of a source, in file order.

    Raises:
      DataError: rows are malformed and ``on_bad_row`` is ``error``, or no row is good. The message
        lists the first bad rows and how many there are.
      ConfigError: there is nothing at the source's path.
    """
    convert, result = FORMATS[source.format], LoadedRows()
    for raw in read_raw_rows(source.path, source.split, source.name):
        try:
            if raw.fault:
                raise BadRow(raw.fault)
            row = convert(raw.where, raw.value)
            # Tokenizers refuse such texts with a TypeError that does not say which one of a batch
            # it is.
            if has_lone_surrogate([v for k, v in vars(row).items() if k != "where"]):
                fix = "write the character whole, or remove it"
                raise BadRow("it has half of a character: a lone surrogate, such as \\ud83d", fix)
            result.rows.append(row)
            result.unknown_keys.add(raw.where, source.format, raw.value)
        except (BadRow, RecursionError) as e:
            bad = e if isinstance(e, BadRow) else BadRow("it is nested too deeply")
            other = detect_format(raw.value, source.format)
            fix = bad.fix or (f"it looks like `format: {other}`" if other else "correct the row")
            result.bad.append(DataError(str(bad), where=raw.where, fix=fix))
    if result.bad and (on_bad_row == "error" or not result.rows):
        raise bad_rows_error(result.bad, len(result.rows))
    if not result.rows:
        raise DataError("the split selects no rows", where=source.path, fix="widen `split`")
    return result


def has_lone_surrogate(value: Any) -> bool:
    """Whether some string of a value, or of its parts, has no UTF-8 form."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return True
        return False
    if isinstance(value, dict):
        return any(map(has_lone_surrogate, (*value, *value.values())))
    return isinstance(value, list | tuple) and any(map(has_lone_surrogate, value))


def bad_rows_error(bad: list[DataError], good: int) -> DataError:
    """One error that lists the first bad rows of a source that also has ``good`` good ones."""
    lines = [f"{e.where}: {e.cause}" for e in bad[1:MAX_LISTED]]
    if len(bad) > MAX_LISTED:
        lines.append(f"… and {len(bad) - MAX_LISTED} more")
    count = f"\n{len(bad)} of {len(bad) + good} rows are bad" if len(bad) > 1 else ""
    cause = "\n".join([bad[0].cause, *lines]) + count
    skip = "set data.on_bad_row=skip to skip such rows" if good else None
    fix = "; ".join(f for f in (bad[0].fix, skip) if f)
    return DataError(cause, where=bad[0].where, fix=fix)
