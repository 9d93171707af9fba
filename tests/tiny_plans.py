"""Configurations for tests of ``plan``: loaded, opened as a run, and forecast."""

import functools
from unittest import mock

import jax
from tiny_runs import OFF, QUANTIZED

from jlora import config
from jlora.distributed import sharding
from jlora.plan import target
from jlora.plan.forecast import Rows, forecast
from jlora.run.open_job import open_job
from jlora.run.open_tokenizer import open_tokenizer

HERE = target.CompileTarget()
QLORA = {"quantization": QUANTIZED}


def load(place, *overrides, **sections):
    return config.load(place.write(**sections), [OFF, *overrides])


def opened(settings, devices):
    """The job of a run, loaded, on the first devices."""
    mesh = functools.partial(sharding.make_mesh, devices=jax.devices()[:devices])
    with mock.patch.object(sharding, "make_mesh", mesh):
        return open_job(settings, open_tokenizer(settings), trained=False)


def looked(settings, devices, rows=None, **more):
    rows = rows or Rows(64)
    return forecast(settings, None, rows, HERE, jax.devices()[:devices], **more)
