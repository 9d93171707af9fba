"""The processes of a run: how they find each other, and how they end.

jax is imported inside the functions: the commands import this module before their settings are
checked, and a mistake in those must not wait for JAX.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any, NoReturn

from jlora.distributed.local_gpus import local_gpus
from jlora.errors import ConfigError

COMPILER_THREAD = "compile"
"""Name prefix of the threads that compile in the background; ``exit_process`` abandons them."""

FAILURE_BARRIER_SECONDS = 30.0
"""How long a process that failed waits for the others to fail in the same way."""


def initialize(environ: Mapping[str, str] = os.environ) -> bool:
    """Joins the other processes of this run, if the environment says that there are any.

    ``JLORA_COORDINATOR`` (host:port), ``JLORA_NUM_PROCESSES`` and ``JLORA_PROCESS_ID`` are given
    together; under SLURM, Open MPI and on TPU slices JAX detects the processes by itself. The
    processes of a machine share its GPUs, a single one uses all. Call this before anything touches
    a device.

    Returns whether there are other processes.

    Raises:
      ConfigError: the variables are incomplete or wrong, the processes cannot connect, or those of
        this machine cannot share its GPUs.
    """
    names = ("JLORA_COORDINATOR", "JLORA_NUM_PROCESSES", "JLORA_PROCESS_ID")
    given = [name for name in names if name in environ]
    arguments: dict[str, Any] = {}
    if given:
        arguments = _initialize_arguments(environ, names, given)
    elif not _launched_by_cluster(environ):
        return False
    # An empty list is JAX's way to leave all devices visible, whatever the cluster's local rank.
    arguments["local_device_ids"] = local_gpus(environ)
    import jax

    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the processes of this run did not find each other: {error}",
            where=environ.get("JLORA_COORDINATOR"),
            fix="check that every process was started and can reach the coordinator",
        ) from error
    return jax.process_count() > 1


def process_count() -> int:
    """The number of processes, without importing jax or starting a backend only to ask."""
    if "jax" not in sys.modules:
        return 1
    import jax

    return jax.process_count() if jax.distributed.is_initialized() else 1


def exit_process(code: int, *, all_exit: bool) -> NoReturn:
    """Ends this process with ``code``.

    With several processes, neither of the two obvious ways to end a failed one works. An ordinary
    exit waits in JAX's shutdown barrier for the others, which wait for this one in a collective,
    for minutes. An immediate one is wrong where all processes fail for the same reason (bad rows, a
    step that does not fit), though not at the same moment: when the coordinator has gone, JAX
    aborts the rest with a stack trace and another exit code. So a failed process first waits for
    the others in a barrier, for at most ``FAILURE_BARRIER_SECONDS``.

    A compilation still running in the background is abandoned: nobody needs its result.

    Args:
      code: the exit code.
      all_exit: every process ends here (the run is done or was stopped); no barrier is needed.
    """
    # os._exit does not flush.
    sys.stdout.flush()
    sys.stderr.flush()
    failed = not all_exit and process_count() > 1
    if failed:
        _disconnect_together()
    if failed or any(t.name.startswith(COMPILER_THREAD) for t in threading.enumerate()):
        os._exit(code)
    sys.exit(code)


def _disconnect_together() -> None:
    """Disconnects from JAX's coordinator if all processes get here within the time limit."""
    import jax
    from orbax.checkpoint import multihost

    # The barrier raises when the time is up: then this process failed alone, and leaves alone.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        timeout_ms = round(1000 * FAILURE_BARRIER_SECONDS)
        # orbax's, since JAX's sync_global_devices has no time limit.
        multihost.get_barrier_sync_fn()(key="jlora failed", timeout_ms=timeout_ms)
        jax.distributed.shutdown()


def _initialize_arguments(
    environ: Mapping[str, str], names: tuple[str, ...], given: list[str]
) -> dict[str, Any]:
    """The arguments of ``jax.distributed.initialize`` from our three variables."""
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
            fix="process ids run from 0 to the number of processes minus one",
        )
    return {
        "coordinator_address": environ[names[0]],
        "num_processes": count,
        "process_id": index,
    }


def _launched_by_cluster(environ: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX detects by itself started several processes."""
    slurm = environ.get("SLURM_STEP_NUM_TASKS", "1") if "SLURM_PROCID" in environ else "1"
    mpi = environ.get("OMPI_COMM_WORLD_SIZE", "1")
    tpu_hosts = environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return int(slurm) > 1 or int(mpi) > 1 or len(tpu_hosts) > 1
