"""``python -m jlora.merge RUN``: merges an adapter into its base, as a transformers folder."""

from jlora import cli

if __name__ == "__main__":  # settings are checked before the imports below, which take seconds
    cli.leave(cli.main("merge"))

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import lora
from jlora.config import Config
from jlora.distributed import processes
from jlora.errors import ConfigError
from jlora.files import storage_errors
from jlora.io.hf import save_pretrained
from jlora.models import head_differs, untie
from jlora.run.job import Job, open_tokenizer
from jlora.run.label_names import with_label_names
from jlora.run.open_job import open_job
from jlora.ui.console import Console

main = functools.partial(cli.main, "merge")


def run(config: Config, options: argparse.Namespace) -> None:
    """Writes base + adapter to ``merge.output_dir``, and shows how far the logits moved.

    The merged weights are dense and never quantized again, which would lose what was learned. Of a
    quantized base either the dequantized weights are used, those that the adapter was trained on,
    or the original ones (``merge.base``); the logit difference of both is shown. A prequantized
    base has no original.
    """
    del options
    if config.lora is None:
        raise ConfigError(
            "full fine-tuning has no adapter to merge",
            where="lora",
            fix=f"the trained model is in {config.train.output_dir} already",
        )
    processes.initialize()
    console = Console(enabled=jax.process_index() == 0)
    config, _ = with_label_names(config)
    tokenizer = open_tokenizer(config)
    with console.loading() as progress:
        job = open_job(config, tokenizer, trained=True, progress=progress)
    prequantized = job.model.config.prequantized
    if prequantized and config.merge.base == "original":
        raise ConfigError(
            "the base model is already quantized: there are no original weights to merge into",
            where="merge.base",
            fix="use dequantized, or name the model that it was quantized from",
        )
    out = Path(config.merge.output_dir or Path(config.train.output_dir) / "merged")
    with jax.set_mesh(job.mesh):
        expected = _logits(job, job.params)
        base = "dequantized (the base model has no original weights)" if prequantized else "dense"
        rows = {"merged model": out, "base": base}
        if untied := head_differs(job.model, job.params):
            job = _untie_head(job)
            rows["output head"] = "no longer tied: the adapter changes the embedding only"
        merged = lora.merge(job.base, job.trainable)
        if config.quantization and not prequantized:
            with console.loading() as progress:
                dense = open_job(config, tokenizer, trained=True, dense=True, progress=progress)
            dense = _untie_head(dense) if untied else dense
            merged_original = lora.merge(dense.base, job.trainable)
            rows["base"] = config.merge.base
            rows["logit difference, dequantized base"] = _difference(job, expected, merged)
            rows["logit difference, original base"] = _difference(job, expected, merged_original)
            merged = merged_original if config.merge.base == "original" else merged
        else:
            rows["logit difference"] = _difference(job, expected, merged)
        save_pretrained(out, job.model, merged)
    if jax.process_index() == 0:
        with storage_errors(out):
            tokenizer.save_pretrained(out)
    console.card("merged", rows)


def _untie_head(job: Job) -> Job:
    model, base = untie(job.model, job.base)
    return dataclasses.replace(job, model=model, base=base)


def _logits(job: Job, params: Any) -> np.ndarray:
    """Logits of a fixed batch of random tokens: (4, 64, V), or as long as the positions allow."""
    shape = 4, min(64, job.model.config.position_limit or 64)
    size = job.model.config.vocab_size
    ids = np.random.default_rng(0).integers(0, size, shape, dtype=np.int32)
    return np.asarray(jax.jit(job.model)(params, jnp.asarray(ids)))


def _difference(job: Job, expected: np.ndarray, merged: Any) -> str:
    """How far the merged model's logits are from the adapted model's, as text."""
    gap = np.abs(_logits(job, merged) - expected)
    return f"{gap.mean():.2g} on average, {gap.max():.2g} at most"
