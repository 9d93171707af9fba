"""Makes and prints the forecast of the run that ``jlora train CONFIG`` would be."""

from __future__ import annotations

import functools
import json
from typing import Any

from jlora.config import Config
from jlora.errors import ConfigError, JloraError
from jlora.plan import report, target
from jlora.plan.forecast import Rows, forecast
from jlora.plan.remedies import find_remedies, text
from jlora.plan.target import CompileTarget
from jlora.run import environment
from jlora.run.batches import prepare_rows
from jlora.run.label_names import with_label_names
from jlora.run.open_tokenizer import open_tokenizer
from jlora.training.optim import check_optimizer
from jlora.ui.console import Console


def show_forecast(config: Config, compile_target: CompileTarget, *, as_json: bool = False) -> None:
    """Prints the forecast of a run.

    Raises:
      ConfigError: the run does not fit, with what to change; or see ``abstract_job``.
    """
    if config.train.compilation_cache and compile_target.hardware is None:
        environment.enable_compilation_cache()  # the run reuses it
    check_optimizer(config.train)
    config, _ = with_label_names(config)
    tokenizer, rows = _read(config)
    devices = target.devices(compile_target)
    make_forecast = functools.partial(
        forecast, tokenizer=tokenizer, rows=rows, compile_target=compile_target, devices=devices
    )
    result = make_forecast(config)
    remedies = (
        []
        if result.fits
        else find_remedies(result, functools.partial(make_forecast, count_work=False))
    )
    if as_json:
        print(json.dumps(report.as_json(result, remedies), indent=1))
    else:
        Console().header(f"jlora · plan · {config.train.output_dir}", report.as_sections(result))
    if not result.fits:
        raise ConfigError(
            report.verdict(result), where=config.model.name_or_path, fix=text(remedies)
        )


def _read(config: Config) -> tuple[Any, Rows]:
    """The tokenizer and the data's rows; if unreadable, None and rows of ``max_length``."""
    try:
        tokenizer = open_tokenizer(config)
    except (JloraError, OSError) as error:
        if config.is_classification:  # the padding token decides which token is classified
            raise
        return None, _uncounted(config, error)
    try:
        prepared = prepare_rows(config, tokenizer, "train")
    except JloraError as error:
        return tokenizer, _uncounted(config, error)
    return tokenizer, report.rows_of(config, prepared)


def _uncounted(config: Config, error: Exception) -> Rows:
    """Rows of ``max_length``, with several documents if packing is on."""
    documents = 2 if config.data.packing else 1
    return Rows(config.data.max_length, note=f"not counted: {error}", documents=documents)
