"""The process around a run: devices, processes, signals, the output folder's lock, caches.

jax is imported only where it is used, so that a second run on the same folder is refused at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from jlora.errors import ConfigError, OutputInUseError
from jlora.files import storage_errors

COMPILER = "compile"
"""How the names of threads that compile begin."""

GRACE = 30.0
"""Seconds that a process that failed waits for the others to fail, too."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class RunLock:
    """Holds ``<output_dir>/.lock`` while the block runs; the kernel drops it however a run ends.

    Raises OutputInUseError naming the process that holds it. Only process 0 of a run takes it.
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
            self._file.close()
            self._file = None

    def _in_use(self) -> OutputInUseError:
        assert self._file is not None
        self._file.seek(0)
        holder = self._file.read().strip() or "another process"
        self.__exit__()
        return OutputInUseError(
            f"another run writes to this folder: {holder}",
            where=str(self.path.parent),
            fix="wait for it or stop it, or set another train.output_dir",
        )


class Signals:
    """Notes SIGTERM and SIGINT instead of dying, so that the loop can save and leave.

    The second SIGINT raises KeyboardInterrupt at once. Example::

        with Signals() as signals:
            for step in …:
                …
                if signum := signals.stop(step):
                    save(); raise StoppedError("stopped", signum=signum)

    Under ``jax.distributed`` SIGTERM belongs to JAX's preemption service, which agrees with all
    processes on a step to stop at; SIGINT is passed on to it. ``distributed`` must come first.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._many = False

    def __enter__(self) -> Signals:
        self._many = _process_count() > 1
        for signum in (signal.SIGINT,) if self._many else STOP_SIGNALS:
            self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def stop(self, step: int) -> int | None:
        """The signal to stop for after ``step``, or None. Every process asks at every step.

        With many processes all get an answer at the same step; those that did not get the signal
        themselves are told SIGTERM.
        """
        if not self._many:
            return self.received
        from jax.experimental import multihost_utils

        if multihost_utils.reached_preemption_sync_point(step):
            return self.received or signal.SIGTERM
        return None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.received == signal.SIGINT:
            signal.default_int_handler(signum, frame)
        self.received = signum
        if self._many:
            os.kill(os.getpid(), signal.SIGTERM)


def distributed(environ: Mapping[str, str] = os.environ) -> bool:
    """Joins the other processes of this run, when the environment says that there are others.

    ``JLORA_COORDINATOR`` (host:port), ``JLORA_NUM_PROCESSES`` and ``JLORA_PROCESS_ID`` are given
    together; under SLURM, Open MPI and on TPU slices JAX finds them by itself. To be called before
    anything else touches a device. Returns whether there are others. Raises ConfigError.
    """
    names = ("JLORA_COORDINATOR", "JLORA_NUM_PROCESSES", "JLORA_PROCESS_ID")
    given = [name for name in names if name in environ]
    arguments: dict[str, Any] = {}
    if given:
        arguments = _own_arguments(environ, names, given)
    elif not _launched_by_cluster(environ):
        return False
    import jax

    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the processes of this run did not find each other: {error}",
            where=environ.get("JLORA_COORDINATOR"),
            fix="check that every process was started and reaches the coordinator",
        ) from error
    return jax.process_count() > 1


def _own_arguments(
    environ: Mapping[str, str], names: tuple[str, ...], given: list[str]
) -> dict[str, Any]:
    if missing := [name for name in names if name not in given]:
        raise ConfigError(
            f"{', '.join(given)} set without {', '.join(missing)}",
            where="environment",
            fix="set all three, or none for a run of one process",
        )
    try:
        count, index = int(environ[names[1]]), int(environ[names[2]])
    except ValueError:
        count, index = 0, 0
    if not 0 <= index < count:
        raise ConfigError(
            f"{names[1]}={environ[names[1]]!r} and {names[2]}={environ[names[2]]!r} do not fit",
            where="environment",
            fix="process ids count from 0 to the number of processes less one",
        )
    return {
        "coordinator_address": environ[names[0]],
        "num_processes": count,
        "process_id": index,
    }


def _launched_by_cluster(environ: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX knows started several processes."""
    slurm = environ.get("SLURM_STEP_NUM_TASKS", "1") if "SLURM_PROCID" in environ else "1"
    mpi = environ.get("OMPI_COMM_WORLD_SIZE", "1")
    tpu_hosts = environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return int(slurm) > 1 or int(mpi) > 1 or len(tpu_hosts) > 1


def _process_count() -> int:
    """Without importing jax or starting a backend when nothing else has."""
    if "jax" not in sys.modules:
        return 1
    import jax

    return jax.process_count() if jax.distributed.is_initialized() else 1


def leave(code: int, *, together: bool) -> NoReturn:
    """Ends this process with ``code``; ``together``: all processes end here (done, stopped).

    One that fails alone does not make an ordinary exit: that waits for the others, which wait for
    this one, until JAX gives up after minutes. Where all fail alike none may be so abrupt: the
    others abort, with a trace, when the first is gone. So a failure waits ``GRACE`` seconds for the
    others'. Nor is there a reason to wait for a compiler.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    failed = not together and _process_count() > 1
    if failed:
        _part_from_the_others()
    if failed or any(thread.name.startswith(COMPILER) for thread in threading.enumerate()):
        os._exit(code)
    sys.exit(code)


def _part_from_the_others() -> None:
    """Disconnects once all processes have come here; does nothing when they do not."""
    import jax
    from orbax.checkpoint import multihost

    with contextlib.suppress(jax.errors.JaxRuntimeError):
        multihost.get_barrier_sync_fn()(key="jlora failed", timeout_ms=round(1000 * GRACE))
        jax.distributed.shutdown()


def without_torch() -> None:
    """Keeps torch out of this process, which is to be a command's own.

    Where torch is installed transformers imports it, which takes five seconds, for models that are
    not used here; where it is not, transformers says so on every start.
    """
    sys.modules.setdefault("torch", None)  # pyright: ignore (None: an import of it fails)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def compilation_cache(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Keeps compiled programs in the user's cache folder, so that the next start is quick.

    ``JAX_COMPILATION_CACHE_DIR`` wins, then ``$XDG_CACHE_HOME/jlora``, then ``~/.cache/jlora``. CPU
    programs are kept apart by CPU model: one compiled for another may not run. Returns the folder,
    or None when it cannot be written, which is no error.
    """
    import jax

    chosen = environ.get("JAX_COMPILATION_CACHE_DIR")
    cache = environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME", "~")).expanduser() / ".cache"
    folder = Path(chosen) if chosen else Path(cache) / "jlora" / f"xla-{_cpu_model()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return folder


def _cpu_model() -> str:
    """A short digest of this CPU's features."""
    features = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    return hashlib.sha256(features.encode()).hexdigest()[:8]


def describe_devices() -> str:
    """What the run has, in one line: ``8 × NVIDIA H100 (79.6 GiB each), 2 processes``."""
    import jax

    devices = jax.devices()
    kinds: dict[str, int] = {}
    for device in devices:
        kinds[device.device_kind] = kinds.get(device.device_kind, 0) + 1
    text = ", ".join(f"{count} × {kind}" for kind, count in kinds.items())
    if memory := device_memory():
        text += f" ({memory / 2**30:.1f} GiB each)"
    if jax.process_count() > 1:
        text += f", {jax.process_count()} processes"
    return text


def device_memory() -> int | None:
    """Bytes that one device offers to JAX; None where the backend does not say (CPU)."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
