"""Int8Array compared with bitsandbytes' 8-bit weights."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.quant import int8

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes.functional")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_codes_and_values_match_bitsandbytes(dtype):
    """The values are exact in float16, since bitsandbytes rounds its input to that."""
    w = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
    tensor = torch.from_numpy(w).bfloat16().half()
    codes, stats, _ = bnb.int8_vectorwise_quant(tensor)
    q = int8.quantize(jnp.asarray(tensor.float().numpy()).astype(dtype))
    np.testing.assert_array_equal(np.asarray(q.codes), codes.numpy())
    np.testing.assert_array_equal(np.asarray(q.absmax), stats.numpy())
    expected = bnb.int8_vectorwise_dequant(codes, stats).numpy()
    np.testing.assert_array_equal(np.asarray(q.dequantize(jnp.float32)), expected)
