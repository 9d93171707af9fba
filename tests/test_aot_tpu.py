"""What the step is on a TPU v5e that is not here, from its optimized HLO and XLA's analysis."""

import functools
import importlib.util

import pytest
from aot import LLAMA_8B, compiled_for

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="JAX's TPU plugin is not installed (pip install jlora[plan-tpu])",
    ),
    pytest.mark.slow,
]

SMALL = LLAMA_8B | {
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
LENGTH = 1024


@functools.cache
def step(target, **mesh):
    return compiled_for(target, SMALL, LENGTH, mesh=mesh, quantization={"load_in_4bit": True})


def test_attention_is_a_kernel():
    assert "tpu_custom_call" in step("v5e")["work"]["kernels"]
