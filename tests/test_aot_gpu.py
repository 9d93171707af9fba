"""What the step is on an H200 that is not here, from its optimized HLO and XLA's analysis."""

import functools
import importlib.util

import pytest
from aot import LLAMA_8B, compiled_for

PLUGINS = "jax_cuda13_plugin", "jax_cuda12_plugin"
pytestmark = [
    pytest.mark.skipif(
        not any(map(importlib.util.find_spec, PLUGINS)),
        reason="JAX's CUDA plugin is not installed (pip install jlora[plan-gpu])",
    ),
    pytest.mark.slow,
]

GiB = 2**30
LENGTH = 2048
MATRICES = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336)
DOWN = 32 * 4096 * 14_336
ADAPTER = 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18_432)
ADAPTER_DOWN = 32 * 16 * 4096
HEAD = 4096 * 128_256


@functools.cache
def step(target, packed, **mesh):
    sections = {"quantization": {"load_in_4bit": True}} if packed else {}
    return compiled_for(target, LLAMA_8B, LENGTH, mesh=mesh, **sections)


@pytest.mark.parametrize("packed", [False, True])
def test_attention_is_cudnns(packed):
    kernels = step("h200", packed)["work"]["kernels"]
    assert {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"} <= set(kernels)


@pytest.mark.parametrize("packed", [False, True])
def test_flops_are_four_for_a_parameter_and_what_is_recomputed(packed):
    again = 2 * (MATRICES - DOWN + ADAPTER - ADAPTER_DOWN) + 2 * HEAD  # the head's chunks, too
    products = LENGTH * (4 * (MATRICES + HEAD) + 6 * ADAPTER + again)
    attention = 16 * 32 * 4096 * LENGTH * (LENGTH + 1) / 2
    work = step("h200", packed)["work"]
    assert work["flops"] == pytest.approx(products + attention, rel=0.05)
    assert work["flops_compiled"] == pytest.approx(products, rel=0.05)


def test_no_dequantized_matrix_outlives_its_layer():
    """What is as large as a stack of matrices, and no codes: the embedding, what layers read."""
    allowed = {"128256,4096", "4096,128256", "32,1,2048,4096", "32,2048,4096"}
    large = step("h200", True)["large"]
    floats = {t.partition("[")[2][:-1] for t in large if t.startswith(("f", "bf"))}
    assert floats <= allowed


def test_qlora_of_8b_takes_what_is_said():
    memory = step("h200", True)["memory"]
    assert memory["base"] + memory["adapter"] + memory["optimizer"] < 5.85 * GiB
    assert memory["peak"] < 7.3 * GiB
    assert memory["peak"] < 0.5 * step("h200", False)["memory"]["peak"]
