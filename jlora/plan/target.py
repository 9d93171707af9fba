"""The devices that a step is compiled for: this machine's, or named ones such as ``h200x8``.

jax is imported inside functions: environment variables for an absent target must be set before.
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
from jlora.run.environment import DEFAULT_MEMORY_FRACTION, memory_fraction

SLICE_TOPOLOGIES = {
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16",
}  # fmt: skip
"""Chips of a TPU slice (v5e, v6e) → its topology."""


@dataclasses.dataclass(frozen=True)
class CompileTarget:
    """Devices to compile for: this machine's if ``hardware`` is None."""

    hardware: Hardware | None = None
    count: int = 0

    @property
    def name(self) -> str:
        """The value of ``--target``."""
        if self.hardware is None:
            return "here"
        joint = "-" if self.hardware.platform == "tpu" else "x"
        return f"{self.hardware.name}{joint}{self.count}"

    @property
    def gpu_capability(self) -> tuple[int, int] | None:
        """Compute capability of a named GPU; None for TPUs and for this machine's devices."""
        chip = self.hardware and self.hardware.chip
        return chip.capability if chip else None

    @property
    def environment(self) -> Mapping[str, str]:
        """Environment variables to set before jax is imported, to compile for absent devices."""
        if self.hardware is None:
            return {}
        stand_ins = {"JAX_NUM_CPU_DEVICES": str(self.count)}
        if self.hardware.platform == "tpu":
            # libtpu would wait for the metadata server of a cloud machine.
            return stand_ins | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
        # cuda for its plugin, whose compiler needs no GPU; cpu first, so that arrays are on the
        # CPU.
        cuda = {"JAX_PLATFORMS": "cpu,cuda", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
        return stand_ins | cuda


def parse_target(name: str | None) -> CompileTarget:
    """The target of a name such as ``h200x8``, ``a100-80`` or ``v5e-16``; None is this machine.

    Raises ConfigError for an unknown device type or an impossible number of devices.
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
    if hardware.platform == "tpu" and count not in SLICE_TOPOLOGIES:
        sizes = ", ".join(map(str, SLICE_TOPOLOGIES))
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
    """Sets the target's environment variables; call it before jax is imported."""
    os.environ.update(target.environment)


def devices(target: CompileTarget) -> Sequence[Any] | None:
    """The target's devices, to compile for; None if JAX's plugin for them is missing."""
    import jax

    if target.hardware is None:
        return jax.devices()
    try:
        return _topology(target.hardware, target.count).devices
    except Exception as error:  # types differ between plugins; all mean that it is missing
        if "target_config" in str(error).lower():
            raise
        return None


def _topology(hardware: Hardware, count: int) -> Any:
    from jax.experimental import topologies

    if hardware.platform == "tpu":
        options: dict[str, Any] = {"topology_name": f"{hardware.name}:{SLICE_TOPOLOGIES[count]}"}
        if count == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
    else:
        text = target_config(hardware)
        options = {"topology_name": hardware.name, "target_config": text}
        options["topology"] = f"1x1x{count}"
    return topologies.get_topology_desc(platform=hardware.platform, **options)


@dataclasses.dataclass(frozen=True)
class MemoryLimit:
    """Memory that programs can use on one device, in bytes, and the source of that number."""

    limit: int
    source: str
    total: int
    """All memory of the device."""


def memory_limit(target: CompileTarget, present: Sequence[Any] | None) -> MemoryLimit:
    """Memory that programs can use on one device of the target."""
    if target.hardware is None:
        return _memory_limit_here(present or ())
    return _of_table(target.hardware)


def _of_table(hardware: Hardware) -> MemoryLimit:
    if hardware.platform == "tpu":
        return MemoryLimit(hardware.memory, "what XLA leaves to a program", hardware.memory)
    share = memory_fraction()
    source = f"{share:.0%} of {hardware.memory / 2**30:.1f} GiB, "
    if share == DEFAULT_MEMORY_FRACTION:
        source += "as jlora takes at its start"
    else:
        source += "as the environment says"
    return MemoryLimit(int(share * hardware.memory), source, hardware.memory)


def _memory_limit_here(present: Sequence[Any]) -> MemoryLimit:
    import jax

    # One of this process's: others do not tell their memory.
    first = next(d for d in present if d.process_index == jax.process_index())
    limit = (first.memory_stats() or {}).get("bytes_limit")
    if limit:
        known = of_kind(first.device_kind)
        return MemoryLimit(limit, "what JAX has here", known.memory if known else limit)
    ram = main_memory()
    local = sum(device.process_index == first.process_index for device in present)
    source = "this machine's memory" + (f", shared by {local} devices" if local > 1 else "")
    return MemoryLimit(ram // max(local, 1), source, ram // max(local, 1))


def main_memory() -> int:
    """Bytes of this machine's RAM, or the memory limit of this process's container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (Path("/sys/fs/cgroup") / name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            return min(total, int(text))
    return total


def hardware_of(target: CompileTarget, present: Sequence[Any] | None) -> Hardware | None:
    """The table's entry for the target's devices; None if it has none (CPUs)."""
    if target.hardware is not None:
        return target.hardware
    return of_kind(present[0].device_kind) if present else None
