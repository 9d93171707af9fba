"""Optimizers of optax by name: what optax gives when called directly, and what is refused."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from jlora.config import TrainConfig
from jlora.errors import ConfigError
from jlora.training import optim
from jlora.training.optim.by_name import optimizers

RATE = 1e-2


def settings(name, args=None, **changes):
    fixed = {"output_dir": "o", "learning_rate": RATE, "lr_scheduler_type": "constant"}
    more = {"optim_args": args or {}, "max_grad_norm": None}
    return TrainConfig(**fixed | more | {"optim": name} | changes)  # pyright: ignore


def draw(seed):
    rng = np.random.default_rng(seed)
    shapes = {"lora_A": (2, 6, 3), "bias": (2, 6)}
    return {k: jnp.asarray(rng.standard_normal(s).astype(np.float32)) for k, s in shapes.items()}


def after_three_steps(transform):
    params = draw(0)
    with jax.numpy_dtype_promotion("standard"):  # optax does not promote strictly
        state = transform.init(params)
        for i in range(1, 4):
            updates, state = transform.update(draw(i), state, params)
            params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(
    ("name", "args", "direct"),
    [
        ("optax.adabelief", {}, optax.adabelief(RATE)),
        ("optax.adam", {"b1": 0.8, "nesterov": True}, optax.adam(RATE, b1=0.8, nesterov=True)),
        ("optax.sgd", {"momentum": 0.9}, optax.sgd(RATE, momentum=0.9)),
        ("optax.adam", {"mu_dtype": "bfloat16"}, optax.adam(RATE, mu_dtype="bfloat16")),
        ("optax.contrib.ademamix", {}, optax.contrib.ademamix(RATE, weight_decay=0.0)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_name_gives_what_optax_gives(name, args, direct):
    actual = after_three_steps(optim.make_optimizer(settings(name, args), 10, draw(0)))
    chex.assert_trees_all_close(actual, after_three_steps(direct), rtol=1e-6, atol=1e-7)


def test_weight_decay_is_the_settings_own_and_off_for_biases():
    config = settings("optax.lamb", weight_decay=0.3)
    actual = after_three_steps(optim.make_optimizer(config, 10, draw(0)))
    for name, decay in (("lora_A", 0.3), ("bias", 0.0)):
        alone = after_three_steps(optax.lamb(RATE, weight_decay=decay))
        np.testing.assert_allclose(actual[name], alone[name], rtol=1e-6)
    with pytest.raises(ConfigError, match=r"adabelief has no weight decay\n.*set it to 0"):
        optim.check_optimizer(settings("optax.adabelief", weight_decay=0.1))


@pytest.mark.parametrize(
    ("name", "args", "where", "message"),
    [
        ("optax.adabeleif", {}, "optim", "not an optimizer of optax.*optax.adabelief"),
        ("optax.chain", {}, "optim", "not an optimizer of optax"),
        ("optax.scale_by_rprop", {}, "optim", "not an optimizer of optax"),
        ("optax.contrib.schedule_free_adamw", {}, "optim", "not an optimizer of optax"),
        ("optax.jnp.linalg", {}, "optim", "not an optimizer of optax"),
        ("optax.__name__", {}, "optim", "not an optimizer of optax"),
        ("optax.adam", {"beta1": 0.9}, "optim_args", "has no argument 'beta1'"),
        ("optax.adam", {"learning_rate": 1}, "optim_args", "write train.learning_rate"),
        ("optax.lamb", {"weight_decay": 1}, "optim_args", "write train.weight_decay"),
        ("optax.adam", {"b1": "high"}, "optim", r"optax.adam\(b1='high'\) cannot train"),
        ("optax.lbfgs", {}, "optim", r"optax.lbfgs\(\) cannot train.*value"),
    ],
)
def test_what_cannot_be_is_refused_before_the_run(name, args, where, message):
    with pytest.raises(ConfigError, match=f"(?s)train.{where}.*{message}") as caught:
        optim.check_optimizer(settings(name, args))
    assert caught.value.exit_code == 2 and caught.value.fix


def test_every_built_in_optimizer_and_nearly_every_one_of_optax_passes_the_check():
    refused = {}
    for name in optim.OPTIMIZERS:
        optim.check_optimizer(settings(name))
    for name in optimizers():
        try:
            optim.check_optimizer(settings(name))
        except ConfigError as error:
            refused[name] = str(error)
    assert {"optax.lbfgs", "optax.contrib.momo", "optax.contrib.sophia"} <= set(refused)
    assert len(refused) <= 0.3 * len(optimizers())
