"""The device mesh (data, fsdp, tensor), and XLA's options for its platform."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from jlora.config import MeshConfig
from jlora.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
"""The axes that the rows of a batch are split over."""

COMPILER_OPTIONS: dict[str, dict[str, str]] = {
    # On CPUs XLA computes on slices of a bfloat16 array in float32, and this pass moves that
    # conversion out of the loop over layers: all layers' weights and activations are converted at
    # once, twice as large (jaxlib 0.10.2; 1907 instead of 1081 MB for a 63M model's step). Stacks
    # of uint16 help as well, but integers have no gradient. jaxlib 0.12 does not convert there.
    # YNNPACK's larger fusions stay off: their products run at 127 instead of 366 GFLOP/s. Without
    # YNNPACK it is 175; oneDNN's flags have no effect, and vectors of 512 bits gain nothing.
    "cpu": {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"},
    # On GPUs XLA merges ``x @ W`` and ``x @ A`` into one product, for which it concatenates W and A
    # in every layer: a sixth of all bytes that a LoRA step of an 8B model moves. Kept apart they
    # need 0.28 GiB more for temporaries. From the compiled step; not timed on a GPU.
    "gpu": {"xla_gpu_dot_merger_threshold_mb": "0"},
}
"""Platform → XLA options that differ from its defaults."""

DETERMINISTIC_OPTIONS: dict[str, dict[str, str]] = {
    # cuDNN's attention gets the deterministic form of its backward pass, a scatter that adds is
    # sorted first, and every kernel is the first one possible: nothing is timed (docs/log.md).
    "gpu": {"xla_gpu_exclude_nondeterministic_ops": "True"},
}
"""Platform → XLA options for ``train.full_determinism``, where it is not so by default."""


def platform_of(mesh: Mesh) -> str:
    """The platform of the mesh's devices: "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform


def compiler_options(mesh: Mesh, *, full_determinism: bool = False) -> dict[str, str] | None:
    """The ``compiler_options`` of ``jax.jit`` for programs that loop over layers on this mesh."""
    platform = platform_of(mesh)
    options = COMPILER_OPTIONS.get(platform)
    if full_determinism and platform in DETERMINISTIC_OPTIONS:
        return (options or {}) | DETERMINISTIC_OPTIONS[platform]
    return options


def target_platform() -> str:
    """The platform ("cpu", "gpu", "tpu") that a program traced now is for.

    That of the mesh that is set, which may be of absent devices, or of this process's devices.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def times_kernels(mesh: Mesh) -> bool:
    """Whether XLA, to compile for this mesh, may run kernels and keep the fastest: on GPUs.

    Whatever else runs there meanwhile changes its choice, which the compilation cache keeps.
    """
    return platform_of(mesh) == "gpu"


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) of ``devices`` (all by default), ordered for their network.

    An axis of size -1 takes the devices that the others leave. All axes are Auto: ``jax.make_mesh``
    defaults to Explicit, under which ordinary code raises.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {name: getattr(config, name) for name in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [name for name, size in sizes.items() if size == -1]
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise _does_not_fit(sizes, fixed, len(devices), free)
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def _does_not_fit(sizes: dict, fixed: int, count: int, free: list[str]) -> ConfigError:
    asked = " × ".join(f"{name} {'rest' if size == -1 else size}" for name, size in sizes.items())
    possible = [n for n in range(1, count + 1) if count % n == 0]
    numbers = ", ".join(map(str, possible))
    if free:
        others = " × ".join(name for name in AXES if name not in free)
        fix = f"choose {others} so that their product is one of {numbers}"
    else:
        fix = "set one axis, such as mesh.data, to -1: it takes the devices that are left"
        if fixed > count:
            fix = f"make the product {count}, or start more processes or devices"
    are = "is 1 device" if count == 1 else f"are {count} devices"
    return ConfigError(f"asks for {asked}, but there {are}", where="mesh", fix=fix)
