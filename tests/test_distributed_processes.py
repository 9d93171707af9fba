"""The processes of a run: how the environment describes them, and how they end."""

import jax
import pytest

from jlora.distributed import processes
from jlora.errors import ConfigError

ALONE = """
from jlora.distributed import processes
processes.initialize()
processes.FAILURE_BARRIER_SECONDS = 2
import jax
if jax.process_index() == 1:
    processes.exit_process(65, all_exit=False)
input()
"""


def test_a_process_that_fails_does_not_wait_long_for_the_other(two_processes):
    runs = two_processes(ALONE)
    try:
        runs[1].communicate(timeout=60)
        assert runs[1].returncode == 65
    finally:
        for run in runs:
            run.kill()
            run.communicate()


ALIKE = """
import time
from jlora.distributed import processes
processes.initialize()
import jax
time.sleep(3 * jax.process_index())
processes.exit_process(65, all_exit=False)
"""


def test_processes_with_the_same_error_exit_with_the_same_code(two_processes):
    """The second would abort if the first, the coordinator, had already ended."""
    runs = two_processes(ALIKE)
    for run in runs:
        run.communicate(timeout=120)
    assert [run.returncode for run in runs] == [65, 65]


def test_one_process_is_not_distributed():
    assert processes.initialize({}) is False
    assert processes.initialize({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) is False
    assert processes.initialize({"TPU_WORKER_HOSTNAMES": "localhost"}) is False


@pytest.mark.parametrize(
    "environ",
    [
        {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
        {"OMPI_COMM_WORLD_SIZE": "4"},
        {"TPU_WORKER_HOSTNAMES": "a,b"},
    ],
)
def test_launchers_that_jax_knows_start_jax_distributed(environ, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kw: calls.append(kw))
    processes.initialize(environ)
    assert calls == [{"local_device_ids": []}]


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"JLORA_COORDINATOR": "a:1"}, "set without JLORA_NUM_PROCESSES, JLORA_PROCESS_ID"),
        (
            {"JLORA_COORDINATOR": "a:1", "JLORA_NUM_PROCESSES": "2", "JLORA_PROCESS_ID": "2"},
            "JLORA_PROCESS_ID='2'",
        ),
        (
            {"JLORA_COORDINATOR": "a:1", "JLORA_NUM_PROCESSES": "two", "JLORA_PROCESS_ID": "0"},
            "JLORA_NUM_PROCESSES='two'",
        ),
    ],
)
def test_an_inconsistent_environment_is_an_error(environ, words):
    with pytest.raises(ConfigError, match=words):
        processes.initialize(environ)
