"""The arithmetic of a run's plan, what is counted along the way, and the checks on each step."""

import dataclasses
import itertools
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.config import (
    Config,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    SourceConfig,
    TrainConfig,
)
from jlora.distributed import sharding
from jlora.errors import DivergedError
from jlora.run import progress as module
from jlora.run.progress import Meter, Plan, Progress, check_evaluation, check_finite, check_learning

SOURCE = SourceConfig(path="rows.jsonl", format="messages")


def settings(**train):
    return Config(
        model=ModelConfig(name_or_path="base"),
        lora=LoraConfig(),
        data=DataConfig(train=[SOURCE], eval=[SOURCE]),
        train=TrainConfig(**{"output_dir": "out", "warmup_ratio": 0.0} | train),
    )


def plan_of(rows=100, mesh=None, **train):
    """The plan of a run over ``rows`` rows."""
    mesh = sharding.make_mesh(mesh or MeshConfig())
    return Plan.of(settings(**train), mesh, lambda batch: -(-rows // batch))


# Plan


def test_a_step_is_rows_of_a_device_times_devices_times_accumulation():
    batch = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    plan = plan_of(mesh=MeshConfig(data=2, fsdp=2, tensor=2), num_train_epochs=3, **batch)
    assert plan == Plan(
        rows_per_step=3 * 4 * 2, eval_rows=3 * 4, accumulation=2, steps_per_epoch=5,
        total_steps=15, fp16=False, learning_by=2,
    )  # fmt: skip
    plan = plan_of(per_device_eval_batch_size=5, **batch)
    assert (plan.rows_per_step, plan.eval_rows) == (3 * 8 * 2, 5 * 8)


def test_a_run_is_epochs_or_max_steps():
    batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    assert plan_of(num_train_epochs=0.5, **batch).total_steps == 7  # of 13 an epoch, rounded up
    plan = plan_of(num_train_epochs=3, max_steps=4, **batch)
    assert (plan.total_steps, plan.steps_per_epoch) == (4, 13)


def test_float16_is_given_the_warm_up_to_learn_in():
    warm = {"warmup_steps": 20, "max_steps": 100}
    assert plan_of(fp16=True, bf16=False, **warm).fp16
    assert plan_of(fp16=True, bf16=False, **warm).learning_by == 23
    assert plan_of(**warm).learning_by == 3
    assert plan_of(warmup_ratio=0.0, max_steps=100).learning_by == 2


# Progress


def metrics(loss=1.0, targets=10, alive=(True, True), finite=True, norm=0.5):
    values = {"loss": loss, "grad_norm": norm, "target_tokens": targets, "tokens": 2 * targets}
    arrays = {k: np.asarray(v) for k, v in values.items()}
    flags = {"finite": finite, "weights_finite": True, "has_gradient": alive}
    return arrays | {name: np.asarray(value) for name, value in flags.items()}


def test_a_line_has_the_mean_over_all_tokens_since_the_last_one():
    plan, counted = plan_of(rows=128), Progress()  # 128 rows a step: one step an epoch
    plan = dataclasses.replace(plan, steps_per_epoch=3)
    counted.add(metrics(loss=1.0, targets=10, norm=7.0))
    counted.add(metrics(loss=4.0, targets=30, norm=0.5))
    assert counted.line(1e-3, plan) == {
        "loss": 3.25, "learning_rate": 1e-3, "grad_norm": 0.5, "epoch": 0.6667, "tokens": 80,
    }  # fmt: skip
    counted.add(metrics(loss=2.0, targets=5))
    line = counted.line(1e-3, plan)
    assert (line["loss"], line["epoch"], line["tokens"]) == (2.0, 1.0, 90)
    assert (counted.step, counted.updates) == (3, 3)


def test_an_overflow_is_no_update_and_spoils_no_mean():
    plan, counted = plan_of(), Progress()
    counted.add(metrics(loss=2.0))
    counted.add(metrics(loss=np.nan, finite=False, norm=np.inf, alive=(True, True)))
    assert counted.line(1e-3, plan)["loss"] == 2.0
    assert (counted.step, counted.updates) == (2, 1)


def test_progress_survives_a_checkpoint():
    counted = Progress()
    counted.add(metrics())
    assert Progress(**dataclasses.asdict(counted)) == counted


def test_early_stopping_counts_evaluations_without_improvement():
    patient = settings(early_stopping_patience=2, early_stopping_threshold=0.1).train
    counted = Progress()
    history = []
    for loss in (3.0, 2.5, 2.45, 2.0, 1.95, 1.91):
        best = counted.note_evaluation(loss, patient)
        history.append((best, counted.best_loss, counted.stopped_early))
    assert history == [
        (True, 3.0, False),
        (True, 2.5, False),
        (False, 2.5, False),  # not by more than 0.1
        (True, 2.0, False),
        (False, 2.0, False),
        (False, 2.0, True),
    ]


def test_without_patience_nothing_stops():
    counted = Progress()
    for loss in (1.0, 2.0, 3.0, 4.0):
        counted.note_evaluation(loss, settings().train)
    assert not counted.stopped_early and counted.evaluations_since_best == 3


# Meter


def clock(*times):
    """``time.monotonic`` as these times, in order."""
    return mock.patch.object(module.time, "monotonic", mock.Mock(side_effect=times))


def test_tokens_a_second_without_the_first_step_and_the_pauses():
    meter = Meter()
    with clock(100.0, 103.0, 105.0, 110.0, 112.0):
        meter.add(1000)  # ends at 100; how long it took, compiling, is not known
        assert meter.rate() == {}
        meter.add(40)
        with meter.paused():  # from 103 to 105
            pass
        meter.add(20)
        assert meter.rate() == {"tokens_per_second": 60 / 8}  # at 110
        assert meter.rate() == {}
        meter.add(50)
        assert meter.rate() == {"tokens_per_second": 50 / 2}  # at 112


# Checks


def test_what_is_no_number_diverged():
    counted = Progress(step=6)
    check_finite(metrics(), counted, plan_of())
    with pytest.raises(DivergedError, match="loss nan, gradient norm inf") as caught:
        check_finite(metrics(np.nan, finite=False, norm=np.inf), counted, plan_of())
    assert caught.value.where == "step 7" and "learning_rate" in caught.value.fix
    check_evaluation(3.0, counted)
    with pytest.raises(DivergedError, match="eval_loss nan"):
        check_evaluation(np.nan, counted)


def test_float16_may_overflow_but_not_a_hundred_times_in_a_row():
    counted, plan = Progress(), plan_of(fp16=True, bf16=False)
    bad = metrics(finite=False, norm=np.inf)
    for values in (*[bad] * 99, metrics(), *[bad] * 99):
        check_finite(values, counted, plan)
    with pytest.raises(DivergedError):
        check_finite(bad, counted, plan)


TREE = {"q_proj": {"lora_A": jnp.ones(2), "lora_B": jnp.ones(2)}}


@pytest.mark.parametrize(("warm", "updates"), [(0, 2), (5, 3)])
def test_leaves_that_no_gradient_reaches_are_named_in_time(warm, updates):
    plan, counted = plan_of(warmup_steps=warm), Progress()
    for _ in range(updates - 1):
        counted.add(metrics(alive=(False, True)))
        check_learning(counted, TREE, plan)
    counted.add(metrics(alive=(False, True)))
    with pytest.raises(DivergedError, match=r"1 of 2 trainable leaves: q_proj\.lora_A") as caught:
        check_learning(counted, TREE, plan)
    assert caught.value.where == f"step {updates}"


def test_a_gradient_in_any_update_is_enough():
    plan = plan_of(warmup_steps=5)
    for alive in itertools.permutations([(False, True), (True, False), (False, False)]):
        counted = Progress()
        for one in alive:
            counted.add(metrics(alive=one))
            check_learning(counted, TREE, plan)
    # A gradient that overflowed shows nothing, and its step is no update.
    counted = Progress()
    for finite, alive in [(False, (True, True))] * 4 + [(True, (False, True))] * 2:
        counted.add(metrics(alive=alive, finite=finite))
        check_learning(counted, TREE, plan)
    counted.add(metrics(alive=(False, True)))
    with pytest.raises(DivergedError, match="lora_A"):
        check_learning(counted, TREE, plan)


def test_leaves_that_are_frozen_need_no_gradient():
    plan, counted = dataclasses.replace(plan_of(warmup_steps=5), frozen=("lora_A",)), Progress()
    for _ in range(3):
        counted.add(metrics(alive=(False, True)))
    check_learning(counted, TREE, plan)
    counted = Progress()
    for _ in range(3):
        counted.add(metrics(alive=(False, False)))
    with pytest.raises(DivergedError, match=r"1 of 2 trainable leaves: q_proj\.lora_B"):
        check_learning(counted, TREE, plan)
