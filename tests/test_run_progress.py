"""What is counted over steps, and the meter of tokens per second."""

import dataclasses
import json
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


def test_tokens_per_second_exclude_the_first_step_and_pauses():
    meter = ThroughputMeter()
    with clock(100.0, 103.0, 105.0, 110.0, 112.0):
        meter.add(1000)  # ends at 100; its duration, with compilation, is unknown
        assert meter.measure_and_restart() == {}
        meter.add(40)
        with meter.paused():  # from 103 to 105
            pass
        meter.add(20)
        assert meter.measure_and_restart() == {"tokens_per_second": 60 / 8}  # at 110
        assert meter.measure_and_restart() == {}
        meter.add(50)
        assert meter.measure_and_restart() == {"tokens_per_second": 50 / 2}  # at 112
