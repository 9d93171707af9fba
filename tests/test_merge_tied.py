"""A model whose output head is tied to the embedding, through the commands."""

import importlib
from argparse import Namespace

import jax
import numpy as np
import pytest
import tiny_results
from tiny_runs import Place, make_base, write_rows

import jlora
from jlora import config as settings

command = importlib.import_module("jlora.merge")  # jlora.merge is the function


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.fixture
def tied(tied_base, tiny_cache, tmp_path):
    return Place(tmp_path, tied_base, tiny_cache)


@pytest.mark.parametrize(
    "lora",
    [
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"trainable_token_indices": {"lm_head": [3]}},
    ],
)
def test_a_tied_head_is_trained_only_after_untying(tied, capsys, lora):
    assert tied.main(lora=lora) == 2
    message = capsys.readouterr().err
    assert "lm_head" in message and "model.untie: true" in message
    assert len(message.splitlines()) <= 15


def test_an_untied_head_trains_and_is_merged(tied):
    tied.settings_for_loss()
    lora = {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}
    tied.run(lora=lora, model={"untie": True}, train={"max_steps": 2, "bf16": False})
    model, params = jlora.load_pretrained(tied.base, dtype="float32", untie=True)
    adapter = jlora.load_adapter(tied.output, params)
    want = tiny_results.logits(model, jlora.attach(params, adapter))
    again = settings.load(tied.output, ["train.compilation_cache=false"])
    assert again.model.untie
    command.run(again, Namespace())
    got = tiny_results.logits(*jlora.load_pretrained(tied.output / "merged", dtype="float32"))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    base = tiny_results.logits(*jlora.load_pretrained(tied.base, dtype="float32"))
    assert np.abs(got - base).max() > 1e-3


def test_rows_that_a_tied_head_would_follow_are_not_trained_apart(tied, tiny_base, capsys):
    lora = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}
    assert tied.main(lora=lora, model={"untie": True}) == 2
    assert "model.untie: the tokens of model.embed_tokens" in capsys.readouterr().err
    both = {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [3]}}
    assert tied.main(lora=both) == 2
    assert "follows its trained rows; leave it out" in capsys.readouterr().err
    assert tied.main(model={"untie": True, "name_or_path": str(tiny_base)}) == 2
    assert "not tied" in capsys.readouterr().err


@pytest.mark.parametrize("classes", [None, 2])
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["embed_tokens"]},
    ],
    ids=["in full", "LoRA"],
)
def test_an_embedding_is_merged_beside_a_head_that_keeps_the_bases_values(tied, fields, classes):
    """The head of a classifier is not tied, whatever config.json says of the language model."""
    model, params = jlora.load_pretrained(tied.base, dtype="float32", num_labels=classes)
    task = {"task_type": "SEQ_CLS"} if classes else {}
    config = jlora.LoraConfig(**fields, **task, init_lora_weights=False)
    adapter = jlora.init_adapter(jax.random.key(1), params, config)
    adapter = jax.tree.map(lambda leaf: leaf * 1.3, adapter)
    jlora.save_adapter(tied.output, adapter)
    sections = {"lora": {**fields, **task}, "train": {"bf16": False}}
    if classes:
        rows = write_rows(tied.folder / "classes.jsonl", [{"text": "a", "label": x} for x in "ab"])
        source = [{"path": str(rows), "format": "classification"}]
        sections["data"] = {"train": source, "eval": []}
    tiny_results.run(tied, command, **sections)
    want = tiny_results.logits(model, jlora.attach(params, adapter))
    got = tiny_results.logits(*jlora.load_pretrained(tied.output / "merged", dtype="float32"))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
