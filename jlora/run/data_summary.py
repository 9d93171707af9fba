"""What the header, the report and ``evaluate`` say about the rows of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from jlora.data import Prepared
from jlora.ui.console import HeaderTable


def sources_table(rows: Mapping[str, Iterable[Prepared]]) -> HeaderTable:
    """The sources of each role (``train``, ``eval``), with their counts."""
    names = ("role", "source", "format", "rows", "packed rows", "tokens", "target tokens")
    found = []
    for role, parts in rows.items():
        for s in (source for part in parts for source in part.sources):
            shown = f"{role}, {s.adapter}" if s.adapter else role
            found.append(
                (shown, s.path, s.format, s.rows, s.packed_rows, s.tokens, s.target_tokens)
            )
    return HeaderTable(names, found)


def data_warnings(rows: Iterable[Prepared], positions: int) -> list[str]:
    """What may surprise: what preparing them found, and examples beyond the base's positions.

    ``positions`` is the base's ``max_position_embeddings``.
    """
    rows = list(rows)
    said = [text for part in rows for text in part.warnings]
    said += [text for part in rows for text in _too_long(part, positions)]
    # The parts of a multi-adapter run have the warnings of all of them.
    return list(dict.fromkeys(said))


def _too_long(rows: Prepared, positions: int) -> Iterator[str]:
    for source in rows.sources:
        if source.longest > positions:
            yield (
                f"{source.path}: examples of up to {source.longest} tokens, but the base has "
                f"max_position_embeddings={positions}"
            )
