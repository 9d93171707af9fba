"""The command writes the quantized base and its tokenizer, and reports its size."""

import importlib
import re

import numpy as np
import pytest
import tiny_results
import transformers
from safetensors.numpy import load_file

import jlora
from jlora import cli
from jlora.errors import ConfigError
from jlora.io.hf import save_pretrained

command = importlib.import_module("jlora.quantize")  # jlora.quantize is the function
NF4 = {"bnb_4bit_compute_dtype": "float32"}


def quantized(place, *overrides, quantization=NF4, **sections):
    """Runs the command; returns the tensors that it wrote."""
    tiny_results.run(place, command, *overrides, quantization=quantization, **sections)
    out = sections.get("quantize", {}).get("output_dir") or place.output / "quantized"
    return load_file(f"{out}/model.safetensors")


@pytest.mark.parametrize("fields", [{}, {"load_in_8bit": True}, {"include_modules": ["lm_head"]}])
def test_it_writes_the_base_as_it_is_loaded(place, fields):
    got = quantized(place, quantization=NF4 | fields)
    settings = jlora.QuantConfig(**NF4, **fields)
    model, params = jlora.load_pretrained(place.base, "float32", quantization=settings)
    save_pretrained(place.folder / "wanted", model, params, quantized=True)
    want = load_file(place.folder / "wanted" / "model.safetensors")
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    config = (place.folder / "wanted" / "config.json").read_bytes()
    assert (place.output / "quantized" / "config.json").read_bytes() == config


def test_the_tokenizer_is_written_too(place):
    quantized(place)
    tokenizers = [
        transformers.AutoTokenizer.from_pretrained(folder)
        for folder in (place.base, place.output / "quantized")
    ]
    ids, again = (tokenizer("say one") for tokenizer in tokenizers)
    assert ids == again and tokenizers[0].chat_template == tokenizers[1].chat_template


def test_the_compute_dtype_is_the_requested_one(place):
    quantized(place, quantization={"bnb_4bit_compute_dtype": "bfloat16"})
    text = (place.output / "quantized" / "config.json").read_text()
    assert '"bnb_4bit_compute_dtype": "bfloat16"' in text and '"dtype": "float32"' in text


def test_it_reports_its_settings_and_sizes(place, capsys):
    out = place.folder / "elsewhere"
    quantized(place, quantize={"output_dir": str(out)})
    shown = capsys.readouterr().out
    steps = [
        f"reading {place.base}",
        "nf4 with double quantization, blocks of 64",
        f"writing {out}",
    ]
    places = [shown.index(step) for step in steps]
    assert places == sorted(places)
    rows = dict(re.findall(r"^ {2}(\S.*?) {2,}(.*)$", shown, re.MULTILINE))
    assert rows["quantized model"] == str(out)
    # A layer's seven matrices have 9,216 values in 144 blocks: 4,608 bytes of codes, 144 of absmax
    # and 7 times two floats; the model has two embeddings of 336 by 32 and five norms besides.
    bits = 8 * (4608 + 144 + 7 * 8) / 9216
    assert rows["quantized"] == f"18,432 of 40,096 parameters, {bits:.2f} bits each"
    for row, folder in (("weights before", place.base), ("weights after", out)):
        size = (folder / "model.safetensors").stat().st_size / 2**20
        assert rows[row] == f"{size:.1f} MiB"
    assert not (place.output / "quantized").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["quantization=null"],
            r"quantization: the settings do not say[\s\S]*fix: add the section",
        ),
        (
            ["quantization.include_modules=[embed_tokens]"],
            r"embed_tokens: transformers cannot load a quantized embedding",
        ),
        (["quantization.include_modules=[lm_haed]"], "no module is called 'lm_haed'"),
        (["quantize.output_dir={base}"], r"quantize\.output_dir: is the folder of the base"),
        (["quantize.output_dir={link}/."], r"quantize\.output_dir: is the folder of the base"),
        (["quantize.output_dir={adapter}"], r"quantize\.output_dir: .* holds an adapter"),
        (["quantize.output=x"], "unknown key"),
    ],
)
def test_errors_are_reported_before_weights_are_read(
    place, monkeypatch, capsys, overrides, message
):
    monkeypatch.setattr(command, "load_pretrained", lambda *_, **__: pytest.fail("read"))
    link = place.folder / "link"
    link.symlink_to(place.base)
    file = str(place.write(quantization=NF4))
    before = sorted(place.base.iterdir())
    adapter = place.folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    folders = {"base": place.base, "link": link, "adapter": adapter}
    overrides = [text.format(**folders) for text in overrides]
    assert cli.dispatch(["quantize", file, *overrides]) == ConfigError.exit_code
    assert re.search(message, capsys.readouterr().err)
    assert sorted(place.base.iterdir()) == before and not place.output.exists()
