"""Schedules and optimizers against their formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from schedules import SCHEDULES

from jlora import lora
from jlora.config import LoraConfig, TrainConfig
from jlora.errors import ConfigError
from jlora.training import optim

TOTAL, WARM, RATE = 40, 8, 2e-3


def settings(**changes):
    return TrainConfig(
        **{"output_dir": "out", "learning_rate": RATE, "warmup_ratio": 0.0} | changes
    )


def decayed(name, kwargs, step):
    """The factor after the warm-up, as transformers' ``optimization.py`` has it."""
    progress = (step - WARM) / (TOTAL - WARM)
    cycles = kwargs.get("num_cycles", 0.5)
    cosine = max(0.0, 0.5 * (1 + np.cos(2 * np.pi * cycles * progress)))
    floor = kwargs.get("min_lr_rate", kwargs.get("min_lr", 0) / RATE)
    end = kwargs.get("lr_end", 1e-7) / RATE
    scale = kwargs.get("timescale", WARM)
    return {
        "linear": 1 - progress,
        "cosine": cosine,
        "cosine_with_min_lr": floor + (1 - floor) * cosine,
        "constant_with_warmup": 1.0,
        "polynomial": end + (1 - end) * (1 - progress) ** kwargs.get("power", 1.0),
        "inverse_sqrt": 1 / np.sqrt((step - WARM + scale) / scale),
    }[name]


@pytest.mark.parametrize(("name", "kwargs"), SCHEDULES)
def test_schedules_rise_and_then_follow_their_formula(name, kwargs):
    config = settings(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, warmup_steps=WARM)
    rate = optim.schedule(config, TOTAL)
    got = [float(rate(step)) for step in range(TOTAL + 1)]
    steps = range(WARM, TOTAL + 1)
    expected = [RATE * s / WARM for s in range(WARM)]
    expected += [RATE * decayed(name, kwargs, s) for s in steps]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("name", "kwargs"), [*SCHEDULES, ("constant", {})])
def test_rates_are_bitwise_those_of_the_updates(name, kwargs):
    """SGD changes a weight with gradient -1 by the rate itself."""
    total, schedule = 60, {"lr_scheduler_type": name, "lr_scheduler_kwargs": kwargs}
    config = settings(optim="sgd", max_grad_norm=None, warmup_steps=WARM, **schedule)
    params = {"lora_A": jnp.zeros((1, 1, 1))}
    optimizer = optim.make_optimizer(config, total, params)
    update, state, used = jax.jit(optimizer.update), optimizer.init(params), []
    with jax.numpy_dtype_promotion("standard"):  # optax does not promote strictly
        for _ in range(total):
            change, state = update({"lora_A": -jnp.ones((1, 1, 1))}, state, params)
            used.append(np.asarray(change["lora_A"]).item())
    got = optim.rates(config, total)[:-1]  # the last one is of a step after the run
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.float32(used))


def test_constant_has_no_warm_up():
    rate = optim.schedule(settings(lr_scheduler_type="constant", warmup_steps=WARM), TOTAL)
    assert {float(rate(s)) for s in (0, WARM, TOTAL)} == {float(np.float32(RATE))}


def test_warm_up_is_a_ratio_rounded_up_unless_steps_are_given():
    assert optim.warmup_steps(settings(warmup_ratio=0.03), 101) == 4
    assert optim.warmup_steps(settings(warmup_ratio=0.03, warmup_steps=2), 101) == 2
    # A warm-up as long as the run divides by nothing.
    rate = optim.schedule(settings(lr_scheduler_type="linear", warmup_steps=4), 4)
    np.testing.assert_allclose([float(rate(s)) for s in range(5)], RATE * np.arange(5) / 4, 1e-6)


def tree(seed):
    """Weights that decay and leaves that do not."""
    rng = np.random.default_rng(seed)
    shapes = {"lora_A": (2, 5, 3), "lora_B": (2, 3, 4), "bias": (2, 4), "scale": (2, 5)}
    return {"q_proj": {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}}


def train(config, steps=5):
    """The weights after some steps, and the gradients, clipped, of each."""
    start = tree(0)["q_proj"]
    gradients = [tree(1 + s)["q_proj"] for s in range(steps)]
    params = jax.tree.map(jnp.asarray, {"q_proj": start})
    optimizer = optim.make_optimizer(config, TOTAL, params)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, g):
        updates, state = optimizer.update({"q_proj": g}, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    with jax.numpy_dtype_promotion("standard"):  # optax does not promote strictly
        for g in gradients:
            params, state = step(params, state, g)
    if most := config.max_grad_norm:
        for i, g in enumerate(gradients):
            norm = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in g.values()))
            gradients[i] = {k: leaf * min(1.0, most / norm) for k, leaf in g.items()}
    return start, gradients, params["q_proj"]


