"""What every command shares: arguments, settings, one readable error, and the exit code.

A command is a module with ``run(config, options)``. It is imported only after its settings have
been checked: importing JAX takes seconds, and a mistake in a settings file is reported at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import jlora
from jlora import config, errors, files
from jlora.distributed import processes
from jlora.run import environment

USAGE = "CONFIG.yaml [section.key=value …] [--debug]"


RUN = ("model", "quantization", "lora", "data", "train", "mesh")
"""The sections of the settings that describe a run."""


class Command(NamedTuple):
    """A command's module, its line in ``jlora --help``, and its own flags (name → argparse)."""

    module: str
    help: str
    sections: tuple[str, ...]
    """Sections of the settings that it reads."""
    flags: dict[str, dict[str, Any]] = {}  # noqa: RUF012 (never changed)
    takes_adapter: bool = False
    """Whether it also works on the folder of a PEFT adapter."""


TARGET_HELP = (
    "plan for devices that this machine does not have: h200x8, h100x8, a100-80x4, rtx4090x1, v5e-16"
)
SHOW_BATCH_HELP = "print the first batch with its target tokens marked, and stop"

COMMANDS = {
    "train": Command(
        "jlora.train",
        "fine-tune a model with LoRA or QLoRA, or in full",
        (*RUN, "evaluate"),
        {"--show-batch": {"action": "store_true", "help": SHOW_BATCH_HELP}},
    ),
    "plan": Command(
        "jlora.plan",
        "predict memory, time and disk of a training run without loading weights",
        (*RUN, "evaluate"),
        {
            "--target": {"metavar": "DEVICES", "help": TARGET_HELP},
            "--json": {"action": "store_true", "help": "print everything as JSON"},
        },
    ),
    "inspect": Command(
        "jlora.inspect_config", "show what a run would train, without loading weights", RUN
    ),
    "evaluate": Command(
        "jlora.evaluate",
        "measure loss, perplexity and exact match on held-out rows",
        (*RUN, "evaluate"),
        takes_adapter=True,
    ),
    "generate": Command(
        "jlora.generate",
        "generate replies to prompts with a trained model",
        (*RUN, "evaluate", "generate"),
        takes_adapter=True,
    ),
    "merge": Command(
        "jlora.merge",
        "merge an adapter into its base model, as a transformers folder",
        (*RUN, "merge"),
        takes_adapter=True,
    ),
    "export": Command(
        "jlora.export",
        "write a checkpoint's weights as a PEFT or transformers folder",
        (*RUN, "export"),
        takes_adapter=True,
    ),
    "quantize": Command(
        "jlora.quantize",
        "quantize a base model, as a transformers folder",
        ("model", "quantization", "data", "train", "mesh", "quantize"),
    ),
}


def entry() -> NoReturn:
    """The console script ``jlora``."""
    environment.block_torch()
    leave(dispatch(sys.argv[1:]))


def dispatch(argv: Sequence[str]) -> int:
    """``jlora COMMAND …``: the exit code."""
    name, rest = (argv[0], argv[1:]) if argv else ("", ())
    if name in COMMANDS:
        return main(name, rest, prog=f"jlora {name}")
    if name in ("-V", "--version"):
        print(f"jlora {jlora.__version__}")
        return 0
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if not name:
        print(overview(), file=sys.stderr)
        return errors.ConfigError.exit_code
    fix = errors.did_you_mean(name, COMMANDS) or f"one of {', '.join(COMMANDS)}"
    return report(errors.ConfigError(f"no such command: {name!r}", fix=fix))


