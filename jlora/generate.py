"""``python -m jlora.generate RUN generate.prompt="…"``: replies of a trained model."""

from jlora import cli

if __name__ == "__main__":  # settings are checked before the imports below, which take seconds
    cli.leave(cli.main("generate"))

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jlora.config import Config
from jlora.data import ChatRenderer, reply_row
from jlora.data.formats import BadRow, from_alpaca, from_messages
from jlora.data.rows import Chat, Completion
from jlora.data.tokenizer import bos_prefix, token_ids
from jlora.distributed import processes
from jlora.distributed.devices import unused_gpus
from jlora.errors import ConfigError, DataError
from jlora.files import storage_errors
from jlora.inference import decoding
from jlora.models import Model
from jlora.run import environment
from jlora.run.open_job import open_job
from jlora.run.open_tokenizer import note_other_tokenizer, open_tokenizer
from jlora.ui.console import Console

main = functools.partial(cli.main, "generate")

PLACEHOLDER = "…"
"""The reply in rows that need one, where it is still to be generated."""


class PromptRow(NamedTuple):
    """What to reply to: a text or a chat, with its place and the JSON object it was read from."""

    where: str
    text: str | Chat
    row: dict


def run(config: Config, options: argparse.Namespace) -> None:
    """Prints a reply to each prompt, one JSON object a line if the prompts came from a file."""
    del options
    if config.is_classification:
        raise ConfigError(
            "the model is a classifier, which writes no replies",
            where=config.train.output_dir,
            fix="use jlora evaluate, which measures its accuracy on held-out rows",
        )
    settings = config.generate
    prompts = list(_prompts(config))
    processes.initialize()
    if config.train.compilation_cache:
        environment.enable_compilation_cache()
    tokenizer = open_tokenizer(config)
    render = ChatRenderer(tokenizer, config.data.chat_template_kwargs)
    ids = [_prompt_ids(p, config, render) for p in prompts]
    console = Console(enabled=jax.process_index() == 0, file=sys.stderr)  # stdout is for replies
    if text := unused_gpus():
        console.warn(text)
    note_other_tokenizer(console, config, tokenizer)
    with console.loading() as progress:
        job = open_job(config, tokenizer, trained=True, progress=progress)
    _check_prompts_fit(prompts, ids, job.model)
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
            text = json.dumps({**prompt.row, "reply": text}, ensure_ascii=False)
        print(text)


def _check_prompts_fit(prompts: list[PromptRow], ids: list[list[int]], model: Model) -> None:
    """Raises DataError for a prompt that the model has no embeddings or no positions for."""
    limit, size = model.config.position_limit, model.config.vocab_size
    for prompt, row in zip(prompts, ids, strict=True):
        if limit is not None and len(row) > limit:
            cause = f"has {len(row)} tokens, but the model has {limit} positions"
            raise DataError(cause, where=prompt.where, fix="shorten it")
        if max(row) >= size:
            cause = f"holds token {max(row)}, but the model has {size} embeddings"
            fix = "use the tokenizer that belongs to the model"
            raise DataError(cause, where=prompt.where, fix=fix)


def _prompts(config: Config) -> Iterator[PromptRow]:
    """``generate.prompt``, or the prompts in the lines of ``generate.file``."""
    settings = config.generate
    if (settings.prompt is None) == (settings.file is None):
        raise ConfigError(
            "give either prompt or file",
            where="generate",
            fix='for example generate.prompt="What is LoRA?"',
        )
    if settings.prompt is not None:
        yield PromptRow("generate.prompt", settings.prompt, {})
        return
    file = Path(str(settings.file))
    with storage_errors(file):
        content = file.read_bytes()
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            row = json.loads(line)
            yield PromptRow(where, _prompt_of_row(row), row)
        except ValueError as error:  # BadRow, no JSON, no UTF-8
            raise DataError(
                f"is not a prompt: {error}",
                where=where,
                fix='write {"prompt": "…"} or {"messages": […]} in each line',
            ) from error


def _prompt_of_row(row: Any) -> str | Chat:
    """The ``prompt`` or the ``messages`` of a JSON object; BadRow if it has neither."""
    if isinstance(row, dict) and "messages" in row:
        return from_messages("", row)
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise BadRow("it has neither messages nor a prompt that is a string")
    return row["prompt"]


def _prompt_ids(prompt: PromptRow, config: Config, render: ChatRenderer) -> list[int]:
    """The prompt's tokens, up to where the reply begins in a training row of the same format."""
    text, tokenizer = prompt.text, render.tokenizer
    if isinstance(text, str) and not config.generate.chat:
        ids = bos_prefix(tokenizer) + token_ids(text, tokenizer)
        # An empty prompt still needs a token whose successor is predicted.
        return ids or [tokenizer.eos_token_id]
    try:
        row = _training_row(text, config.data.train[0].format)
        opened = reply_row(row, render)
    except BadRow as error:
        raise DataError(str(error), where=prompt.where) from error
    assert opened is not None
    return list(opened.prompt_ids)


def _training_row(text: str | Chat, format: str) -> Chat | Completion:
    """A row in the training data's format, with a placeholder for the reply."""
    reply = {"role": "assistant", "content": PLACEHOLDER}
    if isinstance(text, Chat):
        return dataclasses.replace(text, messages=[*text.messages, reply])
    if format == "alpaca":
        return from_alpaca("", {"instruction": text, "output": PLACEHOLDER})
    if format in ("prompt_completion", "text"):
        return Completion("", text, PLACEHOLDER)
    return Chat("", [{"role": "user", "content": text}, reply])
