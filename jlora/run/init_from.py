"""``lora.init_from``: the folder's adapter decides what is trained, not the other settings.

Settings that ask for another adapter are refused. Of the others the folder's values become the
run's, so that the header and ``config.yaml`` show what is trained.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jlora.config import Config, LoraConfig
from jlora.errors import ConfigError
from jlora.lora.targets import find_targets, scaling_of

RUN = {"init_from", "lora_dropout", "base_model_name_or_path", "revision", "fan_in_fan_out"}
"""Fields that the settings decide (or that have no effect)."""

INIT = {"init_lora_weights", "loftq_config", "eva_config", "task_type"}
"""Fields that do not matter once there is an adapter; ``task_type`` is checked with the rows."""

SELECTION = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters",
}  # fmt: skip
"""Fields that may be written in several ways: what they select is compared."""


def with_settings_of(config: Config, adapter: LoraConfig, base: Any) -> Config:
    """The settings with those of the adapter in ``lora.init_from``.

    Args:
      config: the settings as given.
      adapter: the config of the adapter in the folder.
      base: the parameters, or their shapes.

    Raises:
      ConfigError: listing the settings that differ both from the defaults and from the adapter's.
    """
    asked, default = config.lora, LoraConfig()
    if asked is None or not asked.init_from:
        return config
    if asked.lora_dropout and adapter.target_parameters:
        raise ConfigError(
            f"is not possible for the experts or routers that {asked.init_from} adapts",
            where="lora.lora_dropout",
            fix="set it to 0",
        )
    names = [f.name for f in dataclasses.fields(LoraConfig) if f.name not in RUN]
    given = [n for n in names if n not in INIT and getattr(asked, n) != getattr(default, n)]
    differing = [n for n in given if getattr(asked, n) != getattr(adapter, n)]
    # Replaced all at once: one alone, beside the folder's others, would select something else.
    chosen = {n: getattr(asked, n) for n in given if n in SELECTION}
    if SELECTION & {*differing} and _selects_the_same(adapter, chosen, base):
        differing = [n for n in differing if n not in SELECTION]
    if differing:
        listed = "; ".join(
            f"{n}: {getattr(asked, n)} (there {getattr(adapter, n)})" for n in differing
        )
        raise ConfigError(
            f"asks for another adapter than that in {asked.init_from}: {listed}",
            where=", ".join(f"lora.{n}" for n in differing),
            fix="leave these out, and the folder's settings are used; or leave out lora.init_from",
        )
    taken = {n: getattr(adapter, n) for n in names if n != "task_type"}
    return dataclasses.replace(config, lora=dataclasses.replace(asked, **taken))


def taken_over(before: Config, after: Config) -> str:
    """The settings of ``lora`` that the folder changed, with their values; "" if there are none."""
    a, b = before.lora, after.lora
    changed = (
        f.name
        for f in dataclasses.fields(LoraConfig)
        if getattr(a, f.name, None) != getattr(b, f.name, None)
    )
    return ", ".join(f"{name}: {getattr(b, name)}" for name in changed)


def _selects_the_same(adapter: LoraConfig, chosen: dict[str, Any], base: Any) -> bool:
    """Whether the ``chosen`` settings leave the modules, ranks and scales as they are."""
    try:
        changed = _selected(dataclasses.replace(adapter, **chosen), base)
    except ConfigError:  # a setting matches no module, or none that the others select
        return False
    return changed == _selected(adapter, base)


def _selected(config: LoraConfig, base: Any) -> dict[str, tuple[int, float]]:
    """Module → rank and scale."""
    resolved, targets = find_targets(base, config)
    return {
        name: (r, scaling_of(resolved, name))
        for t in targets
        for name, r in zip(t.names, t.ranks, strict=True)
        if r
    }
