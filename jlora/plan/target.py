"""What a step is compiled for: the devices that are here, or those of a name such as ``h200x8``.

jax is imported only where it is used: the environment of an absent target must be set before.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jlora.errors import ConfigError, did_you_mean
from jlora.plan.hardware import HARDWARE, Hardware, of_kind, target_config

SLICES = {
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16",
}  # fmt: skip
"""Chips of a TPU slice (v5e, v6e) → its topology."""

FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
DEFAULT_FRACTION = 0.75
"""Of a GPU's memory JAX takes this much at its start, and gives programs no more."""


@dataclasses.dataclass(frozen=True)
class CompileTarget:
    """What to compile for: the devices that are here when ``hardware`` is None."""

    hardware: Hardware | None = None
    count: int = 0

    @property
    def name(self) -> str:
        """As it is written."""
        if self.hardware is None:
            return "here"
        joint = "-" if self.hardware.platform == "tpu" else "x"
        return f"{self.hardware.name}{joint}{self.count}"

    @property
    def gpu_capability(self) -> tuple[int, int] | None:
        """The compute capability of a GPU that is named; None for TPUs and the devices here."""
        chip = self.hardware and self.hardware.chip
        return chip.capability if chip else None

    @property
    def environment(self) -> Mapping[str, str]:
        """What must be set before jax is imported: none of the devices is here."""
        if self.hardware is None:
            return {}
        stand_ins = {"JAX_NUM_CPU_DEVICES": str(self.count)}
        if self.hardware.platform == "tpu":
            return stand_ins | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
        own = {"JAX_PLATFORMS": "cpu,cuda", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
        return stand_ins | own


def parse(name: str | None) -> CompileTarget:
    """The target of a name such as ``h200x8``, ``a100-80`` or ``v5e-16``; None is what is here.

    Raises ConfigError for another one, and for more devices than are linked.
    """
    if name is None:
        return CompileTarget()
    kind, count = name, 1
    if kind not in HARDWARE and (match := re.fullmatch(r"(.+?)[x-](\d+)", name)):
        kind, count = match[1], int(match[2])
    if kind not in HARDWARE:
        fix = did_you_mean(kind, HARDWARE) or f"one of {', '.join(HARDWARE)}, such as h200x8"
        raise ConfigError(f"no such device: {kind!r}", where=f"--target {name}", fix=fix)
    hardware = HARDWARE[kind]
    if hardware.platform == "tpu" and count not in SLICES:
        sizes = ", ".join(map(str, SLICES))
        cause = f"there is no slice of {count} chips"
        raise ConfigError(cause, where=f"--target {name}", fix=f"a slice has {sizes}")
    if not 1 <= count <= hardware.most:
        raise ConfigError(
            f"{count} devices, but one node has up to {hardware.most}",
            where=f"--target {name}",
            fix=f"plan for one node, such as {kind}x{hardware.most}",
        )
    return CompileTarget(hardware, count)


def set_environment(target: CompileTarget) -> None:
    """Makes jax, which is not imported yet, compile for what is not here."""
    os.environ.update(target.environment)


def devices(target: CompileTarget) -> Sequence[Any] | None:
    """The target's devices, to compile for; None where JAX's plugin for them is not installed."""
    import jax

    if target.hardware is None:
        return jax.devices()
    try:
        return _topology(target.hardware, target.count).devices
    except Exception as error:  # of several kinds; all say that the plugin is not there
        if "target_config" in str(error).lower():
            raise
        return None


def _topology(hardware: Hardware, count: int) -> Any:
    from jax.experimental import topologies

    if hardware.platform == "tpu":
        options: dict[str, Any] = {"topology_name": f"{hardware.name}:{SLICES[count]}"}
        if count == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
    else:
        text = target_config(hardware)
        options = {"topology_name": hardware.name, "target_config": text}
        options["topology"] = f"1x1x{count}"
    return topologies.get_topology_desc(platform=hardware.platform, **options)


@dataclasses.dataclass(frozen=True)
class Memory:
    """What one device can hold, in bytes, and who says so."""

    limit: int
    source: str
    whole: int
    """All that the device has."""


def memory(target: CompileTarget, found: Sequence[Any] | None) -> Memory:
    """What programs can use of one device of the target."""
    if target.hardware is None:
        return _memory_here(found or ())
    return _of_table(target.hardware)


def _of_table(hardware: Hardware) -> Memory:
    if hardware.platform == "tpu":
        return Memory(hardware.memory, "what XLA leaves to a program", hardware.memory)
    given = os.environ.get(FRACTION)
    share = float(given) if given else DEFAULT_FRACTION
    source = f"{share:.0%} of {hardware.memory / 2**30:.1f} GiB, "
    source += f"as {FRACTION} says" if given else "as JAX takes at its start"
    return Memory(int(share * hardware.memory), source, hardware.memory)


def _memory_here(found: Sequence[Any]) -> Memory:
    import jax

    first = next(d for d in found if d.process_index == jax.process_index())
    limit = (first.memory_stats() or {}).get("bytes_limit")
    if limit:
        known = of_kind(first.device_kind)
        return Memory(limit, "what JAX has here", known.memory if known else limit)
    ram = main_memory()
    local = sum(device.process_index == first.process_index for device in found)
    source = "this machine's memory" + (f", shared by {local} devices" if local > 1 else "")
    return Memory(ram // max(local, 1), source, ram // max(local, 1))


def main_memory() -> int:
    """Bytes of this machine's memory, or of the container's that this process is in."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (Path("/sys/fs/cgroup") / name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            return min(whole, int(text))
    return whole


def hardware_of(target: CompileTarget, found: Sequence[Any] | None) -> Hardware | None:
    """What the table says of the target's devices; None for those it does not have (CPUs)."""
    if target.hardware is not None:
        return target.hardware
    return of_kind(found[0].device_kind) if found else None
