"""``model.new_tokens`` through the commands: what is shown, written and read again."""

import importlib
import json
import re

import jax
import numpy as np
import pytest
import tiny_results
from safetensors.numpy import load_file
from tiny_plans import load, opened
from tiny_runs import (
    ADAPTER,
    NEW_TOKENS,
    OFF,
    Place,
    make_base_with_new_tokens,
    write_rows,
)
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoTokenizer

import jlora
from jlora import cli, config
from jlora.distributed import sharding
from jlora.errors import ConfigError
from jlora.run.abstract_job import abstract_job
from jlora.run.open_tokenizer import open_tokenizer

quantize = importlib.import_module("jlora.quantize")  # jlora.quantize is the function

SIZE = len(tiny_tokenizer())
IDS = [SIZE, SIZE + 1]
NEW = {"new_tokens": NEW_TOKENS}
SHORT = {"max_steps": 2, "bf16": False, "save_steps": 2}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {
        tied: make_base_with_new_tokens(tmp_path_factory.mktemp("base"), tied)
        for tied in (True, False)
    }


@pytest.fixture
def tied(bases, tiny_cache, tmp_path):
    place = Place(tmp_path, bases[True], tiny_cache)
    place.settings_for_loss()
    return place


@pytest.fixture
def untied(bases, tiny_cache, tmp_path):
    place = Place(tmp_path, bases[False], tiny_cache)
    place.settings_for_loss()
    return place


def inspect(place, capsys, *overrides, **sections):
    """The output of ``jlora inspect``, its spaces joined."""
    assert cli.main("inspect", [str(place.write(**sections)), *overrides]) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("tokens", "cause"),
    [(["<|a|>", "<|a|>"], "is listed twice"), (["<|a|>", " "], "is empty")],
)
def test_tokens_that_cannot_be_added(tied, capsys, tokens, cause):
    assert tied.main(model={"new_tokens": tokens}) == 2
    assert f"model.new_tokens: a token {cause}" in " ".join(capsys.readouterr().err.split())


def test_ids_and_rows_are_shown(tied, place, capsys):
    said = inspect(tied, capsys, model={"new_tokens": [*NEW_TOKENS, "<|eos|>"]})
    assert "model.new_tokens: the tokenizer has <|eos|> already, as token 5" in said
    added = f"<|tool|> = {SIZE}, <|end of tool|> = {SIZE + 1} (2 rows added, the mean of the"
    assert added in said and f"vocabulary {SIZE + 2}" in said
    # The other base has six spare rows.
    said = inspect(place, capsys, model={"new_tokens": [f"<|{i}|>" for i in range(7)]})
    assert "<|6|> = 336 (1 row added, the mean of the others; 6 in rows that the base has)" in said


UNTRAINED = "rows of new tokens keep their first values: "
WRITE = "; to train them, add them to lora.trainable_token_indices: "
BOTH = f"{{embed_tokens: {IDS}, lm_head: {IDS}}}"


@pytest.mark.parametrize(
    ("is_tied", "lora", "message"),
    [
        (True, {}, f"model.embed_tokens of <|tool|>, <|end of tool|>{WRITE}{IDS}"),
        (True, {"trainable_token_indices": [SIZE]}, f"<|end of tool|>{WRITE}[{SIZE + 1}]"),
        (True, {"trainable_token_indices": IDS}, None),
        (True, {"modules_to_save": ["embed_tokens"]}, f"(lora.trainable_token_indices: {IDS})"),
        (
            True,
            {"target_modules": ["embed_tokens"]},
            "does not follow an embedding that is trained",
        ),
        (False, {}, f"lm_head of <|tool|>, <|end of tool|>{WRITE}{BOTH}"),
        (False, {"trainable_token_indices": IDS}, f"{WRITE}{{lm_head: {IDS}}}"),
        (False, {"target_modules": ["lm_head"]}, f"{WRITE}{{embed_tokens: {IDS}}}"),
        (False, {"modules_to_save": ["embed_tokens", "lm_head"]}, None),
        (None, None, None),
    ],
)
def test_rows_that_are_not_trained_are_named(tied, untied, capsys, is_tied, lora, message):
    said = inspect(untied if is_tied is False else tied, capsys, model=NEW, lora=lora)
    assert (message or "") in said
    assert ("warning" in said) == (message is not None)


def test_the_size_of_the_file_is_known_before(untied, capsys):
    job = opened(load(untied, model=NEW), 1)
    tables = jlora.embeddings_to_save(job.model, job.base, job.trainable.config)
    jlora.save_adapter(untied.output, job.trainable, embeddings=tables)
    kib = sum(x.nbytes for x in load_file(untied.output / ADAPTER).values()) / 2**10
    assert f"adapter file {kib:,.1f} KiB" in inspect(untied, capsys, model=NEW)


HEAD = {"quantization": {"load_in_4bit": True, "block_size": 32, "include_modules": ["lm_head"]}}
ODD = {"mesh": {"tensor": 2}, "model": {"new_tokens": NEW_TOKENS[:1]}}
"""A vocabulary that two devices cannot share evenly."""


