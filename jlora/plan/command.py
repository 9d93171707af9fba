"""``jlora plan CONFIG``: chooses the devices to compile for, then shows the forecast of the run.

No module that imports jax is imported at the top: jax reads at its import which devices it is to
compile for, and ``run`` sets that first.
"""

from __future__ import annotations

import argparse
import functools

from jlora import cli
from jlora.config import Config
from jlora.plan.target import parse_target, set_environment

main = functools.partial(cli.main, "plan")


def run(config: Config, options: argparse.Namespace) -> None:
    """Prints the forecast; raises ConfigError, with what to change, if the run does not fit."""
    target = parse_target(options.target)
    set_environment(target)
    from jlora.plan.show_forecast import show_forecast  # imports jax

    show_forecast(config, target, as_json=options.json)
