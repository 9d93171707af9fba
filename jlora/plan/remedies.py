"""What to change when a run does not fit, each change with its own forecast.

In the order of what they cost the user: first what changes nothing of the result, then what changes
how the base is kept, last what the model gets to see.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jlora.config import Config, QuantConfig
from jlora.plan.forecast import Forecast
from jlora.plan.target import FRACTION
from jlora.run.header import size_text


@dataclasses.dataclass(frozen=True)
class Change:
    """Settings that would be others."""

    settings: tuple[str, ...]
    """As on the command line."""
    cost: str
    apply: Callable[[Config], Config]

    @property
    def names(self) -> list[str]:
        """Of the settings."""
        return [setting.partition("=")[0] for setting in self.settings]


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change, and what came of it."""

    settings: tuple[str, ...]
    cost: str
    peak: int | None
    """Bytes on a device; None when the compiler would not say."""
    fits: bool


Look = Callable[[Config], Forecast]


def find_remedies(result: Forecast, look: Look) -> list[Remedy]:
    """Every change alone; and where none is enough, one after the other until they are."""
    found = list(_more_of_the_device(result))
    changes = list(changes_of(result))
    attempt = functools.partial(_try, look, result.config, rest=not found)
    found += [attempt([change]) for change in changes]
    if not any(remedy.fits for remedy in found):
        for n in range(2, len(changes) + 1):
            together = attempt(_last_of_each(changes[:n]))
            if together.fits or n == len(changes):
                found.append(together)
                break
    return found


def _last_of_each(changes: Sequence[Change]) -> list[Change]:
    """Without those whose settings a later one changes again."""
    last = {name: change for change in changes for name in change.names}
    return [change for change in changes if change in last.values()]


def _try(look: Look, config: Config, changes: Sequence[Change], rest: bool) -> Remedy:
    """``rest``: with the rest of a GPU where that is needed, which alone is not enough."""
    for change in changes:
        config = change.apply(config)
    settings = tuple(setting for change in changes for setting in change.settings)
    cost = changes[0].cost if len(changes) == 1 else "all of these"
    after = look(config)
    short = rest and not after.fits and _fits_the_whole(after)
    peak = None if after.memory is None else after.memory.peak
    return Remedy((*settings, WHOLE) if short else settings, cost, peak, after.fits or short)


WHOLE = f"{FRACTION}=0.95 (environment)"
"""What gives a run nearly all of a GPU's memory."""


def _fits_the_whole(result: Forecast) -> bool:
    """JAX takes three quarters of a GPU's memory: whether it would do with the rest, too."""
    limit, memory = result.limit, result.memory
    if memory is None or limit.limit >= 0.94 * limit.whole:
        return False
    return memory.peak <= 0.95 * limit.whole


def _more_of_the_device(result: Forecast) -> Iterator[Remedy]:
    """The rest of a GPU, where that is enough."""
    if _fits_the_whole(result) and result.memory is not None:
        cost = "nothing, if no other program uses the GPU"
        yield Remedy((WHOLE,), cost, result.memory.peak, True)


def changes_of(result: Forecast) -> Iterator[Change]:
    """All changes that are open to a run."""
    config, train = result.config, result.config.train
    if not train.gradient_checkpointing:
        yield _train("about a third more time", gradient_checkpointing=True)
    if not train.activation_offloading and not _on_the_host(result):
        both = {} if train.gradient_checkpointing else {"gradient_checkpointing": True}
        cost = f"{'a third more time, and ' if both else ''}traffic with the host's memory"
        yield _train(cost, **both, activation_offloading=True)
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
        packed = "quantization.load_in_4bit=true"
        yield Change((packed,), "some time and the base's precision (QLoRA)", _packed)
    length = config.data.max_length
    if length >= 128:
        half = length // 2
        yield Change(
            (f"data.max_length={half}",),
            "what is cut off longer examples",
            lambda c: dataclasses.replace(c, data=dataclasses.replace(c.data, max_length=half)),
        )


def _on_the_host(result: Forecast) -> bool:
    """Whether the run's devices are CPUs: of one that is not there the mesh's are stand-ins."""
    platform = result.job.mesh.devices.flat[0].platform
    return result.hardware is None and platform == "cpu"


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


def _packed(config: Config) -> Config:
    return dataclasses.replace(config, quantization=QuantConfig())


def text(remedies: Sequence[Remedy]) -> str:
    """A line for each, those that are enough marked."""
    if not remedies:
        return "use a device with more memory, or a smaller model"
    lines = []
    for remedy in remedies:
        peak = "too much to say" if remedy.peak is None else size_text(remedy.peak)
        verdict = "fits" if remedy.fits else "not enough"
        lines.append(f"  {' '.join(remedy.settings)} → {peak}, {verdict}; costs {remedy.cost}")
    if not any(remedy.fits for remedy in remedies):
        lines.append("  a device with more memory, more devices, or a smaller model")
    return "one of these, or several\n" + "\n".join(lines)
