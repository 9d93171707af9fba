"""What a step takes of a device's memory, and for what."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax

from jlora.run.train_step import TrainStep

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
"""In what a compiler says that finds its device's memory too small."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device while a step runs; ``host`` is the host's, for each device."""

    base: int
    adapter: int
    """What is trained: all parameters in full fine-tuning."""
    optimizer: int
    best: int
    """The best tree so far, which early stopping keeps; the step does not take it."""
    batch: int
    temporaries: int
    """Activations, gradients, and what the compiler needs besides."""
    outputs: int
    """Results that do not take the place of an argument."""
    padding: int
    """What the device's layouts add to the arguments."""
    host: int = 0

    @property
    def peak(self) -> int:
        """Arguments, temporaries and outputs, those that share their place counted once."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self)) - self.host


def measured(program: TrainStep, compiled: Any) -> Memory:
    """The compiler's own account of the memory, by what it is for."""
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
    """Bytes on one device of what the step is given."""
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
    """What of described arrays lies in one device's own memory; or in ``pinned_host``."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if (leaf.sharding.memory_kind == "pinned_host") == (kind == "pinned_host"):
            total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


def refused_memory(program: TrainStep, said: str) -> Memory | None:
    """From what the compiler of TPUs says when it gives up; None when it names no size.

    ``Used 18.71G of 15.75G hbm``, or ``HLO temporaries (17.38G) exceeds available HBM (15.75G)``.
    """
    whole = re.search(r"Used ([\d.]+)([GM]) of [\d.]+[GM] hbm", said)
    only = re.search(r"HLO temporaries \(([\d.]+)([GM])\)", said)
    match = whole or only
    if match is None:
        return None
    size, parts = int(float(match[1]) * 2 ** {"G": 30, "M": 20}[match[2]]), arguments(program)
    temporaries = size - sum(parts.values()) if whole else size
    best = device_bytes(program.best)
    return Memory(**parts, best=best, temporaries=temporaries, outputs=0, padding=0)
