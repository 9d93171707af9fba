"""The checks that end a run that diverges or does not learn."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from test_run_progress import metrics
from test_run_step_counts import counts_of

from jlora.errors import DivergedError
from jlora.run.divergence import check_evaluation, check_finite, check_learning
from jlora.run.progress import Progress


def test_a_non_finite_loss_has_diverged():
    progress = Progress(step=6)
    check_finite(metrics(), progress, counts_of())
    diverged = metrics(np.nan, finite=False, norm=np.inf)
    progress.count_step(diverged)
    with pytest.raises(DivergedError, match="loss nan, gradient norm inf") as caught:
        check_finite(diverged, progress, counts_of())
    assert caught.value.where == "step 7" and "learning_rate" in caught.value.fix
    check_evaluation(3.0, progress)
    with pytest.raises(DivergedError, match="eval_loss nan"):
        check_evaluation(np.nan, progress)


def test_float16_may_overflow_but_not_a_hundred_times_in_a_row():
    progress, counts = Progress(), counts_of(fp16=True, bf16=False)
    bad = metrics(finite=False, norm=np.inf)
    for values in (*[bad] * 99, metrics(), *[bad] * 99):
        progress.count_step(values)
        check_finite(values, progress, counts)
    before = dataclasses.asdict(progress)
    check_finite(bad, progress, counts)
    assert dataclasses.asdict(progress) == before  # checking does not count
    progress.count_step(bad)
    with pytest.raises(DivergedError):
        check_finite(bad, progress, counts)


TREE = {"q_proj": {"lora_A": jnp.ones(2), "lora_B": jnp.ones(2)}}


@pytest.mark.parametrize(("warm", "updates"), [(0, 2), (5, 3)])
def test_leaves_without_a_gradient_are_named_in_time(warm, updates):
    counts, progress = counts_of(warmup_steps=warm), Progress()
    for _ in range(updates - 1):
        progress.count_step(metrics(has_gradient=(False, True)))
        check_learning(progress, TREE, counts)
    progress.count_step(metrics(has_gradient=(False, True)))
    with pytest.raises(DivergedError, match=r"1 of 2 trainable leaves: q_proj\.lora_A") as caught:
        check_learning(progress, TREE, counts)
    assert caught.value.where == f"step {updates}"


def test_a_gradient_in_any_update_is_enough():
    counts = counts_of(warmup_steps=5)
    for has_gradient in itertools.permutations([(False, True), (True, False), (False, False)]):
        progress = Progress()
        for of_step in has_gradient:
            progress.count_step(metrics(has_gradient=of_step))
            check_learning(progress, TREE, counts)
    # An overflowed gradient is no evidence, and its step is not an update.
    progress = Progress()
    for finite, has_gradient in [(False, (True, True))] * 4 + [(True, (False, True))] * 2:
        progress.count_step(metrics(has_gradient=has_gradient, finite=finite))
        check_learning(progress, TREE, counts)
    progress.count_step(metrics(has_gradient=(False, True)))
    with pytest.raises(DivergedError, match="lora_A"):
        check_learning(progress, TREE, counts)


def test_leaves_that_are_frozen_need_no_gradient():
    counts, progress = (
        dataclasses.replace(counts_of(warmup_steps=5), frozen=("lora_A",)),
        Progress(),
    )
    for _ in range(3):
        progress.count_step(metrics(has_gradient=(False, True)))
    check_learning(progress, TREE, counts)
    progress = Progress()
    for _ in range(3):
        progress.count_step(metrics(has_gradient=(False, False)))
    with pytest.raises(DivergedError, match=r"1 of 2 trainable leaves: q_proj\.lora_B"):
        check_learning(progress, TREE, counts)