@pytest.mark.parametrize("sections", [{}, HEAD, ODD, {"lora": None}])
def test_the_step_is_compiled_for_the_shapes_that_are_loaded(untied, sections):
    devices = 2 if "mesh" in sections else 1
    settings = load(untied, **({"model": NEW} | sections))
    mesh = sharding.make_mesh(settings.mesh, jax.devices()[:devices])
    abstract = abstract_job(config=settings, tokenizer=open_tokenizer(settings), mesh=mesh)
    job = opened(settings, devices)
    assert job.model == abstract.model
    assert job.model.config.vocab_size == SIZE + len(settings.model.new_tokens)
    for like, real in ((abstract.frozen, job.frozen), (abstract.trainable, job.trainable)):
        for a, b in zip(jax.tree.leaves(like), jax.tree.leaves(real), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert a.sharding.is_equivalent_to(b.sharding, b.ndim)


def test_what_a_run_writes_is_exported_from_its_checkpoint(untied):
    """The run has embeddings in its file; nothing else of the base is read for them."""
    untied.run(model=NEW, train=SHORT, lora={"trainable_token_indices": IDS})
    assert cli.main("export", [str(untied.output)]) == 0
    out = untied.output / "exported" / "2"
    got, want = load_file(out / ADAPTER), load_file(untied.output / ADAPTER)
    assert got.keys() == want.keys() and "base_model.model.lm_head.weight" in got
    assert all(np.array_equal(got[name], want[name]) for name in want)
    assert len(AutoTokenizer.from_pretrained(out)) == SIZE + 2
    # A folder without checkpoints, under another name, is the same adapter.
    assert cli.main("export", [str(out)]) == 0
    again = load_file(out / "exported" / "2" / ADAPTER)
    assert all(np.array_equal(again[name], want[name]) for name in want)


def test_a_run_resumes_and_continues_from_its_adapter(tied, tmp_path):
    rows = {"trainable_token_indices": IDS}
    tied.run(model=NEW, train=SHORT, lora=rows)
    whole = tied.adapter()
    tied.run("train.max_steps=2", model=NEW, train=SHORT, lora=rows)  # nothing is left to do
    assert tied.adapter() == whole
    first = tied.output
    tied.output = tmp_path / "second"
    with pytest.raises(ConfigError, match=r"new_tokens: the tokenizer has 333 tokens with them"):
        tied.run(
            model={"new_tokens": [*NEW_TOKENS, "<|more|>"]},
            train=SHORT,
            lora={"init_from": str(first), **rows},
        )
    tied.run(model=NEW, train=SHORT, lora={"init_from": str(first), **rows})
    assert tied.adapter() != whole


def test_replies_show_new_tokens_and_a_full_model_has_them(tied, capsys):
    tied.run(model=NEW, train=SHORT | {"learning_rate": 0.03, "max_steps": 12}, lora=None)
    model, _ = jlora.load_pretrained(tied.output)
    assert model.config.vocab_size == SIZE + 2
    assert len(AutoTokenizer.from_pretrained(tied.output)) == SIZE + 2
    capsys.readouterr()
    arguments = [str(tied.output), OFF, "generate.prompt=use 3", "generate.max_new_tokens=4"]
    assert cli.main("generate", arguments) == 0
    assert capsys.readouterr().out.startswith("<|tool|>")


def test_a_quantized_base_is_written_with_them(untied):
    fields = {"bnb_4bit_compute_dtype": "float32", "block_size": 64}
    tiny_results.run(untied, quantize, quantization=fields, model=NEW)
    out = untied.output / "quantized"
    model, params = jlora.load_pretrained(out, dtype="float32")
    assert model.config.vocab_size == SIZE + 2 and params["lm_head"]["kernel"].shape[1] == SIZE + 2
    assert len(AutoTokenizer.from_pretrained(out)) == SIZE + 2


@pytest.mark.slow
def test_a_classifier_has_an_embedding_only(untied, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": t, "label": t} for t in NEW_TOKENS] * 4)
    untied.run(
        model=NEW,
        lora={"task_type": "SEQ_CLS", "trainable_token_indices": IDS},
        data={"train": [{"path": str(rows), "format": "classification"}]},
        train=SHORT,
    )
    names = load_file(untied.output / ADAPTER)
    assert any(re.search("score", name) for name in names)
    assert not any("embed_tokens.weight" in name or "lm_head" in name for name in names)
    assert cli.main("merge", [str(untied.output), OFF]) == 0
    hf = json.loads((untied.output / "merged" / "config.json").read_text())
    assert hf["vocab_size"] == SIZE + 2
    assert config.load(untied.output, [OFF]).model.new_tokens == tuple(NEW_TOKENS)


def test_a_tokenizer_that_has_the_tokens_already(tied, tmp_path, capsys):
    """The model lacks rows for them: without new_tokens the data is refused."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(NEW_TOKENS)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    other = {"tokenizer_name_or_path": str(tmp_path / "tokenizer")}
    assert tied.main(model=other) == 65
    assert "model.new_tokens" in capsys.readouterr().err
    job = opened(load(tied, model=NEW | other), 1)
    assert job.model.config.vocab_size == SIZE + 2
