"""Files written whole or not at all, and disk errors that say what to do."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jlora.errors import StorageError

FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_WORDS = ("no space left on device", "disk quota exceeded")


@contextmanager
def storage_errors(where: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an OSError inside the block into a StorageError that names ``where``."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, where) from error


def storage_error(error: Exception, where: str | os.PathLike[str]) -> StorageError:
    """The StorageError for ``error``, with the remedy that fits it."""
    if is_disk_full(error):
        cause, fix = "the disk is full", "free some space, then run the same command again"
    elif isinstance(error, PermissionError):
        cause, fix = "permission denied", "choose a folder that you may write to"
    else:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        cause, fix = f"cannot be read or written ({reason})", "check the path and the disk"
    return StorageError(cause, where=os.fspath(where), fix=fix)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether ``error`` or one of its causes says that the disk or the quota is full.

    Libraries that write from C++ raise ValueError or RuntimeError with the system's words.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(word in str(error).lower() for word in FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def write_atomic(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Replaces ``path`` by ``content`` (text as UTF-8): a reader sees the old file or the new one.

    The content reaches the disk before the name does (fsync, then rename). Raises StorageError;
    the old file then stays as it was, and no temporary file is left.
    """
    target = Path(path)
    data = content.encode() if isinstance(content, str) else content
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                os.fchmod(file.fileno(), 0o666 & ~_umask())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync_folder(target.parent)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Makes the names in ``folder`` durable; file systems that cannot are left alone."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
