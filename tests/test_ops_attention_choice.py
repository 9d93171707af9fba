"""Which attention backend is chosen on which platform, and the reason given."""

import dataclasses
import re
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from jlora.errors import ConfigError
from jlora.ops.attention import BACKENDS, Case, attend, choose, cudnn, needs_static_window, splash

HOPPER, AMPERE, TURING = (9, 0), (8, 0), (7, 5)
LONG = Case("bfloat16", length=1024, head_dim=128)
PACKED = {"documents": 255}
MADE = "made for cuda"


@pytest.mark.parametrize(
    ("platform", "changes", "backend", "why"),
    [
        ("cpu", {}, "chunked", "1024 tokens are more than a chunk of 64"),
        ("cpu", {"length": 64}, "reference", "64 tokens are no more than a chunk of 64"),
        ("cuda", {"capability": HOPPER}, "cudnn", MADE),
        ("cuda", {"capability": HOPPER, **PACKED}, "cudnn", MADE),
        ("cuda", {"capability": AMPERE}, "cudnn", MADE),
        (
            "cuda",
            {"capability": AMPERE, **PACKED},
            "chunked",
            "need 16 besides its 128",
        ),
        ("cuda", {"capability": AMPERE, "head_dim": 64, **PACKED}, "cudnn", MADE),
        ("cuda", {"dtype": "float16", "head_dim": 64}, "cudnn", MADE),
        ("cuda", {"dtype": "float16", "head_dim": 64, **PACKED}, "chunked", "not in float16; 1024"),
        ("cuda", {"length": 200}, "cudnn", MADE),
        ("cuda", {"dtype": "float32"}, "chunked", "16 bits, not in float32; 1024 tokens"),
        ("cuda", {"head_dim": 256, "capability": HOPPER}, "cudnn", MADE),
        ("cuda", {"head_dim": 256, "capability": HOPPER, **PACKED}, "chunked", "besides its 256"),
        ("cuda", {"head_dim": 256, "capability": AMPERE}, "chunked", "8, 16, … 128 here, not 256"),
        ("cuda", {"head_dim": 256}, "chunked", "8, 16, … 128 here, not 256"),
        ("cuda", {"head_dim": 100}, "chunked", "not 100"),
        ("cuda", {"capability": TURING}, "chunked", "compute capability 8.0"),
        ("cuda", {"softcap": True}, "chunked", "no soft cap"),
        ("cuda", {"sinks": True}, "chunked", "no sinks"),
        ("cuda", {"traced_window": True}, "chunked", "the same in all layers"),
        ("tpu", {"softcap": True, "sinks": True, "dtype": "float32"}, "splash", "made for tpu"),
        ("tpu", {"traced_window": True}, "chunked", "the same in all layers"),
        ("tpu", {"dtype": "float16", "length": 8}, "reference", "not in float16; 8 tokens"),
    ],
)
def test_auto_picks_a_supported_backend_and_gives_the_reason(platform, changes, backend, why):
    choice = choose(platform, dataclasses.replace(LONG, **changes))
    assert choice.backend == backend
    assert why == choice.why if backend in ("cudnn", "splash") else why in choice.why


def qkv(dtype=jnp.float32, length=16, dim=8):
    return [jnp.ones((2, length, heads, dim), dtype) for heads in (4, 2, 2)]


@pytest.mark.parametrize(
    ("backend", "kernel", "dtype", "more", "message"),
    [
        ("cudnn", cudnn, jnp.float32, {}, "16 bits"),
        ("cudnn", cudnn, jnp.bfloat16, {"softcap": 5.0}, "no soft cap"),
        ("splash", splash, jnp.float16, {}, "not in float16"),
    ],
)
def test_an_unsupported_backend_is_refused(backend, kernel, dtype, more, message, monkeypatch):
    monkeypatch.setattr(kernel, "available", lambda: True)
    with pytest.raises(
        ConfigError, match=rf"model.attention: {backend}[\s\S]*{message}[\s\S]*auto"
    ):
        attend(*qkv(dtype), scale=1.0, backend=backend, **more)


def test_an_unavailable_backend_is_refused(monkeypatch):
    monkeypatch.setattr(splash, "available", lambda: False)
    with pytest.raises(ConfigError, match="support for tpu, which is not installed"):
        attend(*qkv(), scale=1.0, backend="splash")


def test_unknown_backend_is_named():
    with pytest.raises(ConfigError, match=r"no attention 'referense'[\s\S]*'reference'"):
        attend(*qkv(), scale=1.0, backend="referense")


def test_only_kernels_need_static_windows(monkeypatch):
    for kernel in (cudnn, splash):
        monkeypatch.setattr(kernel, "available", lambda: False)
    needing = [backend for backend in BACKENDS if needs_static_window(backend)]
    assert needing == ["cudnn", "splash"]
    monkeypatch.setattr(cudnn, "available", lambda: True)
    assert needs_static_window("auto") and not needs_static_window("chunked")


def lowered(platform, dtype, ids=jnp.bool_, **more):
    """The lowered program of a gradient, for a platform that may be absent."""
    ids = jnp.ones((2, 256), ids)

    def loss(q, k, v):
        return attend(q, k, v, scale=0.5, segment_ids=ids, **more).astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    shapes = qkv(dtype, length=256, dim=128)
    return (
        gradient.trace(*shapes).lower(lowering_platforms=(platform,)).as_text().replace("\\22", '"')
    )


@pytest.fixture
def for_all_platforms(monkeypatch):
    """Allows tracing of kernels although neither CUDA nor a TPU is available."""
    module = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{module}.check_cudnn_version", lambda: 90800)
    for kernel in (cudnn, splash):
        monkeypatch.setattr(kernel, "available", lambda: True)


def test_programs_contain_the_kernel_of_their_platform(for_all_platforms):
    assert lowered("tpu", jnp.bfloat16).count("tpu_custom_call") >= 3  # forward, dq, dk and dv
    assert "tpu_custom_call" not in lowered("cpu", jnp.bfloat16)
    assert "tpu_custom_call" not in lowered("tpu", jnp.float16)
    for window, length in ((None, 0), (100, 100)):
        text = lowered("cuda", jnp.bfloat16, window=window)
        assert "tpu_custom_call" not in text
        assert {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"} <= set(
            re.findall(r"__cudnn\$\w+", text)
        )
        assert set(re.findall(r"sliding_window_length\W+(\d+)", text)) == {str(length)}
        assert set(re.findall(r"mask_type\W+(\w+)", text)) == {"CAUSAL"}
    assert "__cudnn" not in lowered("cuda", jnp.float32)


def test_the_capability_of_an_absent_gpu_is_passed_as_a_value(for_all_platforms, monkeypatch):
    """Two programs of one process, for two absent GPUs; the kernel is tried on neither."""
    monkeypatch.setattr(cudnn, "fault", mock.Mock(side_effect=AssertionError("tried")))
    assert "__cudnn" in lowered("cuda", jnp.bfloat16, gpu_capability=AMPERE)
    assert "__cudnn" not in lowered("cuda", jnp.bfloat16, gpu_capability=TURING)
