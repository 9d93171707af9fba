"""Commands on the folder of a PEFT adapter, which has no settings file of a run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_results
from safetensors.numpy import load_file
from tiny_runs import OFF, Place

import jlora
from jlora import cli, config
from jlora.data.tokenizer import load_tokenizer
from jlora.errors import ConfigError, DataError

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folder(result, tmp_path):
    """What PEFT writes: the adapter's two files, with the base's path."""
    out = tmp_path / "adapter"
    out.mkdir()
    shutil.copy(result.output / WEIGHTS, out)
    edit(shutil.copy(result.output / "adapter_config.json", out), str(result.base))
    return out


def edit(file, base, **values):
    settings = json.loads(Path(file).read_text())
    Path(file).write_text(json.dumps(settings | {"base_model_name_or_path": base} | values))


def run(command, folder, *overrides):
    return cli.main(command, [str(folder), OFF, *map(str, overrides)])


def test_the_settings_are_those_of_the_adapter_and_its_base(folder, result):
    edit(folder / "adapter_config.json", str(result.base), lora_dropout=0.25, revision="abc")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    settings = config.load(folder, ["generate.prompt=hi"], adapters=True)
    assert settings.model.name_or_path == settings.lora.base_model_name_or_path == str(result.base)
    assert (settings.model.revision, settings.model.dtype) == ("abc", "float32")
    assert settings.lora.lora_dropout == 0.25 and settings.train.output_dir == str(folder)
    assert settings.data.chat_template == str(folder / "chat_template.jinja")
    other = config.load(folder, ["model.name_or_path=org/base", "model.dtype=bf16"], adapters=True)
    assert (other.model.name_or_path, other.model.dtype) == ("org/base", "bfloat16")


TEMPLATE = (
    "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + '<|eos|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


@pytest.fixture
def with_tokenizer(folder, result):
    """The folder with a tokenizer that has another template and another token than the base's."""
    tokenizer = load_tokenizer(str(result.base))
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens(["<|tool|>"])
    tokenizer.save_pretrained(folder)
    return folder


def test_the_tokenizer_is_the_folders_as_for_auto_peft_model(with_tokenizer, result, capsys):
    folder = with_tokenizer
    template = folder.parent / "template.jinja"
    template.write_text(TEMPLATE)
    assert config.load(folder, adapters=True).model.tokenizer_name_or_path == str(folder)
    place = Place(folder.parent, result.base, result.cache)
    place.output = result.output
    settings = place.write(lora=tiny_results.LORA)
    heard = {}
    for where, more in (
        (folder, ()),
        (settings, (f"data.chat_template={template}",)),
        (settings, ()),
    ):
        prompt = ("generate.prompt=say one", "generate.max_new_tokens=5")
        assert run("generate", where, *prompt, *more) == 0
        heard[where, more] = capsys.readouterr()
    own, same, base = heard.values()
    assert own.out == same.out != base.out
    said = f"the tokenizer is that of {folder}: it has tokens that the base's lacks (1: '<|tool|>')"
    assert f"{said} and another chat template" in own.err and "tokenizer" not in base.err
    assert run("generate", folder, *prompt, f"model.tokenizer_name_or_path={result.base}") == 0
    assert "tokenizer is that" not in capsys.readouterr().err


def test_a_token_without_an_embedding_is_an_error_or_said(with_tokenizer, result, capsys):
    tokenizer = load_tokenizer(str(with_tokenizer))
    size = json.loads((result.base / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<|{i}|>" for i in range(size + 2 - len(tokenizer))])
    tokenizer.save_pretrained(with_tokenizer)
    last = tokenizer.convert_ids_to_tokens(size + 1)
    assert run("generate", with_tokenizer, f"generate.prompt=say {last}") == 65
    assert f"holds token {size + 1}, but the model has {size}" in capsys.readouterr().err
    assert run("merge", with_tokenizer) == 0
    assert "no embeddings for 2 tokens, such as" in capsys.readouterr().out
    merged = load_tokenizer(str(with_tokenizer / "merged"))
    assert merged.chat_template == TEMPLATE and last in merged.get_vocab()


def test_the_base_of_a_folder_of_mlx_lm_is_its_model(tmp_path):
    raw = {"model": "org/base", "lora_parameters": {"rank": 4, "scale": 2.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    assert config.load(tmp_path, adapters=True).model.name_or_path == "org/base"


@pytest.mark.parametrize("outer", [{}, {"dtype": "float8"}])
def test_the_data_type_may_be_that_of_the_language_model(folder, tmp_path, outer):
    base = tmp_path / "base"
    base.mkdir()
    inner = {"text_config": {"torch_dtype": "float16"}}
    (base / "config.json").write_text(json.dumps(outer | inner))
    edit(folder / "adapter_config.json", str(base))
    assert config.load(folder, adapters=True).model.dtype == "float16"


def test_merge(folder, result):
    assert run("merge", folder) == 0
    model, params = tiny_results.trained(result)
    got = tiny_results.logits(*jlora.load_pretrained(folder / "merged", dtype="float32"))
    np.testing.assert_allclose(got, tiny_results.logits(model, params), atol=1e-4)


def test_generate_and_evaluate_as_on_the_run(folder, result, tmp_path, capsys):
    place = Place(tmp_path, result.base, result.cache)
    place.output = result.output
    settings = place.write(lora=tiny_results.LORA)
    heard = []
    for where in (settings, folder):
        prompt = ("generate.prompt=say one", "generate.max_new_tokens=5")
        assert run("generate", where, *prompt) == 0
        heard.append(capsys.readouterr().out)
    assert heard[0] == heard[1] and heard[0].strip()
    rows = f"data.eval=[{{path: {result.held_out}, format: messages}}]"
    for where in (settings, folder):
        assert run("evaluate", where, rows, "data.max_length=64", "evaluate.samples=0") == 0
    one, other = (json.loads((f / "evaluation.json").read_text()) for f in (result.output, folder))
    assert one["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-6)


def test_export(folder, capsys):
    """Without checkpoints: the adapter itself, as jlora writes it."""
    assert run("export", folder, "lora.base_model_name_or_path=org/base") == 0
    out = folder / "exported" / "adapter"
    written, read = load_file(out / WEIGHTS), load_file(folder / WEIGHTS)
    assert written.keys() == read.keys()
    assert all(np.array_equal(written[name], read[name]) for name in read)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "org/base"
    )
    assert (out / "tokenizer.json").is_file()
    assert run("export", folder, "export.checkpoint=3") == 2
    assert "not a complete checkpoint" in capsys.readouterr().err


def test_what_is_missing_is_said(folder, tmp_path, capsys):
    with pytest.raises(ConfigError, match="no such file"):  # a run is trained from settings
        config.load(folder)
    edit(folder / "adapter_config.json", str(tmp_path / "gone"))
    assert run("merge", folder) == 2
    said = capsys.readouterr().err
    assert "adapter_config.json: model.name_or_path" in said and "gone" in said
    edit(folder / "adapter_config.json", None)
    assert run("merge", folder) == 2
    assert "model.name_or_path: is missing" in capsys.readouterr().err
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        config.load(folder, adapters=True)


def test_a_classifier_needs_its_classes(folder, result, capsys):
    edit(folder / "adapter_config.json", str(result.base), task_type="SEQ_CLS")
    assert run("merge", folder) == 2
    assert "model.id2label: an adapter's folder does not name" in capsys.readouterr().err
