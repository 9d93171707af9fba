"""Text towers of multimodal models compared with transformers' ``…ForConditionalGeneration``.

Its folders are read, and what jlora writes is read by it: without images both compute the same.
"""

import copy
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import LLAMA
from tiny_peers import (
    FAST,
    PEERS_TALK,
    add_noise,
    load_torch,
    peft,
    torch,
    torch_logits,
    transformers,
)

import jlora
from jlora.errors import ConfigError
from jlora.io.hf import folder as hf_folder
from jlora.io.hf import load_pretrained, save_pretrained
from jlora.lora.targets import find_targets
from jlora.models import Model
from jlora.models.registry import family_of
from jlora.models.tying import untie

pytestmark = PEERS_TALK

TEXT = {**LLAMA, "initializer_range": 0.15, "pad_token_id": 0}
del TEXT["model_type"]
SIZES = {"hidden_size": 16, "intermediate_size": 16}
PATCHES = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
QWEN_VISION = {**SIZES, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "patch_size": 14}
CONFIGS = {
    "gemma3": {
        "text_config": {
            **TEXT,
            "head_dim": 16,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 5,
        },
        "vision_config": {**SIZES, **PATCHES},
        "mm_tokens_per_image": 4,
        "image_token_index": 60,
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral", "head_dim": 16, "sliding_window": None},
        "vision_config": {**SIZES, **PATCHES, "model_type": "pixtral"},
        "image_token_index": 60,
        "tie_word_embeddings": False,
    },
    "qwen2_vl": {
        "text_config": {
            **TEXT,
            "rope_parameters": {"rope_type": "mrope", "mrope_section": [1, 1, 2]},
        },
        "vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32},
    },
    "qwen2_5_vl": {
        "text_config": {
            **TEXT,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500.0,
                "mrope_section": [1, 1, 2],
            },
        },
        "vision_config": {**QWEN_VISION, "fullatt_block_indexes": [0]},
    },
    "qwen3_vl": {
        "text_config": {
            **TEXT,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]},
        },
        "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
        "tie_word_embeddings": True,
    },
}
AUTO = transformers.AutoModelForImageTextToText
EVERY_MODEL = pytest.mark.parametrize("name", CONFIGS)
IDS = np.random.default_rng(0).integers(3, 57, (2, 12), dtype=np.int32)


def logits(model, params):
    return np.asarray(jax.jit(model, compiler_options=FAST)(params, jnp.asarray(IDS)))


def assert_close(got, want):
    assert np.abs(want).max() > 1
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name → (a folder that transformers saved, its model); each is made once."""
    cache = {}

    def get(name):
        if name not in cache:
            config = transformers.AutoConfig.for_model(name, **copy.deepcopy(CONFIGS[name]))
            torch.manual_seed(0)
            model = AUTO.from_config(config, attn_implementation="eager").eval()
            add_noise(model)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            (folder / "preprocessor_config.json").write_text("{}")
            cache[name] = folder, model
        return cache[name]

    return get


@EVERY_MODEL
def test_logits_match_transformers_and_no_vision_tensor_is_read(made, name, monkeypatch):
    folder, torch_model = made(name)
    read = []

    def spy(shards, tensor, span=None, original=hf_folder.Shards.read):
        read.append(tensor)
        return original(shards, tensor, span)

    monkeypatch.setattr(hf_folder.Shards, "read", spy)
    model, params = load_pretrained(folder, dtype="float32")
    assert_close(logits(model, params), torch_logits(torch_model, IDS))
    assert read
    assert not [tensor for tensor in read if "vis" in tensor or "projector" in tensor]
    assert family_of(model.config).architecture == type(torch_model).__name__


@EVERY_MODEL
def test_a_saved_folder_holds_what_it_was_read_from(made, name, tmp_path):
    folder, torch_model = made(name)
    model, params = load_pretrained(folder, dtype="float32")
    save_pretrained(tmp_path, model, params, max_shard_size="20KB")
    written = {k: v for f in tmp_path.glob("*.safetensors") for k, v in load_file(f).items()}
    want = load_file(folder / "model.safetensors")
    assert written.keys() == want.keys()
    for tensor, value in want.items():
        np.testing.assert_array_equal(written[tensor], value, err_msg=tensor)
    np.testing.assert_array_equal(
        torch_logits(load_torch(tmp_path, AUTO), IDS), torch_logits(torch_model, IDS)
    )
    assert (tmp_path / "preprocessor_config.json").read_text() == "{}"
    again, again_params = load_pretrained(tmp_path, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, again_params, params)
    assert json.loads(again.config.hf_json) == json.loads(model.config.hf_json)


@EVERY_MODEL
def test_adapters_have_the_names_that_peft_gives_them(made, name, tmp_path):
    """In the class that ``Family.architecture`` names; its vision tower is not adapted."""
    folder, _ = made(name)
    model, params = load_pretrained(folder, dtype="float32")
    config, _ = find_targets(params, jlora.LoraConfig(target_modules="all-linear"))
    adapter = jlora.init_adapter(jax.random.key(0), params, config)
    rng = np.random.default_rng(1)
    weights = jax.tree.map(
        lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype), adapter.weights
    )
    adapter = jlora.Adapter(weights, adapter.config)
    jlora.save_adapter(tmp_path, adapter)

    peft_model = peft.get_peft_model(
        load_torch(folder, AUTO),
        peft.LoraConfig(target_modules="all-linear", exclude_modules=r".*(vis|projector).*"),
    )
    peft_model.save_pretrained(tmp_path / "peft")
    want = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    got = load_file(tmp_path / "adapter_model.safetensors")
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}

    loaded = peft.PeftModel.from_pretrained(load_torch(folder, AUTO), tmp_path)
    adapted = {n for n, _ in loaded.named_parameters() if "lora_" in n}
    assert len(adapted) == len(got), "nothing but the text tower is adapted"
    assert_close(logits(model, jlora.attach(params, adapter)), torch_logits(loaded.eval(), IDS))
    back = jlora.load_adapter(tmp_path, params)
    jax.tree.map(np.testing.assert_array_equal, back.weights, adapter.weights)


@EVERY_MODEL
def test_files_may_have_the_names_of_modules(made, name, tmp_path):
    folder, torch_model = made(name)
    shutil.copy(folder / "config.json", tmp_path)
    tensors = {k: v.detach().numpy() for k, v in torch_model.state_dict().items()}
    if torch_model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    want, got = (load_pretrained(f, dtype="float32")[1] for f in (folder, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@EVERY_MODEL
def test_files_may_be_of_the_base_model_alone(name, tmp_path):
    """Without the head's class, by their names in it or with those of modules."""
    hf = {**copy.deepcopy(CONFIGS[name]), "tie_word_embeddings": True}
    config = transformers.AutoConfig.for_model(name, **hf)
    torch_model = transformers.AutoModel.from_config(config, attn_implementation="eager")
    torch_model.save_pretrained(tmp_path / "saved")
    (tmp_path / "modules").mkdir()
    shutil.copy(tmp_path / "saved" / "config.json", tmp_path / "modules")
    state = {k: v.detach().numpy() for k, v in torch_model.state_dict().items()}
    save_file(state, tmp_path / "modules" / "model.safetensors", metadata={"format": "pt"})
    for folder in ("saved", "modules"):
        _, params = load_pretrained(tmp_path / folder, dtype="float32")
        got = params["model"]["language_model"]["embed_tokens"]["embedding"]
        np.testing.assert_array_equal(got, state["language_model.embed_tokens.weight"])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_text_settings_may_be_beside_the_vision_towers(made, name, tmp_path):
    """As in the files that Qwen published."""
    folder, torch_model = made(name)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    hf = json.loads((folder / "config.json").read_text())
    text = hf.pop("text_config")
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat = {**text, **hf, "model_type": name}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    np.testing.assert_array_equal(
        torch_logits(load_torch(tmp_path, AUTO), IDS), torch_logits(torch_model, IDS)
    )
    model, params = load_pretrained(tmp_path, dtype="float32")
    assert_close(logits(model, params), torch_logits(torch_model, IDS))


