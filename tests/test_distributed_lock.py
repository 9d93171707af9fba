"""The lock on the output folder, held by one run at a time."""

import os
import subprocess
import sys

import pytest

from jlora.distributed.lock import RunLock
from jlora.errors import OutputInUseError


def python(code, *args, **env):
    command = [sys.executable, "-c", code, *map(str, args)]
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | env
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
    )


HOLD = """
import sys
from jlora.distributed.lock import RunLock
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
