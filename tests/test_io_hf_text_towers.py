"""Folders of multimodal models: the text tower is the model, the rest of the files is copied."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import CONFIGS, tokens

import jlora
from jlora.errors import StorageError
from jlora.io.hf import load_pretrained, save_pretrained
from jlora.models import Model, init_params
from jlora.quant.params import is_quantized

MISTRAL = {**CONFIGS["llama"], "model_type": "mistral"}
VISION = {
    "vision_tower.patch_conv.weight": np.arange(12.0, dtype=np.float32).reshape(3, 4),
    "vision_tower.position_ids": np.arange(4),
    "multi_modal_projector.linear.weight": np.ones((2, 3), np.float16),
}


@pytest.fixture
def folder(tmp_path):
    """A mistral3 folder with three tensors of vision."""
    hf = {"model_type": "mistral3", "text_config": MISTRAL, "vision_config": {}, "x": 1}
    model = Model.from_config(hf, "float32")
    save_pretrained(tmp_path / "m", model, init_params(jax.random.key(0), model))
    file = tmp_path / "m" / "model.safetensors"
    save_file({**load_file(file), **VISION}, file, metadata={"format": "pt"})
    (tmp_path / "m" / "preprocessor_config.json").write_text('{"size": 14}')
    return tmp_path / "m"


def test_what_is_no_part_of_the_model_is_copied(folder, tmp_path):
    model, params = load_pretrained(folder, dtype="float32")
    assert params.keys() == {"model", "lm_head"} and params["model"].keys() == {"language_model"}
    save_pretrained(tmp_path / "out", model, params)
    written, want = (load_file(f / "model.safetensors") for f in (tmp_path / "out", folder))
    assert written.keys() == want.keys() > VISION.keys()
    assert all((written[name] == want[name]).all() for name in want)
    assert {name: written[name].dtype for name in VISION} == {
        name: value.dtype for name, value in VISION.items()
    }
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 14}'
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf["text_config"] == MISTRAL and hf["x"] == 1


def test_the_folder_may_be_written_over(folder):
    model, params = load_pretrained(folder, dtype="float32")
    params = jax.tree.map(lambda x: x + 1, params)
    save_pretrained(folder, model, params)
    again = load_pretrained(folder, dtype="float32")[1]
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert load_file(folder / "model.safetensors").keys() > VISION.keys()


def test_nothing_is_written_without_the_folder_to_copy_from(folder, tmp_path):
    model, params = load_pretrained(folder, dtype="float32")
    shutil.rmtree(folder)
    with pytest.raises(StorageError, match="put the folder back"):
        save_pretrained(tmp_path / "out", model, params)
    assert not (tmp_path / "out").exists()


def test_it_computes_what_the_text_model_computes(folder, tmp_path):
    model, params = load_pretrained(folder, dtype="float32")
    text = Model.from_config(MISTRAL, "float32")
    tree = {"model": params["model"]["language_model"], "lm_head": params["lm_head"]}
    ids = tokens(text, 2, 12)
    np.testing.assert_array_equal(model(params, ids), text(tree, ids))
    quantized = load_pretrained(folder, quantization=jlora.QuantConfig())[1]
    layers = quantized["model"]["language_model"]["layers"]
    assert is_quantized(layers["mlp"]["up_proj"]["kernel"])
    assert not is_quantized(quantized["lm_head"]["kernel"])


def test_token_ids_beside_text_config_are_those_of_the_model():
    """As in transformers' ``GenerationConfig.from_model_config``; null is not set."""
    text = {**MISTRAL, "bos_token_id": 3, "eos_token_id": 4}
    hf = {"model_type": "mistral3", "text_config": text, "vision_config": {}}
    config = Model.from_config({**hf, "bos_token_id": 5, "eos_token_id": [1, 106]}).config
    assert (config.bos_token_id, config.eos_token_ids) == (5, (1, 106))
    config = Model.from_config({**hf, "bos_token_id": None, "eos_token_id": None}).config
    assert (config.bos_token_id, config.eos_token_ids) == (3, (4,))
