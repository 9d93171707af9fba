"""The training step compiled for an absent TPU v5e: its optimized HLO and XLA's analysis."""

import functools
import importlib.util
import math
import re

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
MATRICES = 8 * (2 * 1024 * 1024 + 2 * 1024 * 512 + 3 * 1024 * 2816)
DOWN = 8 * 1024 * 2816
ADAPTER = 8 * 16 * (2 * 2048 + 2 * 1536 + 3 * 3840)
ADAPTER_DOWN = 8 * 16 * 1024
HEAD = 1024 * 32_000


@functools.cache
def step(target, **mesh):
    return compiled_for(target, SMALL, LENGTH, mesh=mesh, quantization={"load_in_4bit": True})


def test_attention_uses_a_kernel():
    assert "tpu_custom_call" in step("v5e")["work"]["kernels"]


def test_flops_are_four_per_parameter_plus_recomputation():
    again = 2 * (MATRICES - DOWN + ADAPTER - ADAPTER_DOWN) + 2 * HEAD
    products = LENGTH * (4 * (MATRICES + HEAD) + 6 * ADAPTER + again)
    attention = 16 * 8 * 1024 * LENGTH * (LENGTH + 1) / 2
    work = step("v5e")["work"]
    assert work["flops"] == pytest.approx(products + attention, rel=0.05)
    assert work["flops_compiled"] == pytest.approx(products, rel=0.05)


def test_no_dequantized_matrix_outlives_its_layer():
    """Of the arrays as large as a stack of matrices, only codes and layers' inputs are stacked."""
    large = [t for t in step("v5e")["large"] if t.startswith(("f", "bf"))]
    sizes = [list(map(int, re.findall(r"\d+", t.partition("[")[2]))) for t in large]
    assert [dims for dims in sizes if dims[0] == 8] == [[8, 1, LENGTH, 1024]]
    assert max(map(math.prod, sizes)) == HEAD


def test_stacked_codes_are_not_copied_to_another_layout():
    """A copy would double the memory: codes are transposed layer by layer, when needed."""
    copied = step("v5e")["copied"]
    assert any(re.match(r"u8\[1024,\d\d\d+\]\{0,1", t) for t in copied)
    assert not [t for t in copied if re.match(r"u8\[8,\d+,\d\d\d+\]\{1,2,0", t)]


def test_fsdp_gathers_quantized_layers_and_reduces_gradients():
    result = step("v5e-8", data=2, fsdp=4)
    found = {(c["kind"], c["group"]): c["bytes"] for c in result["work"]["collectives"]}
    head = 2 * HEAD / 4 * 2 * 2  # in bfloat16: forward and backward, in two chunks of rows
    quantized_bytes = 2 * MATRICES * 0.516 / 4  # forward and backward
    assert quantized_bytes < found["all-gather", 4] - head < 2 * quantized_bytes
    assert {kind for kind, _ in found} <= {
        "all-gather", "all-reduce", "reduce-scatter", "all-to-all"
    }  # fmt: skip
    reduced = sum(n for (kind, _), n in found.items() if kind in ("all-reduce", "reduce-scatter"))
    assert 4 * ADAPTER / 4 < reduced < 3 * 4 * ADAPTER
    matmul_flops = result["work"]["flops"] - result["work"]["flops_attention"]
    assert result["work"]["flops_compiled"] == pytest.approx(matmul_flops / 8, rel=0.05)
