"""Sample replies of the model being trained or evaluated, to held-out prompts."""

from __future__ import annotations

from typing import Any

from jlora import data
from jlora.errors import ConfigError
from jlora.inference import scoring
from jlora.run.job import Job


def reply_prompts(job: Job) -> list[data.ReplyRow]:
    """The held-out rows that replies are generated for: all for exact match, else the samples.

    Raises:
      ConfigError: exact match is asked for, and no row has a reply.
    """
    wanted, config = job.config.evaluate, job.config
    most = wanted.max_rows if wanted.exact_match else wanted.samples
    rows = data.reply_rows(config.data.eval, job.tokenizer, config.data, most)
    if wanted.exact_match and not rows:
        raise ConfigError(
            "no held-out row has a reply to compare with",
            where="evaluate.exact_match",
            fix="name rows with replies in data.eval, or leave it out",
        )
    return rows


def greedy_replies(job: Job, trainable: Any, prompts: list[data.ReplyRow]) -> list[scoring.Sample]:
    """The greedy replies of the model with this adapter (or these parameters)."""
    return scoring.replies(
        job.model,
        job.bind(job.frozen, trainable, None),
        job.tokenizer,
        prompts,
        max_new_tokens=job.config.evaluate.max_new_tokens,
        batch_size=job.config.evaluate.batch_size,
        eos_ids=job.eos_ids,
    )
