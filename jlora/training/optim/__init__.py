"""Optimizers and learning-rate schedules from the settings, as optax transformations.

schedules    the learning rate over the run
eight_bit    moments in 8 bits
paged        moments in host memory
by_name      optimizers of optax by name
groups       which leaf is updated how: weight decay, LoRA+, LoRA-FA
lora_fa      A without a gradient, B's preconditioned
chain        the optimizer of a run
"""

from jlora.training.optim.chain import OPTIMIZERS, check_optimizer, make_optimizer
from jlora.training.optim.groups import frozen_kinds, group_labels, is_frozen, trainable_leaves
from jlora.training.optim.lora_fa import without_gradient_of_a
from jlora.training.optim.schedules import schedule, warmup_steps

__all__ = [
    "OPTIMIZERS",
    "check_optimizer",
    "frozen_kinds",
    "group_labels",
    "is_frozen",
    "make_optimizer",
    "schedule",
    "trainable_leaves",
    "warmup_steps",
    "without_gradient_of_a",
]
