"""The training step compiled for an absent H200: its optimized HLO and XLA's analysis."""

import functools
import importlib.util
import math
import re

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
def step(target, quantized, offloading=False, documents=1, flags="", rows=1, **mesh):
    sections = {"quantization": {"load_in_4bit": True}} if quantized else {}
    train = {"activation_offloading": offloading, "per_device_train_batch_size": rows}
    return compiled_for(
        target, LLAMA_8B, LENGTH, documents, flags, mesh=mesh, train=train, **sections
    )


@pytest.mark.parametrize("quantized", [False, True])
def test_attention_uses_cudnn(quantized):
    kernels = step("h200", quantized)["work"]["kernels"]
    assert {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"} <= set(kernels)


@pytest.mark.parametrize("quantized", [False, True])
def test_flops_are_four_per_parameter_plus_recomputation(quantized):
    again = 2 * (MATRICES - DOWN + ADAPTER - ADAPTER_DOWN) + 2 * HEAD  # and the head's chunks
    products = LENGTH * (4 * (MATRICES + HEAD) + 6 * ADAPTER + again)
    attention = 16 * 32 * 4096 * LENGTH * (LENGTH + 1) / 2
    work = step("h200", quantized)["work"]
    assert work["flops"] == pytest.approx(products + attention, rel=0.05)
    assert work["flops_compiled"] == pytest.approx(products, rel=0.05)


def test_no_dequantized_matrix_outlives_its_layer():
    """Floating arrays as large as a stack of matrices: only the embedding and layers' inputs."""
    large = [t for t in step("h200", True)["large"] if t.startswith(("f", "bf"))]
    sizes = {math.prod(map(int, re.findall(r"\d+", t.partition("[")[2]))) for t in large}
    assert sizes == {HEAD, 32 * LENGTH * 4096}


def test_fsdp_gathers_layers_and_reduces_gradients():
    result = step("h200x8", False, data=2, fsdp=4)
    found = {(c["kind"], c["group"]): c["bytes"] for c in result["work"]["collectives"]}
    assert found["all-gather", 4] > 2 * 2 * MATRICES / 4  # forward and backward, in bfloat16
    kinds = {kind for kind, _ in found}
    assert kinds <= {"all-gather", "all-reduce", "reduce-scatter", "all-to-all"}
    reduced = sum(n for (kind, _), n in found.items() if kind in ("all-reduce", "reduce-scatter"))
    assert 4 * ADAPTER / 4 < reduced < 3 * 4 * ADAPTER
    assert result["memory"]["peak"] < 7.7 * GiB  # the head, gathered once, is one of them


def test_memory_of_qlora_on_8b_is_within_its_bounds():
    memory = step("h200", True)["memory"]
    assert memory["base"] + memory["adapter"] + memory["optimizer"] < 5.85 * GiB
    assert memory["peak"] < 7.3 * GiB
    assert memory["peak"] < 0.5 * step("h200", False)["memory"]["peak"]


@pytest.mark.parametrize("quantized", [False, True])
def test_base_and_adapter_products_stay_separate(quantized):
    """XLA would fuse both into one product, moving a fifth more; see mesh.COMPILER_OPTIONS."""
    assert step("h200", quantized)["work"]["bytes_moved"] < 250 * GiB


@pytest.mark.parametrize("documents", [1, 255])
@pytest.mark.parametrize("target", ["h200", "a100-80"])
def test_no_conditional_waits_for_the_host(target, documents):
    """The kernel of attention is chosen by the type of the segment ids, not by their values."""
    result = step(target, True, documents=documents)
    assert result["conditionals"] == 0
    # Heads of 128 have no room on an A100 for the code of packed documents.
    uses_cudnn = "__cudnn$fmhaSoftmax" in result["work"]["kernels"]
    assert uses_cudnn == (target == "h200" or documents == 1)


def test_products_add_to_the_base_where_cublas_computes_them():
    """Seven modules, forward and recomputed; float32 results would be added by other kernels."""
    result = step("h200", False, flags="--xla_gpu_enable_triton_gemm=false")
    assert result["fused_adds"] >= 14


def test_fsdp_gathers_the_head_once():
    """Four chunks of its 4096 tokens, in three passes."""
    result = step("h200x8", False, rows=2, data=1, fsdp=8)
    found = {c["kind"]: c["bytes"] for c in result["work"]["collectives"]}
    layers = 2 * 2 * MATRICES / 8
    assert layers < found["all-gather"] < layers + 2 * 2 * HEAD / 8


SMALL = LLAMA_8B | {
    "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize("on", [False, True])
def test_full_determinism_leaves_no_order_open_and_nothing_to_timing(on):
    """In full fine-tuning, whose gradient of the embedding is a scatter that adds.

    cuDNN's form of the backward pass is chosen where there is a GPU: the HLO does not have it.
    """
    train = {"full_determinism": on, "learning_rate": 1e-5}
    result = compiled_for("h200", SMALL, 256, train=train, lora=None)
    assert "__cudnn$fmhaSoftmaxBackward" in result["work"]["kernels"]
    assert bool(result["unordered"]) == bool(result["timed"]) == (not on)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_dropout_holds_no_masks_and_no_indices(checkpointing):
    """Dropped inputs are written and read about five times. With masks saved it is ten times, with
    indices of their shape moved out of the loop over layers twelve.
    """
    dropped, plain = (
        compiled_for(
            "h200",
            LLAMA_8B,
            LENGTH,
            lora={"lora_dropout": dropout},
            train={"gradient_checkpointing": checkpointing},
        )
        for dropout in (0.05, 0.0)
    )
    inputs = 2 * 32 * LENGTH * (3 * 4096 + 14_336)  # of q, k and v; o; gate and up; and down
    assert dropped["work"]["bytes_moved"] - plain["work"]["bytes_moved"] < 6 * inputs
    assert dropped["memory"]["peak"] < 1.02 * plain["memory"]["peak"]


def test_offloading_moves_layer_inputs_off_the_device():
    """All but those of two layers: the one being computed and the one being transferred."""
    on, off = (step("h200", True, offloading)["memory"] for offloading in (False, True))
    inputs = 32 * LENGTH * 4096 * 2
    assert off["host"] == inputs and not on["host"]
    assert on["peak"] - off["peak"] > 0.8 * inputs
    assert off["peak"] < 6.7 * GiB