def main(command: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Runs a command with its arguments and returns the exit code.

    None means ``sys.argv``, in a process of the command alone; see ``block_torch``.
    """
    if argv is None:
        environment.block_torch()
    options = _parse(command, argv, prog or f"python -m {COMMANDS[command].module}")
    return guard(lambda: _run(COMMANDS[command], options), debug=options.debug)


def leave(code: int) -> NoReturn:
    """Ends the process with this exit code, see ``processes.exit_process``."""
    stopped = (0, 128 + signal.SIGINT, 128 + signal.SIGTERM)
    processes.exit_process(code, all_exit=code in stopped)


def _run(command: Command, options: argparse.Namespace) -> None:
    settings = config.load(options.config, options.overrides, command.takes_adapter)
    environment.reserve_gpu_memory()
    importlib.import_module(command.module).run(settings, options)


def guard(work: Callable[[], None], debug: bool = False) -> int:
    """Calls ``work``, prints the error that it raises, and returns the exit code (0: none)."""
    try:
        work()
    except Exception as error:
        if debug:
            traceback.print_exc()
        return report(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def report(error: Exception) -> int:
    """Prints an error as one readable message on standard error, and returns its exit code."""
    if isinstance(error, BrokenPipeError):  # such as `| head`: Python must not flush to it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    known = readable(error)
    stopped = isinstance(known, errors.StoppedError)  # not an error: the user asked for it
    print(known if stopped else f"error: {known}", file=sys.stderr)
    return known.exit_code


def readable(error: Exception) -> errors.JloraError:
    """The exception itself if it is a JloraError; else one that gives its cause and a remedy."""
    if isinstance(error, errors.JloraError):
        return error
    text = f"{type(error).__name__}: {error}".strip()
    # By its words: XLA has no exception of its own for it.
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        fix = "lower train.per_device_train_batch_size or data.max_length, or use quantization"
        return errors.JloraError(f"out of memory: {_first_line(text)}", fix=fix)
    if files.is_storage_error(error):
        where = getattr(error, "filename", None)
        return files.storage_error(error, where if isinstance(where, str) else "a file")
    fix = "run the same command with --debug for the traceback; please report it"
    return errors.JloraError(f"unexpected {_first_line(text)}", fix=fix)


def _first_line(text: str) -> str:
    return textwrap.shorten(text, 300, placeholder=" …")


def overview() -> str:
    """The text of ``jlora --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: jlora COMMAND {USAGE}",
            "",
            *lines,
            "",
            "jlora COMMAND --help lists its settings; jlora --version prints the version.",
        ]
    )


class _Parser(argparse.ArgumentParser):
    """Lists the settings below the arguments; only when help is asked for, since it takes time."""

    sections: tuple[str, ...] = ()

    def format_help(self) -> str:
        return f"{super().format_help()}\n{settings(self.sections)}"


def _parse(command: str, argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = _Parser(prog=prog, description=COMMANDS[command].help, allow_abbrev=False)
    parser.sections = COMMANDS[command].sections
    parser.usage = f"%(prog)s {USAGE}" + "".join(f" [{flag}]" for flag in COMMANDS[command].flags)
    parser.add_argument(
        "settings",
        metavar="CONFIG.yaml section.key=value",
        nargs="*",
        help="a settings file or a run's output folder"
        + (", or the folder of a PEFT adapter" * COMMANDS[command].takes_adapter)
        + ", then settings that override the file's, such as lora.r=32 or "
        "data.train.0.path=rows.jsonl",
    )
    for flag, arguments in COMMANDS[command].flags.items():
        parser.add_argument(flag, **arguments)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    # Intermixed: an override may follow a flag.
    options = parser.parse_intermixed_args(argv)
    if not options.settings:
        parser.error("CONFIG.yaml is missing: give a settings file or a run's output folder")
    options.config, *options.overrides = options.settings
    return options


def settings(sections: Sequence[str]) -> str:
    """Every setting of these sections with its default, meaning and type."""
    lines = ["settings (section.key = default):"]
    section = None
    for option in config.options():
        if option.section.partition(".")[0] not in sections:
            continue
        if option.section != section:
            section = option.section
            lines += ["", *_wrapped(f"{section}: {option.section_help}", 0)]
        default = "required" if option.default is None else option.default
        lines.append(f"  {option.field} = {default}")
        meaning = f"{option.help} ({option.type})"
        lines += _wrapped(meaning, 6)
    return "\n".join(lines) + "\n"


def _wrapped(text: str, indent: int) -> list[str]:
    space = " " * indent
    # Names such as all-linear are not broken.
    return textwrap.wrap(
        text, 92, initial_indent=space, subsequent_indent=space, break_on_hyphens=False
    )
