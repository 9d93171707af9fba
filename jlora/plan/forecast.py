"""Forecasts memory, work, time and disk of a run from its compiled step, without its weights."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax

from jlora.config import Config
from jlora.distributed import sharding
from jlora.errors import JloraError
from jlora.plan import estimate, flops, hlo, target
from jlora.plan.auto_checkpointing import candidates, leaves_margin
from jlora.plan.hardware import Hardware
from jlora.plan.jax_cudnn_shim import jax_checks_capability
from jlora.plan.memory import OUT_OF_MEMORY, Memory, device_bytes, measured, refused_memory
from jlora.plan.target import CompileTarget, MemoryLimit
from jlora.run.abstract_job import abstract_job
from jlora.run.header import tree_bytes
from jlora.run.job import Job
from jlora.run.step_counts import StepCounts
from jlora.run.train_step import TrainStep


@dataclasses.dataclass(frozen=True)
class StepWork:
    """FLOPs, traffic and collectives of a step; None where only the compiled step would tell."""

    flops: float
    """Summed over all devices."""
    flops_attention: float
    """The part of ``flops`` that is attention's QKᵀ and PV."""
    flops_compiled: float | None
    """On one device, counted in the compiled step; without custom kernels."""
    bytes_moved: float | None
    """On one device."""
    collectives: tuple[hlo.Collective, ...] | None
    kernels: tuple[str, ...] = ()
    """Custom kernels (attention, Pallas) that the compiled step calls."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Length and number of a run's rows."""

    length: int
    """Tokens in a row."""
    steps_per_epoch: Callable[[int], int | Fraction] | None = None
    """Rows per step → steps per epoch; None if the rows were not counted."""
    tokens: int = 0
    fill: float = 1.0
    """Fraction of the rows' tokens that is not padding."""
    note: str = ""
    """Why the rows were not counted."""
    documents: int = 1
    """The most documents in a row."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Everything ``jlora plan`` says of a run."""

    config: Config
    job: Job
    plan: StepCounts
    rows: Rows
    target: CompileTarget
    hardware: Hardware | None
    limit: MemoryLimit
    memory: Memory | None
    """None if the compiler refused the step without naming a size."""
    work: StepWork | None
    compile_seconds: float | None
    """None if the step was not compiled, and its memory is estimated."""
    refused: str = ""
    """The compiler's out-of-memory message; empty if it did not refuse the step."""
    state_bytes: int = 0
    """Bytes of a checkpoint."""
    host_traffic: int = 0
    """Bytes per step that each device sends to the host, and as many that it receives."""

    @property
    def compiled(self) -> bool:
        """Whether memory is the compiler's figure, not an estimate."""
        return self.compile_seconds is not None

    @property
    def fits(self) -> bool:
        """Whether the step's peak memory is within the limit of a device."""
        return not self.refused and self.memory is not None and self.memory.peak <= self.limit.limit

    @property
    def tokens_per_step(self) -> int:
        """Tokens in the rows of a step, including padding, summed over all adapters."""
        return self.plan.rows_per_step * self.rows.length * max(1, len(self.job.adapters))

    def seconds(self) -> dict[str, float]:
        """Lower bounds of a step's time, by resource: compute, memory, links, host."""
        if self.hardware is None or self.work is None:
            return {}
        bounds = {"compute": self.work.flops / self.job.mesh.size / self.hardware.flops}
        if self.work.bytes_moved is not None:
            bounds["memory"] = self.work.bytes_moved / self.hardware.bandwidth
        if self.work.collectives:
            sent = sum(collective.sent for collective in self.work.collectives)
            bounds["links"] = sent / self.hardware.link
        if self.host_traffic and self.hardware.host:
            bounds["host"] = self.host_traffic / self.hardware.host
        return bounds

    @property
    def counted(self) -> bool:
        """Whether the number of steps is known."""
        return self.rows.steps_per_epoch is not None or self.config.train.max_steps > 0

    @property
    def checkpoints(self) -> tuple[int, int]:
        """Bytes of a checkpoint, and the number of checkpoints on disk at once."""
        settings = self.config.train
        every = settings.save_steps or self.plan.total_steps
        written = max(1, math.ceil(self.plan.total_steps / every))
        count = min(written, settings.save_total_limit or written)
        return self.state_bytes, count if self.counted else settings.save_total_limit or 1


