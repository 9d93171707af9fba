"""Checkpoints that are written beside the training: what is saved, when, and how a failure ends."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.config import TrainConfig
from jlora.errors import StorageError
from jlora.io import checkpoint
from jlora.run.checkpoints import Checkpoints
from jlora.run.progress import Progress
from jlora.training.state import TrainState


@pytest.fixture
def checkpoints(tmp_path):
    settings = TrainConfig(output_dir=str(tmp_path), save_total_limit=2)
    return Checkpoints(tmp_path, settings, identity={}, base_fingerprint="base")


def state(value):
    return TrainState(jnp.int32(value), {"w": jnp.full(4096, float(value))}, np.full(3, value))


def assert_saved(folder, step, value):
    run = {"identity": {}, "base_fingerprint": "base"}
    tree, extra = checkpoint.restore(folder, step, {"state": state(0)}, **run)
    jax.tree.map(np.testing.assert_array_equal, tree["state"], state(value))
    assert extra["step"] == step


@pytest.fixture
def slow_disk(monkeypatch):
    """An event without which no save begins."""
    go, save = threading.Event(), checkpoint.save

    def waiting(*arguments, **options):
        assert go.wait(60)
        save(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save", waiting)
    return go


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, checkpoints, slow_disk):
    """The next step overwrites the buffers of the saved state before it is on the disk."""
    before, step = state(1), jax.jit(lambda x: x + 1, donate_argnums=0)
    checkpoints.save(before, Progress(step=1))
    jax.tree.map(step, (before.step, before.trainable))
    before.opt_state.fill(7)
    assert before.trainable["w"].is_deleted() and checkpoint.steps(tmp_path) == []
    slow_disk.set()
    checkpoints.wait()
    assert_saved(tmp_path, 1, 1)


def test_a_restored_state_can_be_donated(tmp_path, checkpoints):
    with checkpoints:
        checkpoints.save(state(1), Progress(step=1))
    run = {"identity": {}, "base_fingerprint": "base"}
    tree, _ = checkpoint.restore(tmp_path, 1, {"state": state(0)}, **run)
    old = tree["state"].trainable["w"]
    new = jax.jit(lambda x: x + 1, donate_argnums=0)(old)
    assert old.is_deleted()
    np.testing.assert_array_equal(new, np.full(4096, 2.0))


def test_one_save_at_a_time_in_order(tmp_path, checkpoints):
    with checkpoints:
        for n in range(1, 5):
            checkpoints.save(state(n), Progress(step=n))
            assert n - 1 in (0, *checkpoint.steps(tmp_path))
    assert checkpoint.steps(tmp_path) == [3, 4]
    assert_saved(tmp_path, 4, 4)


@pytest.mark.parametrize("noticed_by", ["wait", "raise_failed", "save", "the end"])
def test_a_save_that_fails_ends_the_run(checkpoints, monkeypatch, noticed_by):
    def full(*arguments, **options):
        raise StorageError("the disk is full")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(StorageError, match="the disk is full"), checkpoints:
        checkpoints.save(state(1), Progress(step=1))
        while noticed_by == "raise_failed":
            checkpoints.raise_failed()
        if noticed_by == "wait":
            checkpoints.wait()
            pytest.fail("goes on")
        if noticed_by == "save":
            checkpoints.save(state(2), Progress(step=2))
            pytest.fail("goes on")


def test_the_last_save_is_finished_before_another_error_is_shown(tmp_path, checkpoints, slow_disk):
    threading.Timer(0.2, slow_disk.set).start()
    with pytest.raises(ZeroDivisionError), checkpoints:
        checkpoints.save(state(1), Progress(step=1))
        raise ZeroDivisionError
    assert checkpoint.steps(tmp_path) == [1]
