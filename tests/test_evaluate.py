"""Evaluation of a run: its loss by NumPy over transformers' masks, exact match of known replies."""

import json

import numpy as np
import pytest
import tiny_results
import tiny_tokenizer as tt
from tiny_runs import Place, chat, write_rows

import jlora
from jlora import evaluate
from jlora.data.tokenizer import load_tokenizer
from jlora.errors import ConfigError, DataError
from jlora.inference.decoding import generate

NEW = 4


@pytest.fixture(scope="module")
def here(result, tmp_path_factory):
    """The shared run, with settings that point to its folder."""
    place = Place(tmp_path_factory.mktemp("evaluate"), result.base, result.cache)
    place.output = result.output
    return place


@pytest.fixture(scope="module")
def trained(here):
    return tiny_results.trained(here)


def command(place, file, lora=tiny_results.LORA, **settings):
    tiny_results.run(
        place,
        evaluate,
        lora=lora,
        data={"eval": [{"path": str(file), "format": "messages"}]},
        evaluate={"max_new_tokens": NEW, **settings},
        train={"bf16": False, "per_device_train_batch_size": 2},
    )
    return json.loads((place.output / "evaluation.json").read_text())


def likelihoods(model, params, row):
    """Negative log-likelihoods of a chat's assistant tokens."""
    tokenizer = tt.tiny_tokenizer(tt.GENERATION)
    made = tokenizer.apply_chat_template(
        row["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    ids, wanted = np.array(made["input_ids"]), np.array(made["assistant_masks"], bool)
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(ids)] = ids
    logits = np.asarray(model(params, padded), np.float64)[0, : len(ids) - 1]
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids) - 1), ids[1:]]
    return losses[wanted[1:]]


def greedy(place, trained, prompts):
    """Replies to user turns, as texts."""
    tokenizer = load_tokenizer(str(place.base))
    texts = [f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n" for p in prompts]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    eos = [tokenizer.eos_token_id]
    replies = generate(*trained, ids, max_new_tokens=NEW, eos_ids=eos)
    return [tokenizer.decode(reply, skip_special_tokens=True) for reply in replies]


def test_loss_and_exact_match_on_held_out_rows(here, trained, capsys):
    prompts = [f"say {word}" for word in ("one", "moon", "house", "two and three", "no")]
    replies = greedy(here, trained, prompts)
    assert all(reply.strip() for reply in replies) and len(set(replies)) > 1
    # The references are the model's own replies, except in two rows.
    rows = [chat(p, r) for p, r in zip(prompts, [*replies[:3], "x", replies[4] + "y"], strict=True)]
    got = command(here, write_rows(here.folder / "own.jsonl", rows), exact_match=True, samples=1)

    losses = np.concatenate([likelihoods(*trained, row) for row in rows])
    assert got["eval_tokens"] == len(losses)
    np.testing.assert_allclose(got["eval_loss"], losses.mean(), rtol=1e-4)
    np.testing.assert_allclose(got["eval_perplexity"], np.exp(losses.mean()), rtol=1e-3)
    assert (got["eval_exact_match"], got["eval_replies"]) == (0.6, 5)
    assert [line["reply"] for line in got["replies"]] == replies
    assert [line["exact"] for line in got["replies"]] == [True] * 3 + [False] * 2
    out = capsys.readouterr().out
    assert "0.6" in out and str(here.output / "evaluation.json") in out


def test_without_exact_match_a_few_samples_are_shown(here, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.delenv("JAX_PLATFORMS")
    got = command(here, here.held_out, samples=2)
    printed = capsys.readouterr().out
    assert "warning: the end-of-sequence token '<|eos|>' is never learned" in printed
    assert "uses 0 of 2 GPUs" in printed
    assert len(got["replies"]) == 2 and "eval_exact_match" not in got
    rows = [json.loads(line) for line in here.held_out.read_text().splitlines()]
    expected = [row["messages"][1]["content"] for row in rows[:2]]
    assert [line["expected"] for line in got["replies"]] == expected


def test_a_fully_trained_model_is_read_from_the_run(place, here, trained):
    model, params = jlora.load_pretrained(str(here.base), dtype="float32")
    merged = jlora.merge(params, jlora.load_adapter(here.output, params))
    jlora.save_pretrained(place.output, model, merged)
    got = command(place, here.held_out, lora=None, samples=1)
    rows = [json.loads(line) for line in here.held_out.read_text().splitlines()]
    losses = np.concatenate([likelihoods(*trained, row) for row in rows])
    np.testing.assert_allclose(got["eval_loss"], losses.mean(), rtol=1e-4)


def test_held_out_rows_are_needed(here):
    with pytest.raises(ConfigError, match="no held-out rows") as caught:
        tiny_results.run(here, evaluate, data={"eval": []})
    assert caught.value.where == "data.eval"


@pytest.mark.parametrize(("lora", "kind"), [({}, "adapter"), (None, "model")])
def test_a_folder_without_a_result_says_train_first(place, lora, kind):
    with pytest.raises(ConfigError, match=f"no trained {kind} yet") as caught:
        tiny_results.run(place, evaluate, lora=lora)
    assert caught.value.where == str(place.output) and caught.value.fix == "train it first"


def test_a_bad_held_out_row_is_named(here):
    file = write_rows(here.folder / "bad.jsonl", [chat("a", "b"), {"messages": []}])
    with pytest.raises(DataError, match=r"bad.jsonl:2"):
        command(here, file)
