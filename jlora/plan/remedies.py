"""Settings to change when a run does not fit, each with the forecast of the changed run.

Cheapest first: changes that leave the result alone, then those of precision (8-bit moments,
quantized base), last those of the training data (shorter rows).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jlora.config import Config, QuantConfig
from jlora.distributed.mesh import platform_of
from jlora.plan.forecast import Forecast
from jlora.run.environment import MEMORY_FRACTION
from jlora.run.header import size_text


@dataclasses.dataclass(frozen=True)
class Change:
    """Settings to change."""

    settings: tuple[str, ...]
    """``key=value``, as on the command line."""
    cost: str
    apply: Callable[[Config], Config]

    @property
    def names(self) -> list[str]:
        """Keys of the settings."""
        return [setting.partition("=")[0] for setting in self.settings]


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change, and whether the run fits with it."""

    settings: tuple[str, ...]
    cost: str
    peak: int | None
    """Bytes on one device; None if the compiler named no size."""
    fits: bool


MakeForecast = Callable[[Config], Forecast]


def find_remedies(result: Forecast, make_forecast: MakeForecast) -> list[Remedy]:
    """Tries every change alone; if none is enough, the first two, three … together."""
    remedies = list(_most_of_gpu(result))
    changes = list(changes_of(result))
    attempt = functools.partial(_try, make_forecast, result.config, use_more=not remedies)
    remedies += [attempt([change]) for change in changes]
    if not any(remedy.fits for remedy in remedies):
        # Not every subset: each attempt compiles the step.
        for n in range(2, len(changes) + 1):
            together = attempt(_drop_overridden(changes[:n]))
            if together.fits or n == len(changes):
                remedies.append(together)
                break
    return remedies


def _drop_overridden(changes: Sequence[Change]) -> list[Change]:
    """``changes`` without those whose settings a later change replaces."""
    last = {name: change for change in changes for name in change.names}
    return [change for change in changes if change in last.values()]


def _try(
    make_forecast: MakeForecast, config: Config, changes: Sequence[Change], use_more: bool
) -> Remedy:
    """Forecasts the run with ``changes``.

    With ``use_more`` a run that does not fit also gets nearly all of a GPU's memory, if that helps.
    """
    for change in changes:
        config = change.apply(config)
    settings = tuple(setting for change in changes for setting in change.settings)
    cost = changes[0].cost if len(changes) == 1 else "all of these"
    after = make_forecast(config)
    needs_more = use_more and not after.fits and _fits_most_of_gpu(after)
    peak = None if after.memory is None else after.memory.peak
    return Remedy(
        (*settings, MOST_OF_GPU) if needs_more else settings, cost, peak, after.fits or needs_more
    )


MOST_OF_GPU = f"{MEMORY_FRACTION}=0.95 (environment)"
"""Environment variable that gives a run nearly all of a GPU's memory."""


def _fits_most_of_gpu(result: Forecast) -> bool:
    """Whether the run fits if JAX takes 95 % of a GPU's memory."""
    limit, memory = result.limit, result.memory
    if memory is None or limit.limit >= 0.94 * limit.total:
        return False
    return memory.peak <= 0.95 * limit.total


def _most_of_gpu(result: Forecast) -> Iterator[Remedy]:
    """Nearly all of a GPU's memory, if that is enough."""
    if _fits_most_of_gpu(result) and result.memory is not None:
        cost = "nothing, if no other program uses the GPU"
        yield Remedy((MOST_OF_GPU,), cost, result.memory.peak, True)


def changes_of(result: Forecast) -> Iterator[Change]:
    """All changes that apply to a run."""
    config, train = result.config, result.config.train
    if not train.gradient_checkpointing:
        yield _train("about a third more time", gradient_checkpointing=True)
    # On a CPU the device's memory is the host's: nothing would be saved.
    if not train.activation_offloading and not _is_cpu(result):
        required = {} if train.gradient_checkpointing else {"gradient_checkpointing": True}
        cost = f"{'a third more time, and ' if required else ''}traffic with the host's memory"
        yield _train(cost, **required, activation_offloading=True)
    if (rows := train.per_device_train_batch_size) > 1:
        steps = train.gradient_accumulation_steps * rows
        yield _train(
            "a little time",
            per_device_train_batch_size=1,
            gradient_accumulation_steps=steps,
        )
    mesh = result.job.mesh
    if mesh.size > 1 and mesh.shape["fsdp"] == 1 and mesh.shape["tensor"] == 1:
        yield Change(("mesh.fsdp=-1", "mesh.data=1"), "traffic between devices", _over_fsdp)
    if train.optim in PAGED:
        yield _train("traffic with the host's memory", optim=PAGED[train.optim])
    if train.optim in EIGHT_BIT:
        yield _train("precision of the moments", optim=EIGHT_BIT[train.optim])
    if config.lora and not config.quantization and not result.job.model.config.prequantized:
        setting = "quantization.load_in_4bit=true"
        yield Change((setting,), "some time and the base's precision (QLoRA)", _quantized)
    length = config.data.max_length
    if length >= 128:
        half = length // 2
        yield Change(
            (f"data.max_length={half}",),
            "what is cut off longer examples",
            lambda c: dataclasses.replace(c, data=dataclasses.replace(c.data, max_length=half)),
        )


def _is_cpu(result: Forecast) -> bool:
    """Whether the run is for CPUs; CPU devices in the mesh may also stand for an absent target."""
    return result.hardware is None and platform_of(result.job.mesh) == "cpu"


PAGED = {"adamw": "paged_adamw_32bit", "lion": "paged_lion_32bit"}
EIGHT_BIT = {
    "adamw": "adamw_8bit",
    "lion": "lion_8bit",
    "paged_adamw_32bit": "paged_adamw_8bit",
    "paged_lion_32bit": "paged_lion_8bit",
}


def _train(cost: str, **fields: Any) -> Change:
    def apply(config: Config) -> Config:
        return dataclasses.replace(config, train=dataclasses.replace(config.train, **fields))

    settings = tuple(f"train.{name}={_value(value)}" for name, value in fields.items())
    return Change(settings, cost, apply)


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _over_fsdp(config: Config) -> Config:
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=-1))


def _quantized(config: Config) -> Config:
    return dataclasses.replace(config, quantization=QuantConfig())


def text(remedies: Sequence[Remedy]) -> str:
    """One line per remedy, which says whether it is enough."""
    if not remedies:
        return "use a device with more memory, or a smaller model"
    lines = []
    for remedy in remedies:
        peak = "too much to say" if remedy.peak is None else size_text(remedy.peak)
        verdict = "fits" if remedy.fits else "not enough"
        lines.append(f"  {' '.join(remedy.settings)} → {peak}, {verdict}; costs {remedy.cost}")
    if not any(remedy.fits for remedy in remedies):
        lines.append("  a device with more memory, more devices, or a smaller model")
    return "one or more of these\n" + "\n".join(lines)