def test_a_tied_head_is_untied_for_transformers_too(made, tmp_path):
    for name in ("gemma3", "qwen3_vl"):
        model, params = load_pretrained(made(name)[0], dtype="float32")
        separate, untied = untie(model, params)
        leaf = untied["lm_head"]["kernel"]
        untied = {**untied, "lm_head": {"kernel": leaf * 1.5}}
        save_pretrained(tmp_path / name, separate, untied)
        assert_close(logits(separate, untied), torch_logits(load_torch(tmp_path / name, AUTO), IDS))
        again = load_pretrained(tmp_path / name, dtype="float32")[1]
        np.testing.assert_array_equal(again["lm_head"]["kernel"], untied["lm_head"]["kernel"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": None}, "text_config: must be an object"),
        ({"text_config": {"model_type": "ministral3"}}, "'ministral3' is not supported"),
        ({"text_config": {**TEXT, "hidden_size": "x"}}, "text_config: hidden_size: must be int"),
    ],
)
def test_what_is_wrong_in_text_config_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        Model.from_config({"model_type": "mistral3", **change})


@pytest.mark.parametrize("skipped", [None, ["lm_head", "model.vision_tower", "layers.1.mlp"]])
def test_folders_quantized_by_bitsandbytes_are_read_and_written(tmp_path, skipped):
    """By default the vision tower is quantized, too: it is copied, or dequantized."""
    bnb = pytest.importorskip("bitsandbytes")
    text = {**CONFIGS["gemma3"]["text_config"], "hidden_size": 64, "intermediate_size": 64}
    vision = {**PATCHES, "hidden_size": 64, "intermediate_size": 64}
    hf = {**CONFIGS["gemma3"], "text_config": text, "vision_config": vision}
    config = transformers.AutoConfig.for_model("gemma3", **hf)
    torch.manual_seed(0)
    AUTO.from_config(config).save_pretrained(tmp_path / "16")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped
    )
    options = {"dtype": torch.float32, "attn_implementation": "eager", "device_map": "cpu"}
    quantized = AUTO.from_pretrained(tmp_path / "16", quantization_config=settings, **options)
    quantized.save_pretrained(tmp_path / "4")

    model, params = load_pretrained(tmp_path / "4", dtype="float32")
    save_pretrained(tmp_path / "dense", model, params)
    save_pretrained(tmp_path / "again", model, params, quantized=True)
    dense, again = (load_torch(tmp_path / name, AUTO) for name in ("dense", "again"))
    assert_close(logits(model, params), torch_logits(dense, IDS))
    modules = dict(quantized.named_modules())
    linear = [n for n, m in modules.items() if isinstance(m, bnb.nn.Linear4bit)]
    assert any("vision" in name for name in linear) == (skipped is None)
    for name in linear:
        weight = modules[name].weight
        values = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        torch.testing.assert_close(dense.get_submodule(name).weight, values, rtol=0, atol=0)
        same = again.get_submodule(name).weight.data
        torch.testing.assert_close(same, weight.data, rtol=0, atol=0)
    others = {n for n, m in again.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert others == {*linear}
