"""The merged model computes the same logits as base and adapter."""

import errno
import importlib
import json
import os
import re
import shutil
import stat

import ml_dtypes
import numpy as np
import pytest
import tiny_results
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_runs import Place

import jlora
from jlora.errors import ConfigError, StorageError

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


def test_merging_into_the_original_of_a_base_quantized_in_some_layers(here, logits, capsys):
    skip = {"llm_int8_skip_modules": ["model.layers.1.mlp"]}
    got = merged(here, merge={"base": "original"}, quantization=QUANTIZED | skip)
    assert close(got, logits[0])
    shown = differences(capsys.readouterr().out)
    assert 0 < shown["dequantized base"][1] < 1e-4 < shown["original base"][1]


def test_the_default_output_is_in_the_run_folder(here, logits):
    tiny_results.run(here, command)
    got = tiny_results.logits(*jlora.load_pretrained(str(here.output / "merged"), dtype="float32"))
    assert close(got, logits[0])


def test_full_fine_tuning_has_nothing_to_merge(here):
    with pytest.raises(ConfigError, match="no adapter to merge"):
        tiny_results.run(here, command, lora=None)


@pytest.mark.parametrize("way", ["itself", "a link", "dots", "its parent"])
@pytest.mark.parametrize("input", ["base", "run"])
def test_the_folders_that_are_read_are_not_written_to(here, tmp_path, way, input):
    read = here.base if input == "base" else here.output
    before = {file: file.read_bytes() for file in read.iterdir() if file.is_file()}
    out = {"itself": read, "dots": read / "x" / "..", "its parent": read.parent}.get(way)
    if out is None:
        out = tmp_path / "link" / read.name
        out.parent.symlink_to(read.parent)
    with pytest.raises(ConfigError, match="would be overwritten"):
        merged(here, merge={"output_dir": str(out)})
    assert {file: file.read_bytes() for file in read.iterdir() if file.is_file()} == before


def test_a_folder_with_another_adapter_is_refused(here, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds an adapter"):
        merged(here)


def test_a_merge_that_fails_leaves_the_earlier_one(here, tmp_path, monkeypatch):
    """The tokenizer comes after the weights: without it, neither weights nor links are replaced."""
    out = tmp_path / "merged"
    out.mkdir()
    (out / "model.safetensors").write_text("earlier")
    (out / "tokenizer.json").symlink_to(here.base / "tokenizer.json")
    linked = (here.base / "tokenizer.json").read_bytes()

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", fail)
        with pytest.raises(StorageError, match="the disk is full"):
            merged(here)
    assert sorted(file.name for file in out.iterdir()) == ["model.safetensors", "tokenizer.json"]
    assert (out / "model.safetensors").read_text() == "earlier"
    merged(here)
    assert not (out / "tokenizer.json").is_symlink()
    assert (here.base / "tokenizer.json").read_bytes() == linked


def dtypes(folder):
    with safe_open(folder / "model.safetensors", "numpy") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def copy_base(here, change):
    """The base with its tensors changed, and the run's record of the base left out."""
    base = shutil.copytree(here.base, here.folder / "base")
    tensors = load_file(base / "model.safetensors")
    save_file({k: change(k, v) for k, v in tensors.items()}, base / "model.safetensors")
    return base


@pytest.mark.parametrize(("computed", "told"), [("float32", None), ("bfloat16", "float16")])
def test_the_file_has_the_bases_types(here, computed, told):
    def mixed(name, value):
        return value if "norm" in name else value.astype(ml_dtypes.bfloat16)

    model = {"name_or_path": str(copy_base(here, mixed)), "dtype": computed}
    merged(here, model=model, merge={"dtype": told})
    stored = dtypes(here.folder / "merged")
    if told:
        assert set(stored.values()) == {"F16"}
    else:
        assert stored == dtypes(here.folder / "base")
    text = (here.folder / "merged" / "config.json").read_text()
    assert json.loads(text)["dtype"] == (told or "bfloat16")


def test_a_wider_base_keeps_what_the_run_rounded(here, logits):
    """A float32 base of a bfloat16 run: merged in float32, as peft would on that base."""
    assert close(merged(here, model={"dtype": "bfloat16"}), logits[0])
    one, base = (load_file(f / "model.safetensors") for f in (here.folder / "merged", here.base))
    same = [name for name in base if np.array_equal(one[name], base[name])]
    assert "model.norm.weight" in same and "model.embed_tokens.weight" in same


def test_generation_settings_and_modes_are_kept(here):
    base = copy_base(here, lambda _, value: value)
    settings = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": [5, 7]}
    (base / "generation_config.json").write_text(json.dumps(settings))
    before = os.umask(0o027)
    try:
        merged(here, model={"name_or_path": str(base)})
    finally:
        os.umask(before)
    out = here.folder / "merged"
    assert json.loads((out / "generation_config.json").read_text()) == settings
    assert {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()} == {0o640}
