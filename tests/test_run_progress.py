"""What is counted over steps, and the meter of tokens per second."""

import dataclasses
import json
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from test_run_step_counts import counts_of, settings

from jlora.errors import DataError
from jlora.run import progress as module
from jlora.run.progress import Progress, ThroughputMeter


def metrics(loss=1.0, targets=10, has_gradient=(True, True), finite=True, norm=0.5):
    values = {"loss": loss, "grad_norm": norm, "target_tokens": targets, "tokens": 2 * targets}
    arrays = {k: np.asarray(v) for k, v in values.items()}
    flags = {"finite": finite, "weights_finite": True, "has_gradient": has_gradient}
    return arrays | {name: np.asarray(value) for name, value in flags.items()}


def test_a_line_has_the_mean_over_all_tokens_since_the_last_one():
    counts, progress = counts_of(rows=128), Progress()  # 128 rows per step: one step per epoch
    counts = dataclasses.replace(counts, steps_per_epoch=3)
    progress.count_step(metrics(loss=1.0, targets=10, norm=7.0))
    progress.count_step(metrics(loss=4.0, targets=30, norm=0.5))
    expected = {
        "loss": 3.25, "learning_rate": 1e-3, "grad_norm": 0.5, "epoch": 0.6667, "tokens": 80,
    }  # fmt: skip
    assert progress.training_line(1e-3, counts) == expected
    assert progress.training_line(1e-3, counts) == expected  # reading changes nothing
    progress.start_interval()
    progress.count_step(metrics(loss=2.0, targets=5))
    line = progress.training_line(1e-3, counts)
    assert (line["loss"], line["epoch"], line["tokens"]) == (2.0, 1.0, 90)
    assert (progress.step, progress.updates) == (3, 3)


def test_an_overflow_counts_as_no_update_and_leaves_the_mean():
    counts, progress = counts_of(), Progress()
    progress.count_step(metrics(loss=2.0))
    progress.count_step(metrics(loss=np.nan, finite=False, norm=np.inf, has_gradient=(True, True)))
    assert progress.training_line(1e-3, counts)["loss"] == 2.0
    assert (progress.step, progress.updates) == (2, 1)


def test_progress_survives_a_checkpoint():
    progress = Progress()
    progress.count_step(metrics())
    assert (
        Progress.from_checkpoint(json.loads(json.dumps(dataclasses.asdict(progress)))) == progress
    )


def test_a_checkpoint_of_another_version_is_refused():
    saved = dataclasses.asdict(Progress())
    saved["alive"] = saved.pop("has_gradient")
    with pytest.raises(DataError, match="alive, has_gradient: the checkpoint was") as caught:
        Progress.from_checkpoint(saved)
    assert caught.value.exit_code == 65


def test_early_stopping_counts_evaluations_without_improvement():
    patient = settings(early_stopping_patience=2, early_stopping_threshold=0.1).train
    progress = Progress()
    history = []
    for loss in (3.0, 2.5, 2.45, 2.0, 1.95, 1.91):
        best = progress.is_best(loss, patient)
        progress.count_evaluation(loss, patient)
        history.append((best, progress.best_loss, progress.stopped_early))
    assert history == [
        (True, 3.0, False),
        (True, 2.5, False),
        (False, 2.5, False),  # not by more than 0.1
        (True, 2.0, False),
        (False, 2.0, False),
        (False, 2.0, True),
    ]


def test_without_patience_nothing_stops():
    progress = Progress()
    for loss in (1.0, 2.0, 3.0, 4.0):
        progress.count_evaluation(loss, settings().train)
    assert not progress.stopped_early and progress.evaluations_since_best == 3


def clock(*times):
    """Replaces ``time.monotonic`` by these times, in order."""
    return mock.patch.object(module.time, "monotonic", mock.Mock(side_effect=times))


def array(ready):
    return SimpleNamespace(is_ready=lambda: ready)


def test_tokens_per_second_exclude_the_first_step_and_pauses():
    meter = ThroughputMeter()
    with clock(100.0, 103.0, 105.0, 106.0, 110.0, 112.0):
        for _ in range(4):
            meter.dispatched(array(ready=False))
        meter.completed(1000)  # ends at 100; its duration, with compilation, is unknown
        assert meter.measure_and_restart() == {}
        meter.completed(40)  # at 103
        with meter.paused():  # from 105 to 106
            pass
        meter.completed(20)  # at 110
        assert meter.measure_and_restart() == {"tokens_per_second": round(60 / 9, 1)}
        assert meter.measure_and_restart() == {}
        meter.completed(50)  # at 112
        assert meter.measure_and_restart() == {"tokens_per_second": 50 / 2}


@pytest.mark.parametrize("synchronous", [True, False])
def test_a_rate_is_that_of_the_steps_whenever_they_are_fetched(synchronous):
    """The order of train_loop, each step 2 s of 10 tokens; the loop waits for steps 3 and 6.

    A dispatch runs its step, or returns at once and the fetch waits: the rate is the same.
    """
    now, meter, rates = [0.0], ThroughputMeter(), []
    ends = {step: 2.0 * step for step in range(1, 7)}

    def dispatch(step):
        now[0] = ends[step] if synchronous else now[0]
        meter.dispatched(array(ready=synchronous))

    def fetch(step):
        now[0] = max(now[0], ends[step])
        meter.completed(10)
        rates.append(meter.measure_and_restart())

    with mock.patch.object(module.time, "monotonic", lambda: now[0]):
        unfetched = None
        for step in ends:
            dispatch(step)
            if unfetched:
                fetch(unfetched)
            unfetched = step
            if step in (3, 6):
                fetch(step)
                unfetched = None
    assert rates == [{}, *[{"tokens_per_second": 5.0}] * 5]


def test_without_time_between_steps_there_is_no_rate():
    meter = ThroughputMeter()
    with clock(1.0, 1.0):
        for _ in range(2):
            meter.dispatched(array(ready=False))
            meter.completed(10)
    assert meter.measure_and_restart() == {}
