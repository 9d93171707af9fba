"""The training loop keeps the devices busy: what the host does between two dispatches."""

import threading
from unittest import mock

import jax
import pytest
from jax._src import array, core

from jlora import train
from jlora.run import loop


class Watch:
    """What one thread has devices compute, and which arrays it reads, in ``watching``.

    The transfer guard detects arguments that go to a device unasked. On CPUs it knows nothing of
    computations on arrays that are there already, nor of results that are read; these are counted
    where JAX does them.
    """

    def __init__(self):
        self.thread = threading.get_ident()
        self.watching = self.fetching = False
        self.computed, self.read, self.fetched = [], 0, 0
        self._get, self._process = jax.device_get, core.EvalTrace.process_primitive
        self._value = array.ArrayImpl._value

    def is_on(self):
        return self.watching and threading.get_ident() == self.thread

    def device_get(self, tree):
        self.fetched += self.is_on()
        self.fetching = True
        try:
            return self._get(tree)
        finally:
            self.fetching = False

    def hook(self):
        def process_primitive(trace, primitive, arguments, parameters, /):
            if self.is_on():
                self.computed.append(parameters.get("name", primitive.name))
            return self._process(trace, primitive, arguments, parameters)

        return process_primitive

    def value(self, one):
        self.read += self.is_on() and not self.fetching
        return self._value.fget(one)

    def run_loop(self, run, train_step, signals):
        """``train_loop``, watched from its first batch to its last step."""
        batches, finish = loop.remaining_batches, loop.finish_run

        def begin(run):
            jax.clear_caches()  # what was called before would be called past Python's traces
            jax.config.update("jax_transfer_guard", "disallow")  # in the thread of batches, too
            self.watching = True
            return batches(run)

        def end(run):
            self.watching = False
            jax.config.update("jax_transfer_guard", "allow")
            finish(run)

        with (
            mock.patch.multiple(loop, remaining_batches=begin, finish_run=end),
            mock.patch.object(jax, "device_get", self.device_get),
            mock.patch.object(core.EvalTrace, "process_primitive", self.hook()),
            mock.patch.object(array.ArrayImpl, "_value", property(self.value)),
        ):
            try:
                loop.train_loop(run, train_step, signals)
            finally:
                jax.config.update("jax_transfer_guard", "allow")


@pytest.mark.parametrize("together", [False, True], ids=["one adapter", "two adapters"])
def test_between_steps_the_host_only_fetches_metrics(place, monkeypatch, together):
    """With a training line at every step, past the check that all leaves learn."""
    place.settings_for_loss()
    sections = {}
    if together:
        rows = {"path": str(place.rows), "format": "messages"}
        sections["data"] = {"train": [rows | {"adapter": name} for name in ("a", "b")]}
    watch = Watch()
    monkeypatch.setattr(train, "train_loop", watch.run_loop)
    steps = {"max_steps": 6, "logging_steps": 1, "save_steps": None, "eval_steps": None}
    place.run(train=steps, **sections)
    assert watch.fetched == 6 and len(place.losses()) == 6
    assert (watch.computed, watch.read) == ([], 0)
