"""Every file in configs/ loads, says what it is for, and holds what its name promises."""

from pathlib import Path

import pytest

from jlora import config

FOLDER = Path(__file__).parent.parent / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))


def load(name: str) -> config.Config:
    return config.load(FOLDER / f"{name}.yaml")


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_loads_and_is_explained(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # from anywhere
    settings = config.load(file)
    assert settings.train.output_dir == f"outputs/{file.stem}"
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert f"python -m jlora.train configs/{file.name}" in text


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_name_says_how_it_trains(file):
    settings = config.load(file)
    quantized, adapter = settings.quantization is not None, settings.lora is not None
    way = file.stem.rpartition("-")[2]
    expected = {"lora": (False, True), "full": (False, False)}.get(way, (True, True))
    assert (quantized, adapter) == expected


def test_the_needed_ones_are_there():
    names = {f.stem for f in FILES}
    assert names >= {"quickstart", "quickstart-lora", "quickstart-full", "qwen3-8b-qlora"}
    assert names >= {"llama-3.1-8b-lora", "llama-3.1-8b-qlora", "dialogpt-medium-lora"}


def test_quickstart_is_qlora_on_every_linear_layer():
    c = load("quickstart")
    assert c.quantization.bnb_4bit_quant_type == "nf4"
    assert c.quantization.bnb_4bit_use_double_quant
    assert c.lora.target_modules == "all-linear"
    assert c.evaluate.exact_match


def test_dialogpt_is_the_articles():
    c = load("dialogpt-medium-lora")
    assert c.model.name_or_path == "microsoft/DialoGPT-medium"
    assert (c.lora.r, c.lora.lora_alpha, c.lora.lora_dropout) == (16, 32, 0.1)
    assert tuple(c.lora.target_modules) == ("q_proj", "v_proj")
    t = c.train
    assert (t.per_device_train_batch_size, t.gradient_accumulation_steps) == (4, 4)
    assert (t.num_train_epochs, t.learning_rate) == (3, 2e-4)
    assert (t.fp16, t.bf16, t.save_steps, t.logging_steps) == (True, False, 500, 100)


def test_base_of_the_quickstart_loads(tmp_path, monkeypatch):
    """base.yaml names what make_model writes before it trains."""
    assets = Path(config.__file__).parent.parent / "assets" / "quickstart"
    (tmp_path / "init").mkdir()
    (tmp_path / "corpus").mkdir()
    for name in ("text", "chat"):
        (tmp_path / "corpus" / f"{name}.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    settings = config.load(assets / "base.yaml")
    assert settings.model.name_or_path == str(tmp_path / "init")
    assert (settings.lora, settings.quantization) == (None, None)
