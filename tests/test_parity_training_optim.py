"""Schedules compared with transformers; AdamW and gradient clipping compared with torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from schedules import SCHEDULES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from jlora.config import TrainConfig  # noqa: E402
from jlora.training import optim  # noqa: E402

TOTAL, RATE = 30, 2e-3


def schedule_of(optimizer, name, warm, kwargs):
    return transformers.get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warm,
        num_training_steps=TOTAL,
        scheduler_specific_kwargs=dict(kwargs),
    )


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
@pytest.mark.parametrize("warm", [0, 7])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [*SCHEDULES, ("constant", {})],
)
def test_schedules_match_transformers(name, kwargs, warm):
    schedule = schedule_of(torch.optim.SGD([torch.zeros(1)], lr=RATE), name, warm, kwargs)
    config = TrainConfig(
        output_dir="out", learning_rate=RATE, lr_scheduler_type=name, lr_scheduler_kwargs=kwargs,
        warmup_steps=warm, warmup_ratio=0.0,
    )  # fmt: skip
    rate = optim.schedule(config, TOTAL)
    for step in range(TOTAL):
        (expected,) = schedule.get_last_lr()
        np.testing.assert_allclose(float(rate(step)), expected, rtol=1e-5, atol=1e-9)
        schedule.step()


def test_ten_steps_of_adamw_match_torch():
    shapes = {"lora_A": (12, 4), "lora_B": (4, 9), "bias": (9,), "scale": (12,)}
    rng = np.random.default_rng(0)

    def draw(size=1.0):
        return {k: size * rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}

    start, gradients = draw(), [draw(size) for size in np.float32(np.linspace(0.05, 1, 10))]
    config = TrainConfig(
        output_dir="out", learning_rate=0.02, weight_decay=0.1, max_grad_norm=3.0,
        lr_scheduler_type="cosine", warmup_steps=3,
    )  # fmt: skip

    torch_params = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in start.items()}
    groups = [
        {"params": [torch_params["lora_A"], torch_params["lora_B"]], "weight_decay": 0.1},
        {"params": [torch_params["bias"], torch_params["scale"]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.02)
    schedule = schedule_of(optimizer, "cosine", 3, {})
    params = jax.tree.map(jnp.asarray, start)
    transform = optim.make_optimizer(config, TOTAL, params)
    state, norms = transform.init(params), []
    update = jax.jit(transform.update)
    for gradient in gradients:
        for name, p in torch_params.items():
            p.grad = torch.tensor(gradient[name])
        norms.append(float(torch.nn.utils.clip_grad_norm_(torch_params.values(), 3.0)))
        optimizer.step()
        schedule.step()
        with jax.numpy_dtype_promotion("standard"):  # optax does not promote strictly
            updates, state = update(jax.tree.map(jnp.asarray, gradient), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    assert min(norms) < 3.0 < max(norms)  # some steps are clipped, some are not
    for name, p in torch_params.items():
        np.testing.assert_allclose(params[name], p.detach().numpy(), rtol=1e-4, atol=1e-6)
