"""SIGTERM and SIGINT as a request to stop after the current step, agreed on by all processes."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from jlora.distributed.processes import process_count

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Records SIGTERM and SIGINT instead of dying, so that the loop can save a checkpoint first.

    The second SIGINT raises KeyboardInterrupt at once. Example::

        with StopSignals() as signals:
            for step in …:
                …
                if signum := signals.stop(step):
                    save(); raise StoppedError("stopped", signum=signum)

    In a run of several processes JAX's preemption service owns SIGTERM: it makes all processes
    agree on the step to stop after, because one that stopped alone would leave the others waiting
    in a collective. SIGINT is forwarded to it as SIGTERM. Enter this block after
    ``processes.initialize``.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._multi_process = False

    def __enter__(self) -> StopSignals:
        self._multi_process = process_count() > 1
        for signum in (signal.SIGINT,) if self._multi_process else STOP_SIGNALS:
            self._previous[signum] = signal.signal(signum, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def stop(self, step: int) -> int | None:
        """The signal to stop for after ``step``, or None; every process must ask at every step.

        With several processes all get their answer at the same step. A process that received no
        signal itself gets SIGTERM.
        """
        if not self._multi_process:
            return self.received
        from jax.experimental import multihost_utils

        if multihost_utils.reached_preemption_sync_point(step):
            return self.received or signal.SIGTERM
        return None

    def _record(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.received == signal.SIGINT:
            signal.default_int_handler(signum, frame)
        self.received = signum
        if self._multi_process:
            os.kill(os.getpid(), signal.SIGTERM)
