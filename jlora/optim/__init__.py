"""Optimizers and learning-rate schedules from the settings, as optax transformations.

schedules    the learning rate over the run
eight_bit    moments in 8 bits
paged        moments in host memory
by_name      optimizers of optax by name
chain        the optimizer of a run
"""

from jlora.optim.chain import OPTIMIZERS, check_optimizer, decay_groups, make_optimizer
from jlora.optim.schedules import schedule, warmup_steps

__all__ = [
    "OPTIMIZERS",
    "check_optimizer",
    "decay_groups",
    "make_optimizer",
    "schedule",
    "warmup_steps",
]
