"""``python -m jlora.generate RUN generate.prompt="…"``: replies of a trained model."""

from jlora import cli

if __name__ == "__main__":  # settings are checked before the imports below, which take seconds
    cli.leave(cli.main("generate"))

import argparse
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jlora import decoding, runtime
from jlora.config import Config
from jlora.data import reply_row
from jlora.data.rows import BadRow, Chat, Completion, from_alpaca
from jlora.data.tokenizer import opening, token_ids
from jlora.errors import ConfigError, DataError
from jlora.files import storage_errors
from jlora.job import open_job, open_tokenizer

main = functools.partial(cli.main, "generate")

OPEN = "…"
"""Stands for the reply that is to be generated, where a row needs one."""


def run(config: Config, options: argparse.Namespace) -> None:
    """Prints a reply to each prompt, one JSON object a line if the prompts came from a file."""
    del options
    settings = config.generate
    prompts = list(_prompts(config))
    runtime.distributed()
    if config.train.compilation_cache:
        runtime.compilation_cache()
    tokenizer = open_tokenizer(config)
    ids = [_ids(p, config, tokenizer) for p in prompts]
    job = open_job(config, tokenizer, trained=True)
    with jax.set_mesh(job.mesh):
        tokens = decoding.generate(
            job.model,
            job.params,
            ids,
            max_new_tokens=settings.max_new_tokens,
            eos_ids=job.eos_ids,
            sampling=decoding.Sampling.of(settings),
            seed=settings.seed,
            batch_size=config.evaluate.batch_size,
        )
    if jax.process_index() != 0:
        return
    for prompt, reply in zip(prompts, tokens, strict=True):
        text = tokenizer.decode(reply, skip_special_tokens=True)
        if settings.file:
            line = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
            text = json.dumps({**line, "reply": text}, ensure_ascii=False)
        print(text)


def _prompts(config: Config) -> Iterator[str | list[dict]]:
    """The prompt of the settings, or those of the file: texts, or messages."""
    settings = config.generate
    if (settings.prompt is None) == (settings.file is None):
        raise ConfigError(
            "give one of prompt and file",
            where="generate",
            fix='for example generate.prompt="What is LoRA?"',
        )
    if settings.prompt is not None:
        yield settings.prompt
        return
    file = Path(str(settings.file))
    with storage_errors(file):
        lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield row["messages"] if "messages" in row else row["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(
                f"is no prompt: {error}",
                where=f"{file}:{number}",
                fix='write {"prompt": "…"} or {"messages": […]} in each line',
            ) from error


def _ids(prompt: str | list[dict], config: Config, tokenizer: Any) -> list[int]:
    """The prompt's tokens, opened for the reply as in a training row of the same format."""
    if not config.generate.chat and isinstance(prompt, str):
        ids = opening(tokenizer) + token_ids(prompt, tokenizer)
        return ids or [tokenizer.eos_token_id]
    format = config.data.train[0].format
    if isinstance(prompt, list):
        row: Chat | Completion = Chat("", [*prompt, {"role": "assistant", "content": OPEN}])
    elif format == "alpaca":
        row = from_alpaca("", {"instruction": prompt, "output": OPEN})
    elif format in ("prompt_completion", "text"):
        row = Completion("", prompt, OPEN)
    else:
        turns = [("user", prompt), ("assistant", OPEN)]
        row = Chat("", [{"role": role, "content": text} for role, text in turns])
    try:
        opened = reply_row(row, tokenizer)
    except BadRow as error:
        raise DataError(str(error), where="generate") from error
    assert opened is not None
    return list(opened.prompt_ids)
