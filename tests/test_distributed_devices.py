"""The line of the run header that describes the devices."""

import jax

from jlora.distributed.devices import describe_devices


def test_devices_are_described():
    assert describe_devices() == f"{jax.device_count()} × cpu"
