"""Tracing programs as they are for a GPU, on a machine that has none."""

import contextlib
from collections.abc import Iterator

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jlora.distributed.mesh import AXES

H200 = AbstractDevice("NVIDIA H200", None, "gpu")


@contextlib.contextmanager
def traced_for_a_gpu() -> Iterator[None]:
    """In the block, ``target_platform`` is "gpu"."""
    types = (AxisType.Auto,) * len(AXES)
    mesh = AbstractMesh((1,) * len(AXES), AXES, axis_types=types, abstract_device=H200)
    with jax.sharding.use_abstract_mesh(mesh):
        yield
