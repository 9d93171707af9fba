"""Signals that stop a run: recorded, restored, and agreed on by several processes."""

import os
import signal

import pytest

from jlora.distributed.signals import StopSignals


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_old_handler_comes_back(signum):
    before = signal.getsignal(signum)
    with StopSignals() as signals:
        assert signals.stop(1) is None
        os.kill(os.getpid(), signum)
        assert signals.stop(2) == signals.received == signum
    assert signal.getsignal(signum) is before


def test_the_second_ctrl_c_aborts():
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


TWO = """
import os, signal, sys
from jlora.distributed import processes
from jlora.distributed.signals import StopSignals
assert processes.initialize()
import jax
with StopSignals() as signals:
    for step in range(10**6):
        if step == 3 and jax.process_index() == 0:
            os.kill(os.getpid(), signal.Signals[sys.argv[1]])
        jax.jit(lambda x: x + 1)(step).block_until_ready()
        if signum := signals.stop(step):
            print(step, flush=True)
            processes.exit_process(128 + signum, all_exit=True)
"""


@pytest.mark.parametrize(("name", "codes"), [("SIGTERM", [143, 143]), ("SIGINT", [130, 143])])
def test_two_processes_stop_after_the_same_step(name, codes, two_processes):
    runs = two_processes(TWO, name)
    outputs = [run.communicate(timeout=120)[0].splitlines() for run in runs]
    assert [run.returncode for run in runs] == codes
    assert outputs[0][-1] == outputs[1][-1] and int(outputs[0][-1]) > 3
