"""What ``train.gradient_checkpointing: auto`` stands for: the fastest way that fits.

Its values are tried in order: save the products of every layer, recompute each layer from its
input, and, where the host has a memory of its own, store these inputs there. The first whose
compiled step leaves a margin of the memory is taken, or else the last.
"""

from __future__ import annotations

import dataclasses

from jlora.config import Config
from jlora.distributed.mesh import platform_of
from jlora.run.job import Job, with_remat

MARGIN = 0.05
"""Share of a device's memory that a step has to leave for ``auto`` to prefer it: evaluation and
generation run between steps, and a GPU's allocator leaves gaps."""

CPU_MARGIN = 0.5
"""The same of a machine's memory, which other programs use, too."""


def candidates(config: Config, platform: str) -> list[Config]:
    """The settings without ``auto``, in the order in which they are tried; else as they are."""
    if config.train.gradient_checkpointing != "auto":
        return [config]
    tried = [(False, False), (True, False), (True, True)]
    if config.train.activation_offloading or platform == "cpu":
        # On a CPU the device's memory is the host's.
        tried = [way for way in tried if way[1] == config.train.activation_offloading]
    return [
        dataclasses.replace(
            config,
            train=dataclasses.replace(
                config.train, gradient_checkpointing=on, activation_offloading=offloading
            ),
        )
        for on, offloading in tried
    ]


def with_checkpointing(job: Job) -> list[Job]:
    """The job with each of its ``candidates``."""
    platform = platform_of(job.mesh)
    return [
        dataclasses.replace(job, config=config, model=with_remat(job.model, config.train))
        for config in candidates(job.config, platform)
    ]


def leaves_margin(peak: int, limit: int, platform: str) -> bool:
    """Whether ``auto`` takes a step with this peak where there is another way."""
    return peak <= (1 - (CPU_MARGIN if platform == "cpu" else MARGIN)) * limit
