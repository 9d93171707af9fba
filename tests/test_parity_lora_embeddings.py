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
from safetensors.numpy import load_file, save_file
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
    torch,
    torch_logits,
    transformers,
)

import jlora
from jlora.errors import ConfigError, DataError
from jlora.models import Model, head_differs, init_params
from jlora.tree import paths

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


PHI = transformers.PhiConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=4, max_position_embeddings=32, initializer_range=0.1,
)  # fmt: skip
"""Its head has a bias."""


def make_base(folder, config, **changes):
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.update(changes)
    module = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    module.save_pretrained(folder)
    return Base(module, folder, *jlora.load_pretrained(folder, dtype="float32"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Llama by whether the head is tied."""
    changes = {"num_hidden_layers": 1}
    return {
        tied: make_base(tmp_path_factory.mktemp("b"), LLAMA, **changes, tie_word_embeddings=tied)
        for tied in (True, False)
    }


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


@pytest.mark.parametrize("tied", [True, False, None], ids=["tied", "untied", "Phi"])
def test_an_adapter_with_a_resized_vocabulary_brings_its_embeddings(bases, tied, tmp_path):
    base = make_base(tmp_path / "phi", PHI) if tied is None else bases[tied]
    fields = {"target_modules": ["q_proj"]}
    make_peft(base, fields).save_pretrained(tmp_path / "same", save_embedding_layers=True)
    same = jlora.load_adapter(tmp_path / "same", base.params)
    assert {path[-1] for path, _ in paths.walk(same.weights)} == {"lora_A", "lora_B"}

    module = copy.deepcopy(base.module)
    module.resize_token_embeddings(70, mean_resizing=False)
    if tied is None:  # zeros otherwise
        torch.nn.init.normal_(module.lm_head.bias)
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


def test_a_folder_without_all_embeddings_of_one_size_is_refused(bases, tmp_path):
    base, file = bases[False], tmp_path / "adapter_model.safetensors"
    make_peft(base, {"target_modules": ["q_proj"]}).save_pretrained(
        tmp_path, save_embedding_layers=True
    )
    saved = load_file(file)
    table, head = (next(n for n in saved if end in n) for end in ("embed_tokens", "lm_head"))

    def message(**tensors):
        lora = {name: x for name, x in saved.items() if name not in (table, head)}
        save_file(lora | {{"table": table, "head": head}[k]: x for k, x in tensors.items()}, file)
        with pytest.raises(DataError) as caught:
            jlora.with_adapter_embeddings(tmp_path, base.model, base.params)
        return str(caught.value)

    rows = np.zeros((70, 64), np.float32)
    assert "holds no embedding\n  fix: use the base model as it is" in message()
    text = message(table=rows, head=rows[:66])
    assert "its embedding and its head have different numbers of tokens: [66, 70]" in text
    text = message(table=rows)
    assert "holds an embedding of 70 tokens, but no output head; the model's is not tied" in text
    assert "save_embedding_layers=True" in text


def test_a_resized_head_without_the_embedding_is_refused(tmp_path):
    """PEFT saves the weights of a head that has an adapter, and leaves out the embedding."""
    base = make_base(tmp_path / "phi", PHI)
    module = copy.deepcopy(base.module)
    module.resize_token_embeddings(70, mean_resizing=False)
    fields = {"target_modules": ["q_proj", "lm_head"]}
    make_peft(base, fields, module).save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(DataError, match="no embedding, only an output head of another size") as e:
        jlora.with_adapter_embeddings(tmp_path, base.model, base.params)
    assert "embed_tokens in modules_to_save" in e.value.fix


def test_an_adapter_of_a_head_with_its_base_weights_loads(tmp_path):
    base = make_base(tmp_path / "phi", PHI)
    fields = {"target_modules": ["q_proj", "lm_head"]}
    peft_model = make_peft(base, fields)
    peft_model.save_pretrained(tmp_path, save_embedding_layers=True)
    adapter = jlora.load_adapter(tmp_path, base.params)
    assert_close(jlora_logits(base, base.params, adapter), torch_logits(peft_model), 1e-5)


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
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
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
