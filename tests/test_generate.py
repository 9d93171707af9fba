"""Replies from the command line: the tokens of the prompt, and the output."""

import json

import numpy as np
import pytest
import tiny_models
import tiny_results
import tiny_tokenizer as tt
from tiny_runs import Place, write_rows

from jlora import config, data, generate
from jlora.config import DataConfig, SourceConfig
from jlora.data.chat import ChatRenderer
from jlora.data.rows import Chat
from jlora.data.tokenizer import load_tokenizer
from jlora.errors import ConfigError, DataError

NEW = 5
SEPARATORS = "two\u2028lines, één"  # str.splitlines splits at U+2028, JSON lines do not


@pytest.fixture(scope="module")
def here(result, tmp_path_factory):
    """The shared run, with settings that point to its folder."""
    place = Place(tmp_path_factory.mktemp("generate"), result.base, result.cache)
    place.output = result.output
    return place


@pytest.fixture(scope="module")
def reply(here):
    """The oracle: transformers' tokens of a chat, then the model without a cache."""
    model, params = tiny_results.trained(here)
    tokenizer = load_tokenizer(str(here.base))

    def greedy(ids):
        ids, start = list(ids), len(ids)
        while len(ids) < start + NEW:
            row = np.zeros((1, 64), np.int32)
            row[0, : len(ids)] = ids
            token = int(np.asarray(model(params, row))[0, len(ids) - 1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
        return tokenizer.decode(ids[start:], skip_special_tokens=True)

    def of(prompt):
        if isinstance(prompt, list):
            text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            prompt = text
        return greedy(tokenizer(prompt, add_special_tokens=False)["input_ids"])

    return of


def user(text):
    return [{"role": "user", "content": text}]


def command(place, *overrides, **settings):
    settings = {"max_new_tokens": NEW, **settings}
    tiny_results.run(place, generate, *overrides, generate=settings, train={"bf16": False})


def test_a_prompt_is_put_into_the_template_or_continued(here, reply, capsys):
    command(here, prompt="say one")
    assert capsys.readouterr().out == reply(user("say one")) + "\n"
    command(here, prompt="say one", chat=False)
    assert capsys.readouterr().out == reply("say one") + "\n"
    assert reply(user("say one")) != reply("say one")


def test_a_reply_made_beside_unused_gpus_is_told(here, reply, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.delenv("JAX_PLATFORMS")
    command(here, prompt="say one")
    printed = capsys.readouterr()
    assert printed.out == reply(user("say one")) + "\n"
    assert "uses 0 of 2 GPUs" in printed.err


def test_a_file_of_prompts_gives_a_line_each(here, reply, capsys):
    chat = [{"role": "system", "content": "s"}, *user("q"), {"role": "assistant", "content": "a"}]
    chat += user("more")
    file = here.folder / "prompts.jsonl"
    rows = [{"prompt": SEPARATORS, "id": 7}, {"messages": chat}]
    file.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    command(here, file=str(file))
    got = [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]
    expected = [reply(user(SEPARATORS)), reply(chat)]
    assert got == [{**row, "reply": r} for row, r in zip(rows, expected, strict=True)]


def test_sampling_follows_its_seed(here, capsys):
    sampling = {"prompt": "say one", "do_sample": True, "temperature": 2.0}
    printed = []
    for seed in (0, 0, 1):
        command(here, seed=seed, **sampling)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (b"{", "is not a prompt"),
        (b'"text"', "neither messages nor a prompt"),
        (b'{"text": "a"}', "neither messages nor a prompt"),
        (b'{"prompt": 5}', "neither messages nor a prompt"),
        (b'{"messages": []}', "'messages' is empty"),
        (b'{"messages": [{"role": "usr", "content": "a"}]}', "role 'usr'"),
        (b'{"prompt": "\xff"}', "is not a prompt"),
    ],
)
def test_a_bad_prompt_is_named_by_its_line(here, line, cause):
    file = here.folder / "bad.jsonl"
    file.write_bytes(b'{"prompt": "good"}\n' + line)
    with pytest.raises(DataError, match=cause) as caught:
        command(here, file=str(file))
    assert caught.value.where == f"{file}:2"


@pytest.mark.parametrize("given", [(), ("prompt", "file")])
def test_one_source_of_prompts_is_needed(here, given):
    given = {name: str(here.rows) for name in given}
    with pytest.raises(ConfigError, match="give either prompt or file"):
        command(here, **given)


def test_what_the_model_cannot_embed_is_refused():
    model, _ = tiny_models.build("gpt2")  # 64 positions, 61 embeddings
    prompt = generate.PromptRow("prompts.jsonl:3", "text", {})
    generate._check_prompts_fit([prompt], [[60] * 64], model)
    for ids, cause in [([1] * 65, "has 65 tokens"), ([3, 61], "holds token 61")]:
        with pytest.raises(DataError, match=cause) as caught:
            generate._check_prompts_fit([prompt], [ids], model)
        assert caught.value.where == prompt.where


ROWS = {
    "messages": {"messages": [*user("say one"), {"role": "assistant", "content": "one"}]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "say one"}, {"from": "gpt", "value": "one"}]
    },
    "alpaca": {"instruction": "say one", "output": "one"},
    "prompt_completion": {"prompt": "say one", "completion": "one"},
}


@pytest.mark.parametrize("template", [tt.CHATML, None])
@pytest.mark.parametrize("format", ROWS)
def test_a_prompt_begins_like_the_training_rows(place, format, template):
    tokenizer = tt.tiny_tokenizer(template, adds_bos=True)
    file = write_rows(place.folder / "rows.jsonl", [ROWS[format]])
    source = SourceConfig(path=str(file), format=format)
    (learned,) = data.reply_rows([source], tokenizer, DataConfig(train=[source]))
    settings = config.load(place.write(data={"train": [{"path": str(file), "format": format}]}))
    prompt, render = generate.PromptRow("generate.prompt", "say one", {}), ChatRenderer(tokenizer)
    assert generate._prompt_ids(prompt, settings, render) == list(learned.prompt_ids)
    if format == "messages":
        prompt = prompt._replace(text=Chat("", user("say one")))
        assert generate._prompt_ids(prompt, settings, render) == list(learned.prompt_ids)
