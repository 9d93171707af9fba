"""``jlora plan CONFIG``: what a run would take, from its compiled step; no weight is read.

hardware    what accelerators can do
target      what to compile for, present or not
hlo         what a compiled step does
flops       what a step computes
memory      what a step takes of a device's memory
estimate    the same without a compiler for the device
forecast    all of it, of one run
remedies    what to change when it does not fit
report      for people, and for machines
command     ``jlora plan`` itself

jax is imported by ``command`` only, after the environment says which devices to compile for.
"""

import argparse
import functools

from jlora import cli
from jlora.config import Config
from jlora.plan.target import parse, set_environment

main = functools.partial(cli.main, "plan")


def run(config: Config, options: argparse.Namespace) -> None:
    """Prints the forecast; raises ConfigError, with what to change, when the run does not fit."""
    target = parse(options.target)
    set_environment(target)
    from jlora.plan.command import plan  # imports jax

    plan(config, target, as_json=options.json)
