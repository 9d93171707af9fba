"""Reads the rows of a source in its format, and reports malformed ones by file and line."""

from __future__ import annotations

from dataclasses import dataclass, field

from jlora.config import SourceConfig
from jlora.data.formats import FORMATS, BadRow, detect_format
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
            result.rows.append(convert(raw.where, raw.value))
        except BadRow as e:
            other = detect_format(raw.value, source.format)
            fix = e.fix or (f"it looks like `format: {other}`" if other else None)
            result.bad.append(DataError(str(e), where=raw.where, fix=fix))
    if result.bad and (on_bad_row == "error" or not result.rows):
        raise bad_rows_error(result.bad, len(result.rows))
    if not result.rows:
        raise DataError("the split selects no rows", where=source.path, fix="widen `split`")
    return result


def bad_rows_error(bad: list[DataError], good: int) -> DataError:
    """One error that lists the first bad rows of a source that also has ``good`` good ones."""
    lines = [f"{e.where}: {e.cause}" for e in bad[1:MAX_LISTED]]
    if len(bad) > MAX_LISTED:
        lines.append(f"… and {len(bad) - MAX_LISTED} more")
    count = f"\n{len(bad)} of {len(bad) + good} rows are bad" if len(bad) > 1 else ""
    cause = "\n".join([bad[0].cause, *lines]) + count
    skip = "set data.on_bad_row=skip to skip such rows" if good else None
    fix = "; ".join(f for f in (bad[0].fix, skip) if f)
    return DataError(cause, where=bad[0].where, fix=fix or "check the source's `format`")
