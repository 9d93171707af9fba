"""Which of a machine's GPUs this process should use, by the environment alone.

JAX would give each process under SLURM or Open MPI the one GPU of its local rank: right for a
process a GPU, an eighth of the machine for a process a machine.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping

from jlora.errors import ConfigError

RESTRICTED = "JAX_LOCAL_DEVICE_IDS"
"""JAX's own variable; what it names is used, whatever the launcher says."""


def visible_gpus(environ: Mapping[str, str] = os.environ) -> int:
    """The number of NVIDIA GPUs that this process may use; 0 without any, or if told to use none.

    By ``CUDA_VISIBLE_DEVICES``, else by ``nvidia-smi``.
    """
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return 0
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        try:
            found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return 0
        return len(re.findall(r"^GPU ", found.stdout, re.MULTILINE))
    entries = [entry.strip() for entry in named.split(",")]
    # CUDA ignores what comes after an invalid entry.
    return next((i for i, entry in enumerate(entries) if entry in ("", "-1")), len(entries))


def local_gpus(environ: Mapping[str, str] = os.environ) -> list[int]:
    """Indices of this process's share of the visible GPUs; empty for all of them.

    Raises ConfigError if the machine's processes cannot share its GPUs evenly.
    """
    if named := environ.get(RESTRICTED):
        return [int(index) for index in named.split(",")]
    tasks, index = _tasks_here(environ)
    if tasks == 1:
        return []
    gpus = visible_gpus(environ)
    if not gpus:  # none, or of another maker: as JAX does
        return [index]
    if _has_its_own(environ, gpus):
        return []
    if gpus % tasks:
        raise ConfigError(
            f"{tasks} processes on this machine cannot share its {gpus} GPUs evenly",
            where="environment",
            fix="start one process a machine (it uses all GPUs), or one for each GPU",
        )
    share = gpus // tasks
    return list(range(index * share, (index + 1) * share))


def missing_gpus(used: int, environ: Mapping[str, str] = os.environ) -> str | None:
    """What to say if this process uses fewer GPUs than it should, ``used`` being 0 on a CPU."""
    visible = visible_gpus(environ)
    expected = (len(local_gpus(environ)) or visible) if visible else 0
    if used >= expected:
        return None
    return (
        f"this process uses {used} of {expected} GPUs: check that jax was installed with CUDA "
        "(python -c 'import jax; print(jax.devices())') and that no other process holds them"
    )


def _tasks_here(environ: Mapping[str, str]) -> tuple[int, int]:
    """The number of this run's processes on this machine, and this one's index among them."""
    if "SLURM_LOCALID" in environ:
        # As SLURM abbreviates: "8(x3),4".
        text = environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
        found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
        tasks = [int(count) for count, times in found for _ in range(int(times or 1))]
        node = int(environ.get("SLURM_NODEID", "0"))
        return tasks[node] if node < len(tasks) else 1, int(environ["SLURM_LOCALID"])
    return (
        int(environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")),
        int(environ.get("OMPI_COMM_WORLD_LOCAL_RANK", "0")),
    )


def _has_its_own(environ: Mapping[str, str], gpus: int) -> bool:
    """Whether SLURM has bound GPUs to this task alone: then it sees no others."""
    step = environ.get("SLURM_STEP_GPUS", "")
    bound = "SLURM_GPUS_PER_TASK" in environ or "gpu" in environ.get("SLURM_TRES_PER_TASK", "")
    return bound or (step != "" and gpus < len(step.split(",")))
