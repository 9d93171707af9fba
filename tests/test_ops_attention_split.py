"""Computing each device's rows and heads equals the unsplit computation and moves no data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jlora.config import MeshConfig
from jlora.distributed import sharding
from jlora.distributed.mesh import BATCH_AXES
from jlora.ops.attention import attend
from jlora.ops.attention.split import on_each_device


def reference(q, k, v, segment_ids, sinks, scale):
    more = {"segment_ids": segment_ids, "sinks": sinks, "backend": "reference"}
    return attend(q, k, v, scale=scale, **more)


@pytest.mark.parametrize(("batch", "kv_heads", "divided"), [(4, 2, True), (3, 1, False)])
def test_splitting_over_devices_changes_no_gradient(batch, kv_heads, divided):
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((batch, 9, h, 8)), jnp.float32)
        for h in (4, kv_heads, kv_heads)
    )
    ids = jnp.asarray([[1] * 5 + [2] * 4] * batch)
    given = q, k, v, ids, jnp.asarray([-1.0, 0.0, 0.5, 2.0])

    def gradients(compute, *given):
        return jax.grad(lambda *x: (compute(*x, scale=0.4) ** 2).sum(), (0, 1, 2, 4))(*given)

    want = gradients(reference, *given)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    if divided:
        rows = PartitionSpec(BATCH_AXES)
        heads = PartitionSpec(BATCH_AXES, None, "tensor")
        places = [NamedSharding(mesh, s) for s in (heads, heads, heads, rows, PartitionSpec())]
        given = jax.device_put(list(given), places)
    with jax.set_mesh(mesh):
        split = jax.jit(lambda *x: gradients(on_each_device(reference), *x)).lower(*given).compile()
    assert "all-gather" not in split.as_text() or not divided
    for a, b in zip(split(*given), want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
