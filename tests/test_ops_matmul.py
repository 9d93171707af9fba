"""The product with one matrix: what it asks XLA for on each platform, and its rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absent_gpu import traced_for_a_gpu
from jaxprs import equations

from jlora.ops.grouped import per_row_product
from jlora.ops.matmul import array_matmul


def operands():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((64, 512)), rng.standard_normal((512, 96))
    return jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)


@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_on_gpus_the_result_has_its_own_type_and_elsewhere_float32(dtype):
    """cuBLAS rounds its float32 sums itself; a CPU is fast with a float32 result only."""

    def result_type():
        jaxpr = jax.make_jaxpr(lambda x, w: array_matmul(x, w, 0, dtype))(*operands())
        assert jaxpr.out_avals[0].dtype == (dtype or jnp.bfloat16)
        (product,) = (e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general")
        return product.params["preferred_element_type"]

    assert result_type() == jnp.float32
    with traced_for_a_gpu():
        assert result_type() == (dtype or jnp.bfloat16)


def test_either_result_is_the_float32_product_rounded_once():
    x, w = operands()
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    half_a_step = 2.0**-8 * np.abs(exact)  # bfloat16 has 8 significant bits
    sums = 512 * 2.0**-24 * (np.abs(np.asarray(x, float)) @ np.abs(np.asarray(w, float)))
    with traced_for_a_gpu():
        on_gpu = jax.jit(lambda x, w: array_matmul(x, w, 0)).trace(x, w)
    for got in (array_matmul(x, w, 0), on_gpu.lower(lowering_platforms=("cpu",)).compile()(x, w)):
        assert (np.abs(np.asarray(got, np.float64) - exact) <= half_a_step + sums).all()


def test_the_product_with_each_rows_own_matrix_has_its_own_type_on_gpus_too():
    x, w = operands()

    def result_type():
        ids = jnp.zeros(len(x), jnp.int32)
        jaxpr = jax.make_jaxpr(lambda x, w: per_row_product(x, w, ids))(x[:, None], w[None])
        (product,) = (e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general")
        return product.params["preferred_element_type"]

    assert result_type() == jnp.float32
    with traced_for_a_gpu():
        assert result_type() == jnp.bfloat16