def adamw(p, gradients, rates, decay):
    m = v = np.zeros_like(p)
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        p = p * (1 - rate * decay)
        p = p - rate * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-6)
    return p


def lion(p, gradients, rates, decay):
    m = np.zeros_like(p)
    for g, rate in zip(gradients, rates, strict=True):
        p = p - rate * (np.sign(0.8 * m + 0.2 * g) + decay * p)
        m = 0.95 * m + 0.05 * g
    return p


def sgd(p, gradients, rates, decay):
    for g, rate in zip(gradients, rates, strict=True):
        p = p - rate * (g + decay * p)
    return p


def adafactor(p, gradients, rates, decay):
    """Without factors: no dimension here reaches 128 (arXiv 1804.04235, algorithm 4)."""
    v = np.zeros_like(p)
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        beta = 1 - t**-0.8
        v = beta * v + (1 - beta) * (g**2 + 1e-30)
        u = g / np.sqrt(v)
        p = p - rate * (u / max(1.0, np.sqrt(np.mean(u**2))) + decay * p)
    return p


@pytest.mark.parametrize("oracle", [adamw, lion, sgd, adafactor])
@pytest.mark.parametrize(("decay", "clip"), [(0.0, 0.0), (0.3, 1.5)])
def test_optimizers_follow_their_formula(oracle, decay, clip):
    config = settings(
        optim=oracle.__name__,
        learning_rate=0.05,
        lr_scheduler_type="linear",
        weight_decay=decay,
        max_grad_norm=clip,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
    )
    start, gradients, trained = train(config)
    rates = [0.05 * (1 - s / TOTAL) for s in range(len(gradients))]
    for name, p in start.items():
        wanted = decay if name.startswith("lora") else 0.0
        expected = oracle(p.astype(np.float64), [g[name] for g in gradients], rates, wanted)
        np.testing.assert_allclose(trained[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_biases_and_norm_scales_do_not_decay():
    leaves = {"lm_head": {"kernel": jnp.ones((5, 4)), "lora_bias": jnp.ones(4)}, **tree(0)}
    assert optim.group_labels(settings(), leaves) == {
        "lm_head": {"kernel": "decay", "lora_bias": "no_decay"},
        "q_proj": {
            "lora_A": "decay", "lora_B": "decay", "bias": "no_decay", "scale": "no_decay",
        },
    }  # fmt: skip


def test_what_an_adapter_started_from_stays():
    """PiSSA's first A and B are part of the tree; decay must not shrink them."""
    weights = {"q_proj": {k: v for k, v in tree(0)["q_proj"].items() if k.startswith("lora")}}
    adapter = lora.Adapter(weights, LoraConfig(), initial=weights)
    labels = optim.group_labels(settings(), adapter)
    assert set(jax.tree.leaves(labels.initial)) == {"frozen"}
    assert set(jax.tree.leaves(labels.weights)) == {"decay"}
    assert len(optim.trainable_leaves(settings(), adapter)) == 2


@pytest.mark.parametrize(("name", "copies"), [("adamw", 2), ("lion", 1), ("sgd", 0)])
def test_the_state_holds_nothing_of_the_base(name, copies):
    params = {
        "q_proj": {"kernel": jnp.ones((16, 12)), "bias": jnp.ones(12)},
        "norm": {"scale": jnp.ones(16)},
    }
    config = LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only")
    adapter = lora.init_adapter(jax.random.key(0), params, config)
    state = optim.make_optimizer(settings(optim=name), TOTAL, adapter).init(adapter)
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    expected = sorted(leaf.shape for leaf in jax.tree.leaves(adapter)) * copies
    assert sorted(leaf.shape for leaf in arrays) == sorted(expected)
    assert all(leaf.dtype == jnp.float32 for leaf in arrays)


def test_more_steps_than_a_program_can_hold_rates_of_are_refused():
    config = TrainConfig(output_dir="unused")
    with pytest.raises(ConfigError, match="max_steps: 10,000,001 steps"):
        optim.rates(config, 10_000_001)
