"""A run on many devices, in one process or two, logs and gives what one device does."""

import functools
import signal
import socket
import time

import numpy as np
import pytest
from safetensors.numpy import load
from tiny_runs import QUANTIZED, RANDOM_AND_TIMED, Place, chat, write_rows

from jlora.ui import metrics_log

MESHES = {
    "fsdp": {"mesh.data": 1, "mesh.fsdp": 8},
    "cube": {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
}
STEPS, LONG = 5, 20
GLOBAL = 8  # rows of a micro-batch over all devices
METHODS = {"lora": None, "qlora": {**QUANTIZED, "bnb_4bit_compute_dtype": "float32"}}


def settings(method, steps=STEPS, per_device=GLOBAL):
    sections = RANDOM_AND_TIMED | {
        "train": {
            **RANDOM_AND_TIMED["train"],
            "max_steps": steps,
            "per_device_train_batch_size": per_device,
            "logging_steps": 1,
            "eval_steps": 3,
            "save_steps": None,
        },
        "evaluate": {"samples": 0},
    }
    if method == "lora":
        return sections | {"data": {"eval": []}}
    return sections | {"quantization": METHODS[method]}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_base, tiny_cache):
    """The runs on one device, by method, each made when it is first asked for."""

    @functools.cache
    def of(method):
        place = Place(tmp_path_factory.mktemp(method), tiny_base, tiny_cache)
        place.run(**settings(method))
        return place

    return of


def assert_same_run(place, expected, tolerance=1e-5):
    got, wanted = place.log(), expected.log()
    assert [sorted(line) for line in got] == [sorted(line) for line in wanted]
    for name in ("step", "epoch", "tokens", "learning_rate"):
        assert [line.get(name) for line in got] == [line.get(name) for line in wanted]
    for name in ("loss", "grad_norm", "eval_loss"):
        values = [[line[name] for line in lines if name in line] for lines in (got, wanted)]
        np.testing.assert_allclose(*values, rtol=tolerance, err_msg=name)
    trained, wanted = load(place.adapter()), load(expected.adapter())
    assert trained.keys() == wanted.keys()
    for name, value in trained.items():
        np.testing.assert_allclose(value, wanted[name], atol=2e-4, err_msg=name)


# Between them every axis of the mesh and both methods; test_devices has all meshes.
@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "method"), [("fsdp", "lora"), ("cube", "qlora")])
def test_eight_devices_train_as_one(place, alone, mesh, method):
    sizes = MESHES[mesh]
    replicas = sizes["mesh.data"] * sizes.get("mesh.fsdp", 1)
    overrides = [f"{axis}={size}" for axis, size in sizes.items()]
    place.run(*overrides, devices=8, **settings(method, per_device=GLOBAL // replicas))
    expected = alone(method)
    assert expected.losses()[-1] < expected.losses()[0]
    assert_same_run(place, expected)


def start_two(place, *arguments):
    """Two processes of two devices each, on one mesh: data 2, fsdp 2."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {
        "JLORA_COORDINATOR": f"127.0.0.1:{port}",
        "JLORA_NUM_PROCESSES": "2",
        "JAX_NUM_CPU_DEVICES": "2",
    }
    mesh = ("mesh.data=2", "mesh.fsdp=2")
    return [
        place.start(place.folder / "config.yaml", *mesh, *a, **env, JLORA_PROCESS_ID=str(i))
        for i, a in enumerate(arguments or [(), ()])
    ]


def finish(processes):
    """Their exit codes and what they said; whatever happens none is left."""
    try:
        said = ["".join(p.communicate(timeout=200)) for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    return [p.returncode for p in processes], said


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_base, tiny_cache):
    """A run of two processes."""
    place = Place(tmp_path_factory.mktemp("two"), tiny_base, tiny_cache)
    place.write(**settings("qlora", per_device=2))
    codes, said = finish(start_two(place))
    assert codes == [0, 0], said
    assert "2 processes" in said[0] and "jlora" not in said[1]
    return place


@pytest.mark.slow
def test_two_processes_train_as_one(two, alone):
    assert_same_run(two, alone("qlora"))


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_the_same_command_goes_on(place):
    sections = settings("lora", steps=LONG, per_device=2)
    place.write(**sections)
    processes = start_two(place)
    path = place.output / "metrics.jsonl"
    while all(p.poll() is None for p in processes):
        if path.exists() and metrics_log.read_metrics(path):
            break
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    codes, said = finish(processes)
    assert codes == [143, 143], said
    (step,) = place.checkpoints()
    assert f"stopped and saved at step {step}" in said[0]
    assert place.log()[-1]["step"] == step < LONG
    codes, said = finish(start_two(place))
    assert codes == [0, 0] and f"resuming from step {step}" in said[0], said
    whole = Place(place.folder / "whole", place.base, place.cache)
    whole.folder.mkdir()
    whole.run(**settings("lora", steps=LONG))
    assert_same_run(place, whole, tolerance=1e-4)  # rounding differs, and grows with the steps


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_takes_the_other_with_it(place, failing):
    codes, said, rows = with_other_rows(place, failing, {"messages": []})
    assert codes[failing] == 65 and f"{rows}:1" in said[failing]
    assert codes[1 - failing] != 0


@pytest.mark.slow
def test_processes_that_read_different_rows_are_told(place):
    codes, said, _ = with_other_rows(place, 1, chat("say", "nothing"))
    assert codes[0] == 65 and codes[1] != 0
    assert "data.train: processes 1 have read other rows than process 0" in said[0]


WAIT_5_SECONDS = """
import sys
from jlora import cli
from jlora.distributed import processes
processes.FAILURE_BARRIER_SECONDS = 5
cli.leave(cli.main("train", sys.argv[1:]))
"""
"""The command, but a failed process waits for the others for less than half a minute."""


def with_other_rows(place, process, row):
    place.program = ("-c", WAIT_5_SECONDS)
    rows = write_rows(place.folder / "rows.jsonl", [row] * 3)
    place.write(**settings("lora", per_device=2))
    arguments = [(), ()]
    arguments[process] = (f"data.train.0.path={rows}",)
    return *finish(start_two(place, *arguments)), rows
