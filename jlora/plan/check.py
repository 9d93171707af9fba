"""The check that a run makes of its own step before it starts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax

from jlora import data
from jlora.distributed import processes
from jlora.errors import ConfigError
from jlora.plan import report, target
from jlora.plan.forecast import Rows, forecast
from jlora.plan.memory import OUT_OF_MEMORY, measured
from jlora.plan.remedies import find_remedies, text
from jlora.run.compiled_step import Program


class _DoesNotFitError(Exception):
    """The step needs more than its devices have."""


@contextmanager
def compiled_beside(program: Program, rows: data.Prepared) -> Iterator[Future[Any]]:
    """Gives what will hold the executable of a run's step, while something else is done.

    What runs out of memory meanwhile is reported as the step's refusal, if it is refused, too.

    Raises:
      ConfigError: the devices cannot hold what the step needs; the message says what to change.
        Not with ``train.check_memory: false``.
    """
    pool = ThreadPoolExecutor(1, processes.COMPILER_THREAD)
    compiling = pool.submit(_compiled, program)
    pool.shutdown(wait=False)
    try:
        yield compiling
    except (_DoesNotFitError, jax.errors.JaxRuntimeError) as error:
        full = isinstance(error, _DoesNotFitError) or OUT_OF_MEMORY in str(error)
        if full and isinstance(compiling.exception(), _DoesNotFitError):
            job = program.job
            known, devices = report.rows_of(job.config, rows), list(job.mesh.devices.flat)
            if refused := refusal(job.config, job.tokenizer, known, devices):
                raise refused from error
        raise


def unless_refused(
    compiling: Future[Any], report: Callable[[int, int], None]
) -> Callable[[int, int], None]:
    """``report``, which raises when the step that is being compiled was refused."""

    def checked(done: int, total: int) -> None:
        if compiling.done():
            compiling.result()
        report(done, total)

    return checked


def _compiled(program: Program) -> Any:
    """The executable of a run's step; _DoesNotFitError when it is too large."""
    checks = program.job.config.train.check_memory
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        if not checks or OUT_OF_MEMORY not in str(error):
            raise
        raise _DoesNotFitError from error
    limit = target.memory(target.Target(), list(program.job.mesh.devices.flat)).limit
    if checks and measured(program, compiled).peak > limit:
        raise _DoesNotFitError
    return compiled


def refusal(config: Any, tokenizer: Any, rows: Rows, devices: list[Any]) -> ConfigError | None:
    """What to say of a run that does not fit, with the effect of every change.

    None if it does fit: then memory was short for a while only.
    """
    look = functools.partial(
        forecast, tokenizer=tokenizer, rows=rows, aim=target.Target(), found=devices, whole=False
    )
    result = look(config)
    if result.fits:
        return None
    return ConfigError(
        report.verdict(result),
        where=config.model.name_or_path,
        fix=text(find_remedies(result, look)) + "\n  train.check_memory=false starts it anyway",
    )
