"""``jlora train``'s check that its compiled step fits into the devices' memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax

from jlora import data
from jlora.distributed import processes
from jlora.distributed.mesh import times_kernels
from jlora.errors import ConfigError
from jlora.io.hf.read import LoadingCancelledError
from jlora.plan import report, target
from jlora.plan.forecast import Rows, forecast
from jlora.plan.memory import OUT_OF_MEMORY, measured
from jlora.plan.remedies import find_remedies, text
from jlora.run.train_step import TrainStep


class _DoesNotFitError(Exception):
    """The step needs more memory than its devices have."""


@dataclasses.dataclass(frozen=True)
class Compilation:
    """A step that is being compiled in another thread."""

    future: Future[Any]

    @property
    def is_done(self) -> bool:
        """Whether it was compiled or failed."""
        return self.future.done()

    def result(self) -> Any:
        """Waits for the executable; raises what the compilation raised."""
        return self.future.result()

    def has_failed(self) -> bool:
        """Whether the step was refused or failed to compile: then loading weights is of no use."""
        return self.future.done() and self.future.exception() is not None


@contextmanager
def compiled_beside(program: TrainStep, rows: data.Prepared) -> Iterator[Compilation]:
    """Compiles a run's step in another thread while the block loads the weights.

    Where the compiler times kernels (``mesh.times_kernels``), the block starts only when the step
    is compiled. The block passes ``Compilation.has_failed`` as ``cancel`` to whatever loads. A
    block that ends in LoadingCancelledError raises the reason instead. A block that runs out of
    memory raises the refusal too, if the step is refused. Other errors do not wait for the
    compiler.

    Raises:
      ConfigError: the step does not fit into the devices' memory; the message says what to change.
        Not with ``train.check_memory: false``.
    """
    pool = ThreadPoolExecutor(1, processes.COMPILER_THREAD)
    # On GPUs XLA times candidate kernels while it compiles. Whether the loading beside it disturbs
    # that has not been tested.
    compilation = Compilation(pool.submit(_compile, program))
    pool.shutdown(wait=False)
    try:
        if times_kernels(program.job.mesh):
            compilation.result()
        yield compilation
    except (LoadingCancelledError, _DoesNotFitError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and OUT_OF_MEMORY not in str(error):
            raise
        # Memory is also full when weights and the compiler meet: the verdict on the step decides.
        failure = compilation.future.exception()
        if isinstance(failure, _DoesNotFitError):
            job = program.job
            known, devices = report.rows_of(job.config, rows), list(job.mesh.devices.flat)
            if refused := refusal(job.config, job.tokenizer, known, devices):
                raise refused from error
        if isinstance(error, LoadingCancelledError) and failure is not None:
            raise failure from error
        raise


def _compile(program: TrainStep) -> Any:
    """The executable of a run's step; _DoesNotFitError if it needs too much memory."""
    checks = program.job.config.train.check_memory
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        if not checks or OUT_OF_MEMORY not in str(error):
            raise
        raise _DoesNotFitError from error
    limit = target.memory_limit(target.CompileTarget(), list(program.job.mesh.devices.flat)).limit
    if checks and measured(program, compiled).peak > limit:
        raise _DoesNotFitError
    return compiled


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
