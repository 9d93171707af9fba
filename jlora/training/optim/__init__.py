"""Optimizers and learning-rate schedules from the settings, as optax transformations.

schedules    learning-rate schedules
eight_bit    moments in 8 bits
paged        moments in host memory
by_name      optimizers of optax by name
groups       parameter groups: weight decay, LoRA+, LoRA-FA
lora_fa      LoRA-FA: A is frozen, B's gradient is preconditioned
chain        the optimizer of a run
"""

from jlora.training.optim.chain import OPTIMIZERS, check_optimizer, make_optimizer
from jlora.training.optim.groups import frozen_kinds, group_labels, is_frozen, trainable_leaves
from jlora.training.optim.lora_fa import without_gradient_of_a
from jlora.training.optim.schedules import rates, schedule, warmup_steps

__all__ = [
    "OPTIMIZERS",
    "check_optimizer",
    "frozen_kinds",
    "group_labels",
    "is_frozen",
    "make_optimizer",
    "rates",
    "schedule",
    "trainable_leaves",
    "warmup_steps",
    "without_gradient_of_a",
]
