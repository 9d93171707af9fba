"""The merged model computes the same logits as base and adapter."""

import importlib
import re

import jax
import numpy as np
import pytest
import tiny_results
import transformers
from tiny_runs import Place

import jlora
from jlora.errors import ConfigError

command = importlib.import_module("jlora.merge")  # jlora.merge is the function
QUANTIZED = {"bnb_4bit_compute_dtype": "float32"}


@pytest.fixture
def here(result, tmp_path):
    """The shared run, with its own settings and merged model."""
    place = Place(tmp_path, result.base, result.cache)
    place.output = result.output
    return place


@pytest.fixture(scope="module")
def logits(result):
    """Logits with the adapter on the base, and on the quantized base."""
    model, plain = tiny_results.trained(result)
    _, quantized = tiny_results.trained(result, quantized=True)
    return [tiny_results.logits(model, params) for params in (plain, quantized)]


def merged(place, **sections):
    """Merges, reads the result, and returns its logits."""
    out = place.folder / "merged"
    settings = {"output_dir": str(out), **sections.pop("merge", {})}
    tiny_results.run(place, command, merge=settings, train={"bf16": False}, **sections)
    return tiny_results.logits(*jlora.load_pretrained(str(out), dtype="float32"))


def differences(out):
    """The printed differences: name → (mean, maximum)."""
    found = re.findall(r"logit difference(.*?)\s*[:│ ]\s*(\S+) on average, (\S+) at most", out)
    return {name.strip(", "): (float(mean), float(most)) for name, mean, most in found}


def close(got, expected):
    return np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_merged_adapter_matches_the_attached_one(here, logits, capsys):
    assert close(merged(here), logits[0])
    (shown,) = differences(capsys.readouterr().out).values()
    assert shown[0] <= shown[1] < 1e-4
    base = tiny_results.logits(*jlora.load_pretrained(str(here.base), dtype="float32"))
    assert np.abs(base - logits[0]).max() > 0.5  # the adapter has an effect
    folder = here.folder / "merged"
    text = "say one"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer(text) == transformers.AutoTokenizer.from_pretrained(here.base)(text)


@pytest.mark.parametrize(("base", "like"), [("dequantized", 1), ("original", 0)])
def test_merging_into_the_quantized_or_the_original_base(here, logits, base, like, capsys):
    got = merged(here, merge={"base": base}, quantization=QUANTIZED)
    assert close(got, logits[like]) and not close(got, logits[1 - like])
    shown = differences(capsys.readouterr().out)
    assert shown["dequantized base"][1] < 1e-4
    # Training used the quantized base; the printed differences are on the tokens of merge.
    model, plain = tiny_results.trained(here)
    _, quantized = tiny_results.trained(here, quantized=True)
    ids = np.random.default_rng(0).integers(0, 336, (4, 64), dtype=np.int32)
    gap = np.abs(np.asarray(model(plain, ids)) - np.asarray(model(quantized, ids)))
    np.testing.assert_allclose(shown["original base"], (gap.mean(), gap.max()), rtol=0.06)


def test_the_default_output_is_in_the_run_folder(here):
    tiny_results.run(here, command, model={"dtype": "bfloat16"})
    _, params = jlora.load_pretrained(str(here.output / "merged"), dtype="bfloat16")
    _, base = jlora.load_pretrained(str(here.base), dtype="bfloat16")
    adapter = jlora.load_adapter(here.output, base)
    jax.tree.map(np.testing.assert_array_equal, params, jlora.merge(base, adapter))


def test_full_fine_tuning_has_nothing_to_merge(here):
    with pytest.raises(ConfigError, match="no adapter to merge"):
        tiny_results.run(here, command, lora=None)
