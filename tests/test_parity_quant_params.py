"""What quantization costs on real weights, by the script that makes the documentation's table.

These models compute for longer than they compile, so XLA's optimizations are on.
"""

import functools
import importlib.util
import sys
from pathlib import Path

import jax
import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def optimized():
    """XLA's optimizations, here and in child processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
        before = jax.config.read("jax_disable_most_optimizations")
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def script():
    """The benchmark's module, which needs standard promotion; strict is for the package only."""
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("quality", FOLDER / "quantization_quality.py")
    module = importlib.util.module_from_spec(spec)
    with jax.numpy_dtype_promotion("standard"):
        spec.loader.exec_module(module)
        yield module
    sys.path.remove(str(FOLDER))


@pytest.mark.short
def test_nf4_costs_less_than_int4(script, assets, monkeypatch):
    """Two formats, 16 stories of 64 tokens."""
    monkeypatch.setattr(script, "STORIES", 16)
    monkeypatch.setattr(script, "LENGTH", 64)
    monkeypatch.setattr(script, "CODES", {name: script.CODES[name] for name in ("int4", "NF4")})
    rows = script.perplexities(assets / "models/stories260k", script.stories)
    assert 0 < rows["NF4"]["kl"] < rows["int4"]["kl"]


@pytest.mark.slow
def test_formats_rank_as_in_the_paper(script, assets):
    """QLoRA, table 2: NF4, then FP4, then int4; double quantization costs nothing."""
    rows = script.perplexities(assets / "models/stories260k", script.stories)
    order = ["float32", "int8", "NF4", "FP4 (E2M1)", "int4"]
    for measure in ("perplexity", "kl"):
        values = [rows[name][measure] for name in order]
        assert values == sorted(values) and values[0] < values[1] < values[2]
    assert abs(rows["NF4+DQ"]["perplexity"] / rows["NF4"]["perplexity"] - 1) < 0.005
    assert rows["NF4"]["kl"] < rows["FP4 (bitsandbytes)"]["kl"]


@pytest.mark.slow
def test_qlora_learns_what_lora_learns(script, assets, tmp_path, monkeypatch):
    """Held-out loss after the same steps: within 2 %, of a loss that starts at 5.8 nats."""
    train, held_out = script.texts("instruction", assets / "data")  # more than is trained on
    monkeypatch.setattr(script, "texts", lambda *_: (train[:400_000], held_out[:40_000]))
    run = functools.partial(script.held_out, "instruction", assets, tmp_path, steps=60)
    lora, qlora = run(quantized=False), run(quantized=True)
    assert lora < 3 and abs(qlora / lora - 1) < 0.02
