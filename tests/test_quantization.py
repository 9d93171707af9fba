"""Which leaves of a tree are packed, and as what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import nf4
from jlora.config import QuantConfig
from jlora.errors import ConfigError
from jlora.quantization import quantize_params


def normal(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32), dtype)


def small_tree():
    return {
        "model": {
            "embed_tokens": {"embedding": normal(10, 64)},
            "layers": {
                "q_proj": {"kernel": normal(3, 64, 32, dtype=jnp.bfloat16), "bias": normal(3, 32)},
                "norm": {"scale": normal(3, 64)},
            },
            "out": {"kernel": normal(64, 32)},
        },
        "lm_head": {"kernel": normal(64, 10)},
    }


def test_quantize_params_packs_kernels_as_bitsandbytes_does():
    params = small_tree()
    packed = quantize_params(params, QuantConfig())
    q = packed["model"]["layers"]["q_proj"]["kernel"]
    assert q.shape == (3, 64, 32) and q.dtype == jnp.bfloat16
    kernel = params["model"]["layers"]["q_proj"]["kernel"]
    for layer in range(3):
        alone = nf4.quantize(kernel[layer].T)
        np.testing.assert_array_equal(np.asarray(q.codes[layer]), np.asarray(alone.codes))
    assert isinstance(packed["model"]["out"]["kernel"], nf4.NF4Array)
    same = [("lm_head", "kernel"), ("model", "embed_tokens"), ("model", "layers", "norm")]
    for path in same:
        a, b = params, packed
        for key in path:
            a, b = a[key], b[key]
        assert jax.tree.all(jax.tree.map(lambda x, y: x is y, a, b))
    again = quantize_params(packed, QuantConfig())
    assert again["model"]["layers"]["q_proj"]["kernel"] is q


def test_quantize_params_leaves_out_what_it_is_told_to():
    skip = QuantConfig(llm_int8_skip_modules=["out", "lm_head"])
    packed = quantize_params(small_tree(), skip)
    assert isinstance(packed["model"]["out"]["kernel"], jax.Array)
    assert isinstance(packed["model"]["layers"]["q_proj"]["kernel"], nf4.NF4Array)
    skip = QuantConfig(llm_int8_skip_modules=["model.layers"])
    packed = quantize_params(small_tree(), skip)
    assert isinstance(packed["model"]["layers"]["q_proj"]["kernel"], jax.Array)


@pytest.mark.parametrize(
    ("name", "message"), [("q_porj", "q_proj"), ("model.layers.1.q_proj", "layer number")]
)
def test_quantize_params_explains_a_bad_skip(name, message):
    with pytest.raises(ConfigError, match=message):
        quantize_params(small_tree(), QuantConfig(llm_int8_skip_modules=[name]))
