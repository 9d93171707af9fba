"""Any optimizer of optax by its name: ``optim: optax.adabelief``, ``optim: optax.contrib.muon``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import optax
import optax.contrib

from jlora.config import OPTAX, TrainConfig
from jlora.errors import ConfigError, did_you_mean

Optimizer = Callable[..., optax.GradientTransformation]


def from_optax(
    config: TrainConfig, rate: optax.Schedule, decay: float
) -> optax.GradientTransformation:
    """The optimizer that ``train.optim`` names, with ``train.optim_args``.

    The learning rate and the weight decay are those of the other optimizers' settings.

    Raises:
      ConfigError: optax has no optimizer of this name, it has no such argument, or refuses its
        value; or weight decay is asked for and it has none.
    """
    found = optimizers()
    if config.optim not in found:
        fix = did_you_mean(config.optim, list(found))
        raise ConfigError(
            f"{config.optim} is not an optimizer of optax",
            where="train.optim",
            fix=fix or f"it has {', '.join(name.removeprefix(OPTAX) for name in found)}",
        )
    takes = list(inspect.signature(found[config.optim]).parameters)
    arguments = dict(config.optim_args)
    for name in arguments:
        if name in ("learning_rate", "weight_decay"):
            fix = f"write train.{name}"
            raise ConfigError(f"{name} is no argument here", where="train.optim_args", fix=fix)
        if name not in takes:
            raise ConfigError(
                f"{config.optim} has no argument {name!r}",
                where="train.optim_args",
                fix=did_you_mean(name, takes) or f"it takes {', '.join(takes[1:])}",
            )
    if "weight_decay" in takes:
        arguments["weight_decay"] = decay
    elif decay:
        raise ConfigError(
            f"{config.optim} has no weight decay", where="train.weight_decay", fix="set it to 0"
        )
    try:
        return found[config.optim](rate, **arguments)
    except Exception as error:
        raise refused(config, error) from error


def refused(config: TrainConfig, error: Exception) -> ConfigError:
    """What to say when optax raises: its words are about the arguments it was given."""
    words = str(error).splitlines() or [type(error).__name__]
    given = ", ".join(f"{k}={v!r}" for k, v in config.optim_args.items())
    return ConfigError(
        f"{config.optim}({given}) cannot train: {words[0]}",
        where="train.optim",
        fix="correct train.optim_args, or choose another optimizer",
    )


def optimizers() -> dict[str, Optimizer]:
    """``optax.NAME`` and ``optax.contrib.NAME`` of every public function of a learning rate.

    Those of schedule-free training are left out: they evaluate at other parameters than they train.
    """
    found = {}
    for prefix, module in ((OPTAX, optax), (f"{OPTAX}contrib.", optax.contrib)):
        for name, value in sorted(vars(module).items()):
            if not name.startswith(("_", "scale_by_", "schedule_free")) and _takes_rate(value):
                found[prefix + name] = value
    return found


def _takes_rate(value: Any) -> bool:
    """Whether it is a function whose first argument is the learning rate."""
    return (
        inspect.isfunction(value)
        and next(iter(inspect.signature(value).parameters), None) == "learning_rate"
    )
