"""``jlora train``'s check that its compiled step fits into the devices' memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jlora import data
from jlora.distributed import processes
from jlora.distributed.mesh import platform_of, times_kernels
from jlora.errors import ConfigError
from jlora.io.hf.read import LoadingCancelledError
from jlora.plan import report, target
from jlora.plan.auto_checkpointing import leaves_margin
from jlora.plan.forecast import Rows, forecast
from jlora.plan.memory import OUT_OF_MEMORY, measured
from jlora.plan.remedies import find_remedies, text
from jlora.run.train_step import TrainStep


class _DoesNotFitError(Exception):
    """The step needs more memory than its devices have."""


@dataclasses.dataclass(frozen=True)
class Compilation:
    """A step that is being compiled in another thread."""

    future: Future[tuple[TrainStep, Any]]

    @property
    def is_done(self) -> bool:
        """Whether it was compiled or failed."""
        return self.future.done()

    def result(self) -> tuple[TrainStep, Any]:
        """Waits for the step that was chosen and its executable; raises what compiling raised."""
        return self.future.result()

    def has_failed(self) -> bool:
        """Whether the step was refused or failed to compile: then loading weights is of no use."""
        return self.future.done() and self.future.exception() is not None


@contextmanager
def compiled_beside(programs: Sequence[TrainStep], rows: data.Prepared) -> Iterator[Compilation]:
    """Compiles a run's step in another thread while the block loads the weights.

    Of several programs (``auto_checkpointing.candidates``) it is the first that fits with a margin,
    or the last. Where the compiler times kernels (``mesh.times_kernels``), the block starts only
    when the step is compiled. The block passes ``Compilation.has_failed`` as ``cancel`` to whatever
    loads. A block that ends in LoadingCancelledError raises the reason instead. A block that runs
    out of memory raises the refusal too, if the step is refused. Other errors do not wait for the
    compiler.

    Raises:
      ConfigError: the step does not fit into the devices' memory; the message says what to change.
        Not with ``train.check_memory: false``.
    """
    pool = ThreadPoolExecutor(1, processes.COMPILER_THREAD)
    job = programs[-1].job
    limit = _common_limit(job.mesh)
    compilation = Compilation(pool.submit(_compile, programs, limit))
    pool.shutdown(wait=False)
    try:
        if times_kernels(job.mesh):
            compilation.result()
        yield compilation
    except (LoadingCancelledError, _DoesNotFitError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and OUT_OF_MEMORY not in str(error):
            raise
        # Memory is also full when weights and the compiler meet: the verdict on the step decides.
        failure = compilation.future.exception()
        if isinstance(failure, _DoesNotFitError):
            known, devices = report.rows_of(job.config, rows), list(job.mesh.devices.flat)
            if refused := refusal(job.config, job.tokenizer, known, devices):
                raise refused from error
        if isinstance(error, LoadingCancelledError) and failure is not None:
            raise failure from error
        raise


def _common_limit(mesh: jax.sharding.Mesh) -> int:
    """Bytes that programs have on a device, the fewest of all processes: they decide alike."""
    limit = target.memory_limit(target.CompileTarget(), list(mesh.devices.flat)).limit
    if jax.process_count() == 1:
        return limit
    # In MiB, since without x64 an integer of JAX has 32 bits.
    return int(multihost_utils.process_allgather(np.int32(limit >> 20)).min()) << 20


def _compile(programs: Sequence[TrainStep], limit: int) -> tuple[TrainStep, Any]:
    """The step of a run and its executable; _DoesNotFitError if it needs too much memory."""
    *others, last = programs
    for program in others:
        try:
            compiled = program.compile()
        except jax.errors.JaxRuntimeError as error:
            if OUT_OF_MEMORY not in str(error):
                raise
            continue
        if leaves_margin(measured(program, compiled).peak, limit, platform_of(program.job.mesh)):
            return program, compiled
    checks = last.job.config.train.check_memory
    try:
        compiled = last.compile()
    except jax.errors.JaxRuntimeError as error:
        if not checks or OUT_OF_MEMORY not in str(error):
            raise
        raise _DoesNotFitError from error
    if checks and measured(last, compiled).peak > limit:
        raise _DoesNotFitError
    return last, compiled


def refusal(config: Any, tokenizer: Any, rows: Rows, devices: list[Any]) -> ConfigError | None:
    """The error for a run that does not fit, with the forecast of every remedy.

    None if the forecast fits: then memory was short only for a while.
    """
    make_forecast = functools.partial(
        forecast,
        tokenizer=tokenizer,
        rows=rows,
        compile_target=target.CompileTarget(),
        devices=devices,
        count_work=False,
    )
    result = make_forecast(config)
    if result.fits:
        return None
    return ConfigError(
        report.verdict(result),
        where=config.model.name_or_path,
        fix=text(find_remedies(result, make_forecast))
        + "\n  train.check_memory=false starts it anyway",
    )
