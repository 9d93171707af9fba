"""Files written whole or not at all, and disk errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jlora.errors import ConfigError, JloraError, StorageError

CAUSES = {
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: (
        "the disk is full (its quota is used up)",
        "free some space or ask for a larger quota",
    ),
    errno.EFBIG: (
        "the file would be larger than the system allows",
        "raise the limit (ulimit -f) or choose a file system without one",
    ),
}
"""Errors of a write that was cut short for lack of room → cause and remedy."""

# TensorStore, for instance, turns EFBIG into OUT_OF_RANGE, with [os_error_code='27'] in the text.
WRAPPED = re.compile(r"\b(?:os[ _]error(?:_code)?|errno)[ :='\"]*(\d+)", re.IGNORECASE)
"""How Rust, TensorStore (C++) and Python write a system error into the text of their own error."""

PARTIAL = ".partial-"
"""Prefix of the temporary folders; one that is left is of a process that was killed."""

STORAGE = (
    *CAUSES, errno.EACCES, errno.EIO, errno.EMFILE, errno.ENAMETOOLONG, errno.ENFILE, errno.EPERM,
    errno.EROFS, errno.ESTALE,
)  # fmt: skip
"""System errors that are looked for behind the errors of libraries."""

WRAPPED_ONLY = (errno.ENOENT, errno.ENOTDIR)
"""Those that are looked for as a number in a library's own text: a folder was removed meanwhile.

An error of Python's own for a missing file may be handled and followed by an unrelated one.
"""


@contextmanager
def storage_errors(where: str | os.PathLike[str], needed: int | None = None) -> Iterator[None]:
    """Turns a system error inside the block into a StorageError, see ``storage_error``.

    Libraries that write from C++ or Rust wrap it in errors of their own: those are found, too.
    """
    try:
        yield
    except JloraError:
        raise
    except Exception as error:
        if not is_storage_error(error):
            raise
        raise storage_error(error, where, needed) from error


def storage_error(
    error: Exception, where: str | os.PathLike[str], needed: int | None = None
) -> StorageError:
    """The StorageError for ``error``, with the remedy that fits it.

    ``needed`` is the number of bytes that were to be written. If they did not fit, the message
    gives it with the bytes that are free.
    """
    code = system_errno(error)
    if code in CAUSES:
        cause, fix = CAUSES[code]
        cause, fix = cause + _room(where, needed), f"{fix}, then run the same command again"
    elif code in (errno.EACCES, errno.EPERM):
        cause, fix = "permission denied", "choose a folder that you may write to"
    else:
        cause = f"cannot be read or written ({os.strerror(code) if code else error})"
        fix = "check the path and the disk"
    return StorageError(cause, where=os.fspath(where), fix=fix)


def _room(where: str | os.PathLike[str], needed: int | None) -> str:
    """Bytes needed and free, as far as they are known."""
    existing = next((p for p in (Path(where), *Path(where).parents) if p.exists()), None)
    free = None if existing is None else shutil.disk_usage(existing).free
    figures = {"needed": needed, "free": free}
    known = [
        f"{size / 2**20:,.1f} MiB {word}" for word, size in figures.items() if size is not None
    ]
    return f": {', '.join(known)}" if known else ""


def is_storage_error(error: BaseException) -> bool:
    """Whether ``error`` is the system's, or a library's that wraps one of ``STORAGE``."""
    return isinstance(error, OSError) or system_errno(error) is not None


def system_errno(error: BaseException | None) -> int | None:
    """The number of a system error; of another error, that of the ``STORAGE`` one behind it.

    It is looked for in the error's causes and in their texts. None if there is none.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    while error is not None:
        if isinstance(error, BaseExceptionGroup):
            return next(filter(None, map(system_errno, error.exceptions)), None)
        text = str(error)
        wrapped = [int(code) for code in WRAPPED.findall(text)]
        codes = {getattr(error, "errno", None), *wrapped}
        for code in STORAGE:
            if code in codes or os.strerror(code).lower() in text.lower():
                return code
        if not isinstance(error, OSError):
            for code in WRAPPED_ONLY:
                if code in wrapped:
                    return code
        # Not the context of an error that was raised `from None`.
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def write_atomic(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Replaces ``path`` by ``content`` (text as UTF-8): a reader sees the old file or the new one.

    The content reaches the disk before the name does (fsync, then rename). Raises StorageError;
    the old file then stays as it was, and no temporary file is left.
    """
    target = Path(path)
    data = content.encode() if isinstance(content, str) else content
    with staged_folder(target.parent) as folder, storage_errors(target, len(data)):
        (folder / target.name).write_bytes(data)


@contextmanager
def staged_folder(
    folder: str | os.PathLike[str], last: str = "", stale: re.Pattern[str] | None = None
) -> Iterator[Path]:
    """A temporary folder in ``folder``, whose files are moved up when the block ends without error.

    They reach the disk before their names do, have the mode that the umask gives to new files, and
    replace files of the same names (links too, not what those lead to). After an error ``folder``
    is as it was.

    Args:
      folder: created if it does not exist.
      last: the name that makes the folder whole; it is moved after the others.
      stale: files of an earlier save, which are removed unless they were written again.

    Raises StorageError; errors in the block name the file in ``folder``, not the temporary one.
    """
    target = Path(folder)
    with storage_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=target))
    try:
        with storage_errors(target):
            yield temporary
            _move_up(temporary, target, last, stale)
    except JloraError as error:
        if error.where:
            error.where = error.where.replace(str(temporary), str(target))
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_up(temporary: Path, target: Path, last: str, stale: re.Pattern[str] | None) -> None:
    # The mode of a new file shows the umask. os.umask would have to set it to read it, for other
    # threads as well.
    probe = temporary / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    files = [file for file in temporary.rglob("*") if file.is_file()]
    files.sort(key=lambda file: (file.name == last, file))
    places = [target / file.relative_to(temporary) for file in files]
    for file, place in zip(files, places, strict=True):
        with storage_errors(place):
            # safetensors' save_file leaves 0600: it renames a temporary file of its own.
            file.chmod(mode)
            with open(file, "rb") as written:
                os.fsync(written.fileno())
    for file, place in zip(files, places, strict=True):
        with storage_errors(place):
            place.parent.mkdir(exist_ok=True)
            os.replace(file, place)
    names = {file.name for file in files}
    for file in target.iterdir():
        if stale and stale.fullmatch(file.name) and file.name not in names:
            file.unlink()
    sync_folder(target)


def check_output(
    key: str, out: str | os.PathLike[str], inputs: Mapping[str, object], above: bool = True
) -> None:
    """ConfigError if ``out``, the folder that a setting names, is one that is read.

    Writing there would overwrite the input. Links are followed.

    Args:
      key: the setting.
      out: the folder to write to; it need not exist.
      inputs: what is read → its path; None and what is no local path, such as a hub name, are
        skipped.
      above: refuse a folder that contains an input, too.
    """
    resolved = Path(out).resolve()
    for what, path in inputs.items():
        place = None if path is None else Path(str(path)).expanduser()
        if place is None or not place.exists():
            continue
        real = place.resolve()
        if resolved == real or (above and resolved in real.parents):
            relation = "is" if resolved == real else "contains"
            raise ConfigError(
                f"{relation} {what} ({real}), which would be overwritten",
                where=key,
                fix="name another folder",
            )


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Makes the names in ``folder`` durable; file systems that cannot are left alone."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    with contextlib.suppress(OSError):
        os.fsync(handle)
    os.close(handle)
