"""Training embeddings and heads, tied or not, compared with peft: live, reloaded and merged.

A tied model's head keeps the base's values in peft, whatever is trained of the embedding; only
single rows (``trainable_token_indices``) are the head's, too. What trains the head by itself needs
an untied one here; the folder then gives the same logits in peft, on the tied base.
"""

import copy
import dataclasses

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tiny_models import CONFIGS
from tiny_peers import (
    IDS,
    LLAMA,
    PEERS_TALK,
    Base,
    assert_close,
    compare,
    jlora_logits,
    make_peft,
    peft,
    torch_logits,
    transformers,
)

import jlora
from jlora.errors import ConfigError, DataError
from jlora.models import Model, head_differs, init_params

pytestmark = [
    *PEERS_TALK,
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*tied:UserWarning"),
]

EMBEDDING_WAYS = {
    "in full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "LoRA": {"target_modules": ["q_proj", "embed_tokens"], "r": 4},
    "DoRA": {"target_modules": ["q_proj", "embed_tokens"], "r": 4, "use_dora": True},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 6]},
}
HEAD_WAYS = {
    "head in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"], "r": 4},
    "DoRA on the head": {"target_modules": ["lm_head"], "r": 4, "use_dora": True},
    "LoRA on both": {"target_modules": ["lm_head", "embed_tokens"], "r": 4},
    "embedding in full, LoRA on the head": {
        "target_modules": ["lm_head"],
        "modules_to_save": ["embed_tokens"],
    },
    "LoRA on the embedding, head in full": {
        "target_modules": ["embed_tokens"],
        "modules_to_save": ["lm_head"],
    },
    "rows of the head": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"lm_head": [3, 6, 60]},
    },
}
UNTIED_WAYS = {
    "rows of both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [3, 6], "lm_head": [6, 9]},
    },
    "rows of the embedding, head in full": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": [3, 6],
        "modules_to_save": ["lm_head"],
    },
    "rows of the embedding, LoRA on the head": {
        "target_modules": ["lm_head"],
        "trainable_token_indices": [3, 6],
    },
}


def make_base(folder, tied):
    torch.manual_seed(0)
    config = copy.deepcopy(LLAMA)
    config.tie_word_embeddings, config.num_hidden_layers = tied, 1
    module = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    module.save_pretrained(folder)
    return Base(module, folder, *jlora.load_pretrained(folder, dtype="float32"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """By whether the head is tied."""
    return {tied: make_base(tmp_path_factory.mktemp("base"), tied) for tied in (True, False)}


def reloaded(base, folder):
    """The logits of peft's model of a folder, on a fresh base."""
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base.module), folder)
    return torch_logits(model.eval())


def check(base, base_for_jlora, fields, folder):
    """Values and gradients live, the folder in peft, and the merged model read by transformers."""
    peft_model = make_peft(base, fields)
    want = torch_logits(peft_model)
    peft_model.save_pretrained(folder / "peft", save_embedding_layers=False)
    adapter = jlora.load_adapter(folder / "peft", base_for_jlora.params)
    compare(base_for_jlora, peft_model, adapter)
    jlora.save_adapter(folder / "jlora", adapter)
    assert_close(reloaded(base, folder / "jlora"), want, 1e-4)

    model, params = base_for_jlora.model, base_for_jlora.params
    if head_differs(model, jlora.attach(params, adapter)):
        with pytest.raises(DataError, match="tied"):
            jlora.merge(params, adapter)
        with pytest.raises(DataError, match="tied"):
            jlora.save_pretrained(folder / "merged", model, jlora.attach(params, adapter))
        model, params = jlora.untie(model, params)
    jlora.save_pretrained(folder / "merged", model, jlora.merge(params, adapter))
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "merged", dtype=torch.float32, attn_implementation="eager"
    )
    assert_close(torch_logits(merged), want, 1e-4)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("way", EMBEDDING_WAYS)
def test_an_embedding_trains_as_in_peft(bases, way, tied, tmp_path):
    check(bases[tied], bases[tied], EMBEDDING_WAYS[way], tmp_path)