def forecast(
    config: Config,
    tokenizer: Any,
    rows: Rows,
    compile_target: CompileTarget,
    devices: Sequence[Any] | None,
    *,
    count_work: bool = True,
) -> Forecast:
    """Forecasts a run; with ``gradient_checkpointing: auto``, the way that the run would take.

    Args:
      config: the run's settings, with label names (``with_label_names``).
      tokenizer: the base's tokenizer; may be None unless the task is classification.
      rows: length and number of the run's rows.
      compile_target: the devices the run is for.
      devices: JAX's devices of ``compile_target`` to compile for, or None to estimate memory.
      count_work: also count FLOPs, traffic and collectives; without it only memory is filled in.
    """
    hardware = compile_target.hardware
    platform = hardware.platform if hardware else jax.default_backend()
    attempt = functools.partial(
        _forecast,
        tokenizer=tokenizer,
        rows=rows,
        compile_target=compile_target,
        devices=devices,
        count_work=count_work,
    )
    *others, last = candidates(config, platform)
    for candidate in others:
        found = attempt(candidate)
        peak, limit = found.memory and found.memory.peak, found.limit.limit
        if found.fits and peak and leaves_margin(peak, limit, platform):
            return found
    return attempt(last)


def _forecast(
    config: Config,
    *,
    tokenizer: Any,
    rows: Rows,
    compile_target: CompileTarget,
    devices: Sequence[Any] | None,
    count_work: bool,
) -> Forecast:
    # A remedy may shorten data.max_length after the rows were counted.
    rows = dataclasses.replace(rows, length=min(rows.length, config.data.max_length))
    mesh = sharding.make_mesh(config.mesh, devices=devices or stand_in(compile_target))
    job = abstract_job(
        config=config, tokenizer=tokenizer, mesh=mesh, gpu_capability=compile_target.gpu_capability
    )
    # Without counted rows any number will do: `counted` says that the steps are not known.
    plan = StepCounts.of(config, job.mesh, rows.steps_per_epoch or (lambda n: 1))
    program = TrainStep.of(job, plan, rows.length, rows.documents)
    memory, work, text, seconds, refused = None, None, "", None, ""
    if devices is None:
        memory = estimate.memory(program, plan, rows.length)
    else:
        start = time.perf_counter()
        try:
            with jax_checks_capability(compile_target.gpu_capability):
                compiled = program.compile()
            memory = measured(program, compiled)
            text = (compiled.as_text() or "") if count_work else ""
        except jax.errors.JaxRuntimeError as error:
            if OUT_OF_MEMORY not in str(error):
                raise
            refused = str(error).strip().splitlines()[0]
            memory = refused_memory(program, str(error))
        seconds = time.perf_counter() - start
    if count_work:
        counted = flops.of_step(job, plan, rows.length)
        work = _step_work(counted, text)
    return Forecast(
        config,
        job,
        plan,
        rows,
        compile_target,
        target.hardware_of(compile_target, devices),
        target.memory_limit(compile_target, devices),
        memory,
        work,
        seconds,
        refused,
        tree_bytes((program.state, program.best)),
        _host_traffic(program, memory, plan),
    )


def _host_traffic(program: TrainStep, memory: Memory | None, plan: StepCounts) -> int:
    """Bytes to the host per step: moments once, offloaded activations for every micro-batch."""
    if memory is None:
        return 0
    moments = device_bytes(program.state.opt_state, "pinned_host")
    return moments + (memory.host - moments) * plan.accumulation


def stand_in(compile_target: CompileTarget) -> Sequence[Any]:
    """CPU devices for a mesh of the target's size, if its own devices are unavailable."""
    present = jax.devices("cpu")
    if len(present) < compile_target.count:
        raise JloraError(
            f"{compile_target.count} devices, but only {len(present)} CPU devices for the mesh",
            where=f"--target {compile_target.name}",
        )
    return present[: compile_target.count]


def _step_work(counted: flops.Flops, text: str) -> StepWork:
    if not text:
        return StepWork(counted.total, counted.attention, None, None, None)
    compiled = hlo.work_of(text)
    collectives = tuple(compiled.exchanges())
    return StepWork(
        counted.total,
        counted.attention,
        compiled.flops,
        compiled.bytes,
        collectives,
        compiled.kernels,
    )
