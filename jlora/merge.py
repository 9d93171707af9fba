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
from jlora.files import check_output
from jlora.io.hf.folder import find_folder
from jlora.io.hf.write import common_dtype, stored_dtypes
from jlora.models import head_differs, untie
from jlora.run.artifacts import check_no_adapter, save_model
from jlora.run.job import Job
from jlora.run.label_names import with_label_names
from jlora.run.open_job import open_job
from jlora.run.open_tokenizer import note_other_tokenizer, open_tokenizer
from jlora.tree import paths
from jlora.ui.console import Console

main = functools.partial(cli.main, "merge")


def run(config: Config, options: argparse.Namespace) -> None:
    """Writes base + adapter to ``merge.output_dir``, and shows how far the logits moved.

    The merged weights are dense and never quantized again, which would lose what was learned. Of a
    quantized base either the dequantized weights are used, those that the adapter was trained on,
    or the original ones (``merge.base``); the logit difference of both is shown. A prequantized
    base has no original. The file has the data types of the base's own files, unless
    ``merge.dtype`` says otherwise.
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
    out = Path(config.merge.output_dir or Path(config.train.output_dir) / "merged")
    source = find_folder(config.model.name_or_path, config.model.revision)
    _check_output(out, source, config.train.output_dir)
    config, _ = with_label_names(config)
    tokenizer = open_tokenizer(config)
    note_other_tokenizer(console, config, tokenizer)
    with console.loading() as progress:
        job = open_job(config, tokenizer, trained=True, progress=progress)
    size = job.model.config.vocab_size
    if missing := [token for token, i in tokenizer.get_vocab().items() if i >= size]:
        console.warn(
            f"of the tokenizer that is saved with the model it has no embeddings for "
            f"{len(missing)} tokens, such as {missing[0]!r}: it has {size}"
        )
    prequantized = job.model.config.prequantized
    if prequantized and config.merge.base == "original":
        raise ConfigError(
            "the base model is already quantized: there are no original weights to merge into",
            where="merge.base",
            fix="use dequantized, or name the model that it was quantized from",
        )
    dtypes = _file_dtypes(config, source)
    quantized = bool(config.quantization) and not prequantized
    # What the file can hold and the loaded base has lost must be read again.
    wide = common_dtype([config.model.dtype, *dtypes.values()])
    again = quantized or (not prequantized and wide != jnp.dtype(config.model.dtype))
    with jax.set_mesh(job.mesh):
        expected = _logits(job, job.params)
        base = "dequantized (the base model has no original weights)" if prequantized else "dense"
        rows: dict[str, Any] = {"merged model": out, "base": base}
        if untied := head_differs(job.model, job.params):
            job = _untie_head(job)
            rows["output head"] = "no longer tied: the adapter changes the embedding only"
        merged = _in_dtypes(lora.merge(job.base, job.trainable), dtypes)
        rows["data type"] = ", ".join(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(merged)}))
        if again:
            wider = dataclasses.replace(config.model, dtype=wide.name)
            with console.loading() as progress:
                dense = open_job(
                    dataclasses.replace(config, model=wider),
                    tokenizer,
                    trained=True,
                    dense=True,
                    progress=progress,
                )
            dense = _untie_head(dense) if untied else dense
            original = _in_dtypes(lora.merge(dense.base, job.trainable), dtypes)
            if quantized:
                rows["base"] = config.merge.base
                rows["logit difference, dequantized base"] = _difference(job, expected, merged)
                rows["logit difference, original base"] = _difference(job, expected, original)
            if not quantized or config.merge.base == "original":
                merged = original
        if not quantized:
            rows["logit difference"] = _difference(job, expected, merged)
        save_model(out, job.model, merged, tokenizer)
    console.card("merged", rows)


def _check_output(out: Path, source: Path, adapter: str) -> None:
    """ConfigError if the merged model would overwrite what it is made of, or lie beside it."""
    inputs = {"the folder of the base model": source, "the folder of the adapter": adapter}
    check_output("merge.output_dir", out, inputs)
    check_no_adapter("merge.output_dir", out)


def _file_dtypes(config: Config, source: Path) -> dict[paths.Path, Any]:
    """Leaf → the type to write it in: ``merge.dtype``, or the base's own, from its files."""
    stored = stored_dtypes(source, config.quantization)
    told = config.merge.dtype
    return stored if told is None else dict.fromkeys(stored, jnp.dtype(told))


def _in_dtypes(params: Any, dtypes: dict[paths.Path, Any]) -> Any:
    """The tree in these types; leaves that the base does not have (dense) in the widest of them."""
    widest = common_dtype(dtypes.values())
    return paths.map_leaves(lambda path, leaf: leaf.astype(dtypes.get(path, widest)), params)


def _untie_head(job: Job) -> Job:
    model, base = untie(job.model, job.base)
    return dataclasses.replace(job, model=model, base=base)


def _logits(job: Job, params: Any) -> np.ndarray:
    """Logits of a fixed batch of random tokens: (4, 64, V), or as long as the positions allow."""
    shape = 4, min(64, job.model.config.position_limit or 64)
    size = job.model.config.vocab_size
    # Any tokens show how far two models are apart: no data is needed.
    ids = np.random.default_rng(0).integers(0, size, shape, dtype=np.int32)
    return np.asarray(jax.jit(job.model)(params, jnp.asarray(ids)))


def _difference(job: Job, expected: np.ndarray, merged: Any) -> str:
    """How far the merged model's logits are from the adapted model's, as text."""
    gap = np.abs(_logits(job, merged) - expected)
    return f"{gap.mean():.2g} on average, {gap.max():.2g} at most"
