"""The check that a run makes of its own step before it starts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax

from jlora import data
from jlora.errors import ConfigError
from jlora.plan import report, target
from jlora.plan.forecast import Rows, forecast
from jlora.plan.memory import OUT_OF_MEMORY, measured
from jlora.plan.remedies import find_remedies, text
from jlora.program import Program


@contextmanager
def compiled_beside(program: Program, rows: data.Prepared) -> Iterator[Future[Any]]:
    """Gives what will hold ``compile_checked``'s result, while something else is done.

    What runs out of memory meanwhile is reported as the step's refusal, if it is refused, too.
    Where something else fails, nobody waits for the compiler but the process's end.
    """
    pool = ThreadPoolExecutor(1, "compile")
    compiling = pool.submit(compile_checked, program, rows)
    pool.shutdown(wait=False)
    try:
        yield compiling
    except jax.errors.JaxRuntimeError as error:
        if OUT_OF_MEMORY in str(error):
            compiling.result()
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


def compile_checked(program: Program, rows: data.Prepared) -> Any:
    """The executable of a run's step.

    Raises:
      ConfigError: its devices cannot hold what the step needs; the message says what to change.
        Not with ``train.check_memory: false``.
    """
    job, here = program.job, target.Target()
    devices = list(job.mesh.devices.flat)
    checks = job.config.train.check_memory
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        if not checks or OUT_OF_MEMORY not in str(error):
            raise
    else:
        limit = target.memory(here, devices).limit
        if not checks or measured(program, compiled).peak <= limit:
            return compiled
    known = report.rows_of(job.config, rows)
    raise refusal(job.config, job.tokenizer, known, devices)


def refusal(config: Any, tokenizer: Any, rows: Rows, devices: list[Any]) -> ConfigError:
    """What to say of a run that does not fit, with the effect of every change."""
    look = functools.partial(
        forecast, tokenizer=tokenizer, rows=rows, aim=target.Target(), found=devices, whole=False
    )
    result = look(config)
    return ConfigError(
        report.verdict(result),
        where=config.model.name_or_path,
        fix=text(find_remedies(result, look)) + "\n  train.check_memory=false starts it anyway",
    )
