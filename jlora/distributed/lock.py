"""The lock on an output folder, which keeps two runs from writing to it at once."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path

from jlora.errors import OutputInUseError
from jlora.files import storage_errors


class RunLock:
    """Holds an exclusive ``flock`` on ``<output_dir>/.lock`` while the block runs.

    The kernel releases it however the process ends, even by SIGKILL, so no stale lock can stay
    behind. Only process 0 of a run takes it (``enabled``).

    Raises OutputInUseError, naming the process that holds the lock.
    """

    def __init__(self, output_dir: Path, *, enabled: bool = True):
        self.path = Path(output_dir) / ".lock"
        self._enabled = enabled
        self._file = None

    def __enter__(self) -> RunLock:
        if not self._enabled:
            return self
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Not "w", which would erase the holder's name before the lock is taken.
            self._file = self.path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._in_use() from None
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}, {time.ctime()}\n")
            self._file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            # The file stays: after its removal one process could hold a lock on the old file, which
            # it has open, and another one on a new file of this name.
            self._file.close()
            self._file = None

    def _in_use(self) -> OutputInUseError:
        assert self._file is not None
        self._file.seek(0)
        holder = self._file.read().strip() or "another process"
        self.__exit__()
        return OutputInUseError(
            f"another run is writing to this folder: {holder}",
            where=str(self.path.parent),
            fix="wait for it or stop it, or set another train.output_dir",
        )
