"""metrics.jsonl: always valid JSON, without gaps or repetitions after an interruption."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.errors import DataError
from jlora.ui import metrics_log
from jlora.ui.metrics_log import MetricsLog


def test_lines_are_json_objects_that_begin_with_their_step(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(1, loss=jnp.float32(0.5), grad_norm=np.float32(2), done=False)
        assert path.read_text() == '{"step": 1, "loss": 0.5, "grad_norm": 2.0, "done": false}\n'
        log.write(2, eval_loss=0.25)
    assert metrics_log.read_metrics(path) == [
        {"step": 1, "loss": 0.5, "grad_norm": 2.0, "done": False},
        {"step": 2, "eval_loss": 0.25},
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), jnp.float32(-jnp.inf)])
def test_numbers_that_json_lacks_are_null(tmp_path, value):
    with MetricsLog(tmp_path / "m.jsonl") as log:
        log.write(1, loss=value)
    line = (tmp_path / "m.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None}


def test_resuming_drops_later_lines_and_a_torn_one(tmp_path):
    path = tmp_path / "m.jsonl"
    with MetricsLog(path) as log:
        for step in (1, 2, 3):
            log.write(step, loss=1.0 / step)
    complete = path.read_bytes()
    path.write_bytes(complete + b'{"step": 4, "lo')
    assert [line["step"] for line in metrics_log.read_metrics(path)] == [1, 2, 3]
    with MetricsLog(path) as log:
        log.truncate_to(2)
        log.write(3, loss=1.0 / 3)
    assert path.read_bytes() == complete


def test_a_second_line_of_one_step_is_dropped_if_not_counted(tmp_path):
    path = tmp_path / "m.jsonl"
    with MetricsLog(path) as log:
        log.write(3, loss=1.0)
        log.write(3, eval_loss=2.0)
        log.truncate_to(1)
    assert metrics_log.read_metrics(path) == [{"step": 3, "loss": 1.0}]


def test_a_log_without_later_lines_is_left_unchanged(tmp_path):
    path = tmp_path / "m.jsonl"
    with MetricsLog(path) as log:
        log.write(1, loss=1.0)
        before = path.stat().st_ino
        log.truncate_to(1)
    assert path.stat().st_ino == before


def test_missing_lines_are_counted_and_a_deleted_file_is_made_again(tmp_path):
    path = tmp_path / "m.jsonl"
    with MetricsLog(path) as log:
        log.write(1, loss=1.0)
        assert log.truncate_to(1) == 1
        assert log.truncate_to(3) == 1
        path.unlink()
        assert log.truncate_to(0) == 0 and not path.exists()
        assert log.truncate_to(3) == 0 and metrics_log.read_metrics(path) == []
    assert MetricsLog(path, enabled=False).truncate_to(3) == 3


def test_starting_over_drops_everything(tmp_path):
    with MetricsLog(tmp_path / "m.jsonl") as log:
        log.truncate_to(0)
        log.write(0, eval_loss=1.0)
        log.truncate_to(0)
    assert metrics_log.read_metrics(tmp_path / "m.jsonl") == []


def test_other_processes_write_nothing(tmp_path):
    with MetricsLog(tmp_path / "m.jsonl", enabled=False) as log:
        log.write(1, loss=1.0)
        log.truncate_to(0)
        log.sync()
    assert not (tmp_path / "m.jsonl").exists()


@pytest.mark.parametrize("line", ["[1]", "{", '{"loss": 1}', '{"step": "x"}'])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(DataError) as caught:
        metrics_log.read_metrics(path)
    assert caught.value.where == f"{path}:2"
