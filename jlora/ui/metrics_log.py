"""``metrics.jsonl``, the log of a run: one JSON object per line, each with its ``step``.

Lines are appended in the order of events and flushed one by one. A resumed run first drops the
lines written after its checkpoint, so that the log of an interrupted run equals that of an
uninterrupted one. nan and inf, which JSON does not have, are written as null.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from jlora.errors import DataError
from jlora.files import storage_errors, write_atomic


class MetricsLog:
    """Appends to ``path``; with ``enabled=False`` (in processes other than 0) it does nothing.

    Example::

        with MetricsLog(output_dir / "metrics.jsonl") as log:
            log.truncate_to(13)             # lines at the time of the checkpoint
            log.write(130, loss=1.25, learning_rate=1e-4)
    """

    def __init__(self, path: str | os.PathLike[str], *, enabled: bool = True):
        self.path = Path(path)
        self._enabled = enabled
        self._file = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, **values: Any) -> None:
        """Appends one line: ``step``, then ``values`` (numbers, 0-d arrays, strings, bools)."""
        if not self._enabled:
            return
        line = {"step": step} | {key: _plain(value) for key, value in values.items()}
        with storage_errors(self.path):
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()

    def truncate_to(self, lines: int) -> int:
        """Keeps the first ``lines`` lines; an incomplete last line is dropped.

        Returns how many are there now: fewer than ``lines`` if some, or the file, were deleted.
        """
        self.close()
        if not self._enabled:
            return lines
        with storage_errors(self.path):
            text = self.path.read_bytes() if self.path.exists() else b""
        kept = _lines(self.path, text)[:lines]
        content = b"".join(raw + b"\n" for raw, _ in kept)
        if content != text or (lines and not self.path.exists()):
            write_atomic(self.path, content)
        return len(kept)

    def sync(self) -> None:
        """Forces the lines to disk; to be called before a checkpoint that records their number."""
        if self._file is not None:
            with storage_errors(self.path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; a later ``write`` opens it again."""
        if self._file is not None:
            with storage_errors(self.path):
                self._file.close()
            self._file = None


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a log as dicts, null as None; an incomplete last line is left out.

    Raises DataError naming the line that is not a JSON object with a ``step``.
    """
    with storage_errors(path):
        text = Path(path).read_bytes()
    return [value for _, value in _lines(Path(path), text)]


def _lines(path: Path, text: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """The complete lines with their values; text after the last newline is incomplete."""
    result = []
    for number, raw in enumerate(text.split(b"\n")[:-1], start=1):
        try:
            value = json.loads(raw)
            if not isinstance(value, dict) or not isinstance(value.get("step"), int):
                raise ValueError("no step")
        except ValueError:
            raise DataError(
                "not a JSON object with a step",
                where=f"{path}:{number}",
                fix="delete this line, or start again in a new output_dir",
            ) from None
        result.append((raw, value))
    return result


def _plain(value: Any) -> Any:
    """A value that JSON can hold: 0-d arrays become numbers, nan and inf become None."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
