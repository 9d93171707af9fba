"""Device memory of a compiled step, by what it holds."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax

from jlora.run.train_step import TrainStep

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
"""Status in the error of a compiler that finds the device's memory too small."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device while a step runs; ``host`` is host memory per device."""

    base: int
    adapter: int
    """Trainable parameters: in full fine-tuning all of them."""
    optimizer: int
    best: int
    """Copy of the best parameters for early stopping; not an argument of the step."""
    batch: int
    temporaries: int
    """Activations, gradients and the compiler's other buffers."""
    outputs: int
    """Results that are not written into the buffer of a donated argument."""
    padding: int
    """Bytes that the device's layouts add to the arguments."""
    host: int = 0

    @property
    def peak(self) -> int:
        """All device memory; results in donated buffers are counted once."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self)) - self.host


def measured(program: TrainStep, compiled: Any) -> Memory:
    """The compiler's memory analysis, divided by what the memory holds."""
    # Not in it: the driver's context; evaluation and generation, which run between steps; initial
    # values before the first step (LoftQ loads the base dense).
    stats = compiled.memory_analysis()
    parts = arguments(program)
    known = sum(parts.values())
    return Memory(
        **parts,
        best=device_bytes(program.best),
        temporaries=stats.temp_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        padding=stats.argument_size_in_bytes - known,
        host=stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes,
    )


def arguments(program: TrainStep) -> dict[str, int]:
    """Bytes of the step's arguments on one device."""
    state = program.state
    trainable = state.trainable
    rest = (state.step, state.opt_state, state.loss_scale)
    return {
        "base": device_bytes(program.job.frozen),
        "adapter": device_bytes(trainable),
        "optimizer": device_bytes(rest),
        "batch": device_bytes(program.batch),
    }


def device_bytes(tree: Any, kind: str | None = None) -> int:
    """Bytes per device of a tree of abstract arrays.

    Only arrays in memory ``kind`` count: ``"pinned_host"``, or None for device memory.
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        if (leaf.sharding.memory_kind == "pinned_host") == (kind == "pinned_host"):
            total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


def refused_memory(program: TrainStep, said: str) -> Memory | None:
    """Memory from the out-of-memory error of the TPU compiler; None if it names no size.

    The error says ``Used 18.71G of 15.75G hbm`` or
    ``HLO temporaries (17.38G) exceeds available HBM (15.75G)``.
    """
    everything = re.search(r"Used ([\d.]+)([GM]) of [\d.]+[GM] hbm", said)
    temporaries_only = re.search(r"HLO temporaries \(([\d.]+)([GM])\)", said)
    match = everything or temporaries_only
    if match is None:
        return None
    size, parts = int(float(match[1]) * 2 ** {"G": 30, "M": 20}[match[2]]), arguments(program)
    temporaries = size - sum(parts.values()) if everything else size
    best = device_bytes(program.best)
    return Memory(**parts, best=best, temporaries=temporaries, outputs=0, padding=0)
