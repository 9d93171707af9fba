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

    Learning rate and weight decay come from the same settings as for other optimizers.

    Raises:
      ConfigError: optax has no such optimizer, the optimizer has no such argument, refuses its
        value, or has no weight decay although ``train.weight_decay`` is set.
    """
    available = optimizers()
    if config.optim not in available:
        fix = did_you_mean(config.optim, list(available))
        raise ConfigError(
            f"{config.optim} is not an optimizer of optax",
            where="train.optim",
            fix=fix or f"it has {', '.join(name.removeprefix(OPTAX) for name in available)}",
        )
    accepted = list(inspect.signature(available[config.optim]).parameters)
    arguments = dict(config.optim_args)
    for name in arguments:
        if name in ("learning_rate", "weight_decay"):
            fix = f"write train.{name}"
            raise ConfigError(f"{name} is set elsewhere", where="train.optim_args", fix=fix)
        if name not in accepted:
            raise ConfigError(
                f"{config.optim} has no argument {name!r}",
                where="train.optim_args",
                fix=did_you_mean(name, accepted) or f"it takes {', '.join(accepted[1:])}",
            )
    if "weight_decay" in accepted:
        # Also where it is 0: optax's own defaults, such as adamw's 1e-4, would decay biases, too.
        arguments["weight_decay"] = decay
    elif decay:
        raise ConfigError(
            f"{config.optim} has no weight decay", where="train.weight_decay", fix="set it to 0"
        )
    try:
        return available[config.optim](rate, **arguments)
    except Exception as error:
        raise refused(config, error) from error


def refused(config: TrainConfig, error: Exception) -> ConfigError:
    """What to say when optax raises: its lines are about the arguments it was given."""
    lines = str(error).splitlines() or [type(error).__name__]
    arguments = ", ".join(f"{k}={v!r}" for k, v in config.optim_args.items())
    return ConfigError(
        f"{config.optim}({arguments}) cannot train: {lines[0]}",
        where="train.optim",
        fix="correct train.optim_args, or choose another optimizer",
    )


def optimizers() -> dict[str, Optimizer]:
    """Name → every public function of ``optax`` and ``optax.contrib`` that takes a learning rate.

    Schedule-free ones are excluded: they evaluate at other parameters than those they train.
    """
    available = {}
    for prefix, module in ((OPTAX, optax), (f"{OPTAX}contrib.", optax.contrib)):
        for name, value in sorted(vars(module).items()):
            if not name.startswith(("_", "scale_by_", "schedule_free")) and _takes_rate(value):
                available[prefix + name] = value
    return available


def _takes_rate(value: Any) -> bool:
    """Whether ``value`` is a function whose first argument is ``learning_rate``."""
    return (
        inspect.isfunction(value)
        and next(iter(inspect.signature(value).parameters), None) == "learning_rate"
    )
