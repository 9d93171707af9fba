"""The lock, the signals, the environment of several processes, the compilation cache."""

import os
import signal
import subprocess
import sys

import jax
import pytest

from jlora.distributed import runtime
from jlora.distributed.runtime import RunLock, Signals
from jlora.errors import ConfigError, OutputInUseError


def python(code, *args, **env):
    command = [sys.executable, "-c", code, *map(str, args)]
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | env
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
    )


HOLD = """
import sys
from jlora.distributed.runtime import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_until_the_first_ends_even_by_sigkill(tmp_path):
    with python(HOLD, tmp_path / "out") as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(OutputInUseError, match=f"process {first.pid} on ") as caught:
            RunLock(tmp_path / "out").__enter__()
        assert caught.value.exit_code == 73
        first.kill()
    with RunLock(tmp_path / "out"):
        pass


def test_the_lock_is_free_again_after_the_block_and_needs_no_jax(tmp_path):
    with RunLock(tmp_path):
        pass
    with python(HOLD + "print('jax' in sys.modules)", tmp_path) as other:
        assert other.communicate()[0] == "held\nFalse\n"


def test_a_process_that_does_not_write_takes_no_lock(tmp_path):
    with RunLock(tmp_path), RunLock(tmp_path, enabled=False):
        pass


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_old_handler_comes_back(signum):
    before = signal.getsignal(signum)
    with Signals() as signals:
        assert signals.stop(1) is None
        os.kill(os.getpid(), signum)
        assert signals.stop(2) == signals.received == signum
    assert signal.getsignal(signum) is before


def test_the_second_ctrl_c_aborts():
    with pytest.raises(KeyboardInterrupt), Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


TWO = """
import os, signal, sys
from jlora.distributed import runtime
assert runtime.distributed()
import jax
with runtime.Signals() as signals:
    for step in range(10**6):
        if step == 3 and jax.process_index() == 0:
            os.kill(os.getpid(), signal.Signals[sys.argv[1]])
        jax.jit(lambda x: x + 1)(step).block_until_ready()
        if signum := signals.stop(step):
            print(step, flush=True)
            runtime.leave(128 + signum, together=True)
"""


@pytest.mark.parametrize(("name", "codes"), [("SIGTERM", [143, 143]), ("SIGINT", [130, 143])])
def test_two_processes_stop_after_the_same_step(name, codes, two_processes):
    runs = two_processes(TWO, name)
    outputs = [run.communicate(timeout=120)[0].splitlines() for run in runs]
    assert [run.returncode for run in runs] == codes
    assert outputs[0][-1] == outputs[1][-1] and int(outputs[0][-1]) > 3


ALONE = """
from jlora.distributed import runtime
runtime.distributed()
runtime.GRACE = 2
import jax
if jax.process_index() == 1:
    runtime.leave(65, together=False)
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
from jlora.distributed import runtime
runtime.distributed()
import jax
time.sleep(3 * jax.process_index())
runtime.leave(65, together=False)
"""


def test_processes_that_fail_alike_end_alike(two_processes):
    """The second would abort if the first, which coordinates, were gone."""
    runs = two_processes(ALIKE)
    for run in runs:
        run.communicate(timeout=120)
    assert [run.returncode for run in runs] == [65, 65]


def test_one_process_is_not_distributed():
    assert runtime.distributed({}) is False
    assert runtime.distributed({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) is False
    assert runtime.distributed({"TPU_WORKER_HOSTNAMES": "localhost"}) is False


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
    runtime.distributed(environ)
    assert calls == [{}]


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
def test_an_environment_that_does_not_fit_is_an_error(environ, words):
    with pytest.raises(ConfigError, match=words):
        runtime.distributed(environ)


@pytest.fixture
def cache_settings():
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_in_the_users_cache(tmp_path, cache_settings):
    folder = runtime.compilation_cache({"XDG_CACHE_HOME": str(tmp_path)})
    assert folder.parent == tmp_path / "jlora"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    own = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own")}
    assert runtime.compilation_cache(own) == tmp_path / "own"


def test_a_cache_folder_that_cannot_be_written_is_no_error(tmp_path, cache_settings):
    (tmp_path / "file").write_text("")
    before = jax.config.jax_compilation_cache_dir
    assert runtime.compilation_cache({"XDG_CACHE_HOME": str(tmp_path / "file")}) is None
    assert jax.config.jax_compilation_cache_dir == before


def test_devices_are_described():
    assert runtime.describe_devices() == f"{jax.device_count()} × cpu"
