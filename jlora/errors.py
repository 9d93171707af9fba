"""The errors that jlora reports, and the exit codes of its commands.

Every message has a place (file, line, key, leaf), a cause and a remedy. Commands print it as one
block and exit; a traceback appears only with ``--debug``.
"""

from __future__ import annotations

from collections.abc import Iterable


class JloraError(Exception):
    """An error that a user can act on.

    Args:
      cause: what is wrong, in one sentence.
      where: the place: a file with its line, a config key, a tensor or leaf name.
      fix: what to do about it.
    """

    exit_code = 1

    def __init__(self, cause: str, *, where: str | None = None, fix: str | None = None):
        self.cause, self.where, self.fix = cause, where, fix
        super().__init__(self.__str__())

    def __str__(self) -> str:
        text = f"{self.where}: {self.cause}" if self.where else self.cause
        return f"{text}\n  fix: {self.fix}" if self.fix else text


class ConfigError(JloraError):
    """A setting is missing, unknown, of the wrong type, or contradicts another."""

    exit_code = 2


class DataError(JloraError):
    """A row, a model folder, an adapter or a checkpoint is malformed or damaged."""

    exit_code = 65


class DivergedError(JloraError):
    """The loss is not finite any more, or part of the adapter gets no gradient."""

    exit_code = 70


class OutputInUseError(JloraError):
    """Another run is writing to the output folder, or the folder has another run's files."""

    exit_code = 73


class StorageError(JloraError):
    """The disk is full or a file cannot be read or written."""

    exit_code = 74


class StoppedError(JloraError):
    """A signal ended the run after its state was saved; the exit code is 128 + the signal."""

    def __init__(self, cause: str, *, signum: int, fix: str | None = None):
        super().__init__(cause, fix=fix)
        self.exit_code = 128 + signum


def nearest(word: str, options: Iterable[str], n: int = 3) -> list[str]:
    """The options that ``word`` may be a misspelling of, nearest first, at most ``n``.

    One edit is allowed in names of two to six letters, and one more for each further four. Where
    nothing is as near, options that have all of the word's parts are (``epochs``:
    ``num_train_epochs``). Empty if there are none.
    """
    options, plain = list(dict.fromkeys(options)), _plain(word)
    near = [option for _, option in _near(plain, options)]
    if not near and len(plain) > 2:
        parts = set(plain.split("_"))
        near = [option for option in options if parts <= set(_plain(option).split("_"))]
    return near[:n]


def did_you_mean(word: str, options: Iterable[str]) -> str | None:
    """A remedy that names the nearest option, or several that are equally near; or None."""
    close = nearest(word, options)
    edits = {option: distance for distance, option in _near(_plain(word), close)}
    close = [option for option in close if edits.get(option) == edits.get(close[0])]
    return f"did you mean {' or '.join(repr(c) for c in close)}?" if close else None


def _near(plain: str, options: Iterable[str]) -> list[tuple[int, str]]:
    """(edits, option) of the options that are few edits away from a plain word, nearest first."""
    edits = [(_edits(*_without_common_ends(plain, _plain(option))), option) for option in options]
    # Not by the option: those that are equally near stay in their order.
    return sorted(((n, option) for n, option in edits if n is not None), key=lambda pair: pair[0])


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")


def _without_common_ends(a: str, b: str) -> tuple[str, str]:
    """Two names without the dotted parts that they begin or end with in common (``.jsonl``)."""
    first, second = a.split("."), b.split(".")
    while len(first) > 1 < len(second) and first[0] == second[0]:
        first, second = first[1:], second[1:]
    while len(first) > 1 < len(second) and first[-1] == second[-1]:
        first, second = first[:-1], second[:-1]
    return ".".join(first), ".".join(second)


def _edits(a: str, b: str) -> int | None:
    """The number of edits between two words, transpositions included; None if there are many.

    The distance is that of optimal string alignment.
    """
    length = max(len(a), len(b))
    limit = min(max(1, (length + 1) // 4), length // 2)
    if abs(len(a) - len(b)) > limit:
        return None
    before, last = [], list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                row[-1] = min(row[-1], before[j - 2] + 1)
        before, last = last, row
    return last[-1] if last[-1] <= limit else None
