"""What a run will take, from its compiled step: memory, work, time, disk; no weight is read."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jlora.config import Config
from jlora.distributed import sharding
from jlora.errors import JloraError
from jlora.plan import estimate, flops, hlo, target
from jlora.plan.hardware import Hardware
from jlora.plan.jax_cudnn_shim import jax_checks_capability
from jlora.plan.memory import OUT_OF_MEMORY, Memory, device_bytes, measured, refused_memory
from jlora.plan.target import CompileTarget
from jlora.run.abstract_job import abstract_job
from jlora.run.header import tree_bytes
from jlora.run.job import Job
from jlora.run.step_counts import StepCounts
from jlora.run.train_step import TrainStep


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step does; ``None`` where only the compiled one would say."""

    flops: float
    """On all devices together."""
    flops_attention: float
    """Of these, those of attention's own products."""
    flops_compiled: float | None
    """On one device, as the compiled step has them, without kernels that are called by name."""
    bytes_moved: float | None
    """On one device."""
    collectives: tuple[hlo.Collective, ...] | None
    kernels: tuple[str, ...] = ()
    """Kernels that the compiled step calls by name."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """What is known of a run's rows."""

    length: int
    """Tokens in a row."""
    steps_per_epoch: Callable[[int], int] | None = None
    """Rows in a step → steps in an epoch; None when the rows were not counted."""
    tokens: int = 0
    fill: float = 1.0
    """The part of the rows' tokens that is not padding."""
    note: str = ""
    """Why they were not counted."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """A run, before it is paid for."""

    config: Config
    job: Job
    plan: StepCounts
    rows: Rows
    target: CompileTarget
    hardware: Hardware | None
    limit: target.Memory
    memory: Memory | None
    """None when the compiler refuses the step without saying how much it would take."""
    work: Work | None
    compile_seconds: float | None
    """None when the step was not compiled, and everything is estimated."""
    refused: str = ""
    """What the compiler said when it found the memory too small."""
    state_bytes: int = 0
    """Of what a checkpoint holds."""
    host_traffic: int = 0
    """Bytes that each device sends to the host in a step, and gets back."""

    @property
    def compiled(self) -> bool:
        """Whether the figures are the compiler's."""
        return self.compile_seconds is not None

    @property
    def fits(self) -> bool:
        """Whether the step's peak is within what a device can hold."""
        return not self.refused and self.memory is not None and self.memory.peak <= self.limit.limit

    @property
    def tokens_per_step(self) -> int:
        """Places for tokens in a step's rows, padding included, of all adapters."""
        return self.plan.rows_per_step * self.rows.length * max(1, len(self.job.adapters))

    def seconds(self) -> dict[str, float]:
        """What bounds the time of a step from below: matrix units, memory, links, the host."""
        if self.hardware is None or self.work is None:
            return {}
        bounds = {"compute": self.work.flops / self.job.mesh.size / self.hardware.flops}
        if self.work.bytes_moved is not None:
            bounds["memory"] = self.work.bytes_moved / self.hardware.bandwidth
        if self.work.collectives:
            sent = sum(one.sent for one in self.work.collectives)
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
        """Bytes of a checkpoint, and how many are kept at once."""
        settings = self.config.train
        every = settings.save_steps or self.plan.total_steps
        written = max(1, math.ceil(self.plan.total_steps / every))
        kept = min(written, settings.save_total_limit or written)
        return self.state_bytes, kept if self.counted else settings.save_total_limit or 1


def forecast(
    config: Config,
    tokenizer: Any,
    rows: Rows,
    aim: CompileTarget,
    found: Sequence[Any] | None,
    *,
    whole: bool = True,
) -> Forecast:
    """The forecast of a run.

    Args:
      config: its settings, classes filled in (``with_label_names``).
      tokenizer: the base's, or None where no classes depend on it.
      rows: what is known of its rows.
      aim: what it is to run on.
      found: the devices of ``aim``, or None: then memory is estimated.
      whole: count work, too; else memory only.
    """
    rows = dataclasses.replace(rows, length=min(rows.length, config.data.max_length))
    mesh = sharding.make_mesh(config.mesh, devices=found or stand_in(aim))
    job = abstract_job(
        config=config, tokenizer=tokenizer, mesh=mesh, gpu_capability=aim.gpu_capability
    )
    plan = StepCounts.of(config, job.mesh, rows.steps_per_epoch or (lambda n: 1))
    program = TrainStep.of(job, plan, rows.length)
    memory, work, text, seconds, refused = None, None, "", None, ""
    if found is None:
        memory = estimate.memory(program, plan, rows.length)
    else:
        start = time.perf_counter()
        try:
            with jax_checks_capability(aim.gpu_capability):
                compiled = program.compile()
            memory = measured(program, compiled)
            text = (compiled.as_text() or "") if whole else ""
        except jax.errors.JaxRuntimeError as error:
            if OUT_OF_MEMORY not in str(error):
                raise
            refused = str(error).strip().splitlines()[0]
            memory = refused_memory(program, str(error))
        seconds = time.perf_counter() - start
    if whole:
        counted = flops.of_step(job, plan, rows.length)
        work = _work(counted, text)
    return Forecast(
        config,
        job,
        plan,
        rows,
        aim,
        target.hardware_of(aim, found),
        target.memory(aim, found),
        memory,
        work,
        seconds,
        refused,
        tree_bytes((program.state, program.best)),
        _host_traffic(program, memory, plan),
    )


def _host_traffic(program: TrainStep, memory: Memory | None, plan: StepCounts) -> int:
    """Moments once, activations for every micro-batch; each there and back."""
    if memory is None:
        return 0
    moments = device_bytes(program.state.opt_state, "pinned_host")
    return moments + (memory.host - moments) * plan.accumulation


def stand_in(aim: CompileTarget) -> Sequence[Any]:
    """Devices that make a mesh of the target's size, where nothing is compiled for them."""
    present = jax.devices("cpu")
    if len(present) < aim.count:
        raise JloraError(
            f"{aim.count} devices cannot be stood in for by {len(present)}",
            where=f"--target {aim.name}",
        )
    return present[: aim.count]


def _work(counted: flops.Flops, text: str) -> Work:
    if not text:
        return Work(counted.total, counted.attention, None, None, None)
    done = hlo.work_of(text)
    collectives = tuple(done.exchanges())
    return Work(counted.total, counted.attention, done.flops, done.bytes, collectives, done.kernels)