@pytest.mark.parametrize("way", [*HEAD_WAYS, *UNTIED_WAYS])
def test_a_head_trains_as_in_peft(bases, way, tmp_path):
    check(bases[False], bases[False], (HEAD_WAYS | UNTIED_WAYS)[way], tmp_path)


@pytest.mark.parametrize("way", HEAD_WAYS)
def test_a_tied_head_trains_after_untying_and_loads_in_peft_on_the_tied_base(bases, way, tmp_path):
    base, fields = bases[True], HEAD_WAYS[way]
    with pytest.raises(ConfigError, match=r"lm_head.*tied.*model\.untie: true"):
        jlora.init_adapter(jax.random.key(0), base.params, jlora.LoraConfig(**fields))
    model, params = jlora.load_pretrained(base.folder, dtype="float32", untie=True)
    check(base, dataclasses.replace(base, model=model, params=params), fields, tmp_path)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_adapter_with_a_resized_vocabulary_brings_its_embeddings(bases, tied, tmp_path):
    base, fields = bases[tied], {"target_modules": ["q_proj"]}
    make_peft(base, fields).save_pretrained(tmp_path / "same", save_embedding_layers=True)
    same = jlora.load_adapter(tmp_path / "same", base.params)
    assert set(same.weights) == {"model"}

    module = copy.deepcopy(base.module)
    module.resize_token_embeddings(70, mean_resizing=False)
    peft_model = make_peft(base, fields, module)
    peft_model.save_pretrained(tmp_path / "more", save_embedding_layers=True)
    with pytest.raises(DataError, match=r"vocabulary may have been resized(.|\n)*embeddings\("):
        jlora.load_adapter(tmp_path / "more", base.params)
    model, params = jlora.with_adapter_embeddings(tmp_path / "more", base.model, base.params)
    adapter = jlora.load_adapter(tmp_path / "more", params)
    resized = dataclasses.replace(base, model=model)
    assert_close(jlora_logits(resized, params, adapter), torch_logits(peft_model), 1e-5)
    jlora.save_pretrained(tmp_path / "base", model, params)
    assert jlora.load_pretrained(tmp_path / "base")[0].config.vocab_size == 70
    with pytest.raises(DataError, match="holds no embedding"):
        jlora.save_adapter(tmp_path / "none", same)
        jlora.with_adapter_embeddings(tmp_path / "none", base.model, base.params)


@pytest.mark.parametrize(("outer", "inner"), [("qwen3_vl", "qwen3"), ("gemma3", "gemma3")])
def test_a_text_tower_with_a_resized_vocabulary_is_saved_and_read(outer, inner, tmp_path):
    """The size of its vocabulary is in ``text_config``."""
    tied = {"tie_word_embeddings": True}
    text = {**CONFIGS[inner], **tied, "model_type": f"{outer}_text"}
    hf = {"model_type": outer, "text_config": text, "vision_config": {}, **tied}
    model = Model.from_config(hf, "float32")
    table = np.random.default_rng(0).standard_normal((64, 32), np.float32)
    name = "base_model.model.model.language_model.embed_tokens.weight"
    save_file({name: table}, tmp_path / "adapter_model.safetensors")
    params = init_params(jax.random.key(0), model)
    model, params = jlora.with_adapter_embeddings(tmp_path, model, params)
    jlora.save_pretrained(tmp_path / "base", model, params)
    again, read = jlora.load_pretrained(tmp_path / "base", dtype="float32")
    assert again.config.vocab_size == 64
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_untying_while_loading_or_later_is_the_same(bases):
    base = bases[True]
    model, params = jlora.load_pretrained(base.folder, dtype="float32", untie=True)
    later_model, later = jlora.untie(base.model, base.params)
    assert model == later_model
    jax.tree.map(np.testing.assert_array_equal, params, later)
    assert_close(jlora_logits(dataclasses.replace(base, model=model), params, None, IDS),
                 torch_logits(base.module), 1e-5)  # fmt: skip
    with pytest.raises(ConfigError, match="not tied"):
        jlora.load_pretrained(bases[False].folder, untie=True)
