"""The errors that jlora reports, and the exit codes of its commands.

Every message has a place (file, line, key, leaf), a cause and a remedy. Commands print it as one
block and exit; a traceback appears only with ``--debug``.
"""

from __future__ import annotations

import difflib
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
    """The options most similar to ``word``, best first; empty if none is close."""
    return difflib.get_close_matches(word, list(dict.fromkeys(options)), n=n, cutoff=0.5)


def did_you_mean(word: str, options: Iterable[str]) -> str | None:
    """A remedy naming the nearest options (one, if it is nearly the word), or None."""
    options = list(options)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.85) or nearest(word, options)
    return f"did you mean {' or '.join(repr(c) for c in close)}?" if close else None
