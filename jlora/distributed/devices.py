"""What devices this run has, and how much memory they offer."""

from __future__ import annotations

import jax

from jlora.distributed.local_gpus import missing_gpus


def describe_devices() -> str:
    """The devices in one line: ``8 × NVIDIA H100 (79.6 GiB each), 2 processes``."""
    kinds: dict[str, int] = {}
    for device in jax.devices():
        kinds[device.device_kind] = kinds.get(device.device_kind, 0) + 1
    text = ", ".join(f"{count} × {kind}" for kind, count in kinds.items())
    if memory := device_memory():
        text += f" ({memory / 2**30:.1f} GiB each)"
    if jax.process_count() > 1:
        text += f", {jax.process_count()} processes"
    return text


def unused_gpus() -> str | None:
    """What to say if this process uses fewer GPUs than the machine has for it."""
    return missing_gpus(jax.local_device_count() if jax.default_backend() == "gpu" else 0)


def device_memory() -> int | None:
    """Bytes that one device offers to JAX; None where the backend does not report it (CPU)."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
