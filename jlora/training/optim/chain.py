"""The optimizer of a run, from the settings: clipping, moments, weight decay, learning rate.

Names, defaults and formulas are transformers' (``TrainingArguments``); the moments in 8 bits and in
host memory are those of bitsandbytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jlora.config import OPTAX, TrainConfig
from jlora.training.optim.by_name import from_optax, refused
from jlora.training.optim.eight_bit import eight_bit
from jlora.training.optim.groups import FROZEN, group_labels, lr_multipliers
from jlora.training.optim.lora_fa import precondition_b
from jlora.training.optim.paged import paged
from jlora.training.optim.schedules import schedule


def make_optimizer(
    config: TrainConfig, total_steps: int, trainable: Any
) -> optax.GradientTransformation:
    """Clipping by the global norm, LoRA-FA, then the optimizer on each group of leaves.

    Args:
      config: the ``train`` section.
      total_steps: optimizer steps of the whole run, at which the schedule ends.
      trainable: the trainable tree, possibly abstract; it determines the groups. LoRA+ and
        LoRA-FA need an Adapter.

    Raises:
      ConfigError: see ``from_optax``.
    """
    rate = schedule(config, total_steps)
    make = from_optax if config.optim.startswith(OPTAX) else OPTIMIZERS[config.optim]
    groups: dict[Hashable, optax.GradientTransformation] = {FROZEN: optax.set_to_zero()}
    for prefix, factor in lr_multipliers(config).items():
        group_rate = _times(factor, rate)
        groups[f"{prefix}decay"] = make(config, group_rate, config.weight_decay)
        groups[f"{prefix}no_decay"] = make(config, group_rate, 0.0)
    clip = (
        optax.clip_by_global_norm(config.max_grad_norm)
        if config.max_grad_norm
        else optax.identity()
    )
    # Clipped before the groups: the norm is that of all gradients together. The groups divide what
    # is trained. To partition one tree with the base in it would compute the base's gradient first,
    # and fail on uint8 leaves.
    steps = [clip, optax.partition(groups, group_labels(config, trainable))]
    if config.lorafa:
        # After clipping: PEFT's optimizer preconditions gradients that the trainer has clipped.
        steps.insert(1, precondition_b())
    return optax.chain(*steps)


def _times(factor: float, rate: optax.Schedule) -> optax.Schedule:
    return rate if factor == 1.0 else lambda step: factor * rate(step)


def check_optimizer(config: TrainConfig) -> None:
    """Traces a step on two small leaves, to find wrong settings before a model is loaded.

    Raises ConfigError: see ``from_optax``.
    """
    params = {"kernel": jnp.zeros((1, 2, 2)), "bias": jnp.zeros((1, 2))}
    # LoRA-FA needs an Adapter, and no setting of it can be wrong.
    optimizer = make_optimizer(dataclasses.replace(config, lorafa=False), 1, params)
    try:
        with jax.numpy_dtype_promotion("standard"):  # optax does not promote strictly
            state = jax.eval_shape(optimizer.init, params)
            jax.eval_shape(optimizer.update, params, state, params)
    except Exception as error:
        raise refused(config, error) from error


def _adam(config: TrainConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.adam_beta1, config.adam_beta2, config.adam_epsilon)


def _lion(config: TrainConfig) -> optax.GradientTransformation:
    return optax.scale_by_lion(config.adam_beta1, config.adam_beta2)


def _decoupled(moments: Callable[[TrainConfig], optax.GradientTransformation], *storage: Callable):
    """Decoupled weight decay (AdamW); ``storage`` wraps ``moments`` to store them another way."""

    def make(config: TrainConfig, rate: optax.Schedule, decay: float):
        scaled = moments(config)
        # The first wrapper is the innermost: paged 8-bit moments are quantized before they move.
        for wrapper in storage:
            scaled = wrapper(scaled)
        return optax.chain(
            scaled, optax.add_decayed_weights(decay), optax.scale_by_learning_rate(rate)
        )

    return make


def _sgd(config: TrainConfig, rate: optax.Schedule, decay: float):
    # As in torch's SGD, where decay is a part of the gradient.
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))


def _adafactor(config: TrainConfig, rate: optax.Schedule, decay: float):
    # Without a rate in adafactor, so that the rate scales the decay too, as in transformers.
    # Its trainer also turns off Adafactor's scale_parameter and relative_step.
    scaled = optax.adafactor(None, multiply_by_parameter_scale=False, clipping_threshold=1.0)
    decayed = optax.chain(optax.scale(-1.0), optax.add_decayed_weights(decay))
    return optax.chain(scaled, decayed, optax.scale_by_learning_rate(rate))


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _decoupled(_adam),
    "adamw_8bit": _decoupled(_adam, eight_bit),
    "paged_adamw_32bit": _decoupled(_adam, paged),
    "paged_adamw_8bit": _decoupled(_adam, eight_bit, paged),
    "lion": _decoupled(_lion),
    "lion_8bit": _decoupled(_lion, eight_bit),
    "paged_lion_32bit": _decoupled(_lion, paged),
    "paged_lion_8bit": _decoupled(_lion, eight_bit, paged),
    "adafactor": _adafactor,
    "sgd": _sgd,
}
