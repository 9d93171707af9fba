"""``jlora export RUN``: the weights of a checkpoint as a PEFT or transformers folder."""

from jlora import cli

if __name__ == "__main__":  # settings are checked before the imports below, which take seconds
    cli.leave(cli.main("export"))

import argparse
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jlora.config import Config, LoraConfig
from jlora.errors import ConfigError
from jlora.files import check_output, write_atomic
from jlora.io import checkpoint
from jlora.io.hf.folder import find_folder
from jlora.io.hf.read import read_vocabulary
from jlora.io.peft import (
    BASE_FILE,
    CONFIG_FILE,
    embeddings_to_save,
    load_adapter,
    misreadings,
    with_saved_embeddings,
)
from jlora.io.peft.config import read_config
from jlora.io.peft.embeddings import needed_weights
from jlora.models import Model
from jlora.quant.params import is_quantized
from jlora.run.abstract_job import abstract_adapter, abstract_base, abstract_model
from jlora.run.artifacts import check_no_adapter, note_local_base, write_trained
from jlora.run.checkpoints import find_checkpoint, fixed_settings
from jlora.run.job import Job, split_adapters, with_base_name
from jlora.run.label_names import with_label_names
from jlora.run.new_tokens import adapter_folder
from jlora.run.open_job import open_job
from jlora.run.open_tokenizer import note_other_tokenizer, open_tokenizer
from jlora.tree import paths
from jlora.ui.console import Console

main = functools.partial(cli.main, "export")

TRAINED = "state.trainable"
"""The part of a checkpoint that holds the trained weights, see ``run.checkpoints``."""


def run(config: Config, options: argparse.Namespace) -> None:
    """Writes a checkpoint's weights to ``export.output_dir``, as training writes its last ones.

    Only they are read from the checkpoint, and only the configuration of the base, unless the
    adapter was initialized from the base's weights (PiSSA, OLoRA). With early stopping they are the
    weights of that step; the best ones are in the run's folder when it is done. Each adapter of a
    multi-adapter run gets a folder. Of a folder without checkpoints, such as one that PEFT wrote,
    the adapter is read.
    """
    del options
    run_folder, chosen = Path(config.train.output_dir), _chosen_checkpoint(config)
    splits_base = config.lora is not None and config.lora.run_splits_base
    from_weights = splits_base if chosen else read_config(run_folder).init_splits_base
    if not from_weights:  # nothing is computed: do not occupy an accelerator
        jax.config.update("jax_platforms", "cpu")
    source = chosen[0] / str(chosen[1]) if chosen else run_folder
    out = Path(config.export.output_dir or run_folder / "exported" / source.name)
    inputs = {
        "the folder of the run": run_folder,
        "the checkpoint": source,
        "the folder of the base model": config.model.name_or_path,
    }
    check_output("export.output_dir", out, inputs)
    if config.lora is None:
        check_no_adapter("export.output_dir", out)
    config, _ = with_label_names(config)
    tokenizer = open_tokenizer(config)
    model = abstract_model(config, tokenizer, trained=chosen is None)
    if chosen is None:
        trained, initial = _adapter_of_folder(config, tokenizer, model, from_weights)
    else:
        settings = fixed_settings(config, "model", "quantization", "lora")
        like = _abstract_trained(config, model)
        trained = checkpoint.restore_part(*chosen, TRAINED, like, settings)
        initial = _open(config, tokenizer, trained=False).initial if from_weights else None
    written, notes = [], {}
    for adapter_config, tree in split_adapters(config, trained):
        if config.lora:
            tree = dataclasses.replace(tree, initial=initial)
            notes |= dict.fromkeys(misreadings(tree))
        tables = None
        if config.lora:
            tables = _embeddings(config, tokenizer, model, tree.config, trained=chosen is None)
        target = out / Path(adapter_config.train.output_dir).relative_to(run_folder)
        written.append(write_trained(target, config.model.dtype, model, tokenizer, tree, tables))
        if config.lora and (run_folder / BASE_FILE).is_file():
            write_atomic(target / BASE_FILE, (run_folder / BASE_FILE).read_bytes())
    kind = "adapter" if config.lora else "model"
    rows = {"checkpoint": source, "step": chosen[1]} if chosen else {"from": source}
    note_local_base(console := Console(), trained)
    note_other_tokenizer(console, config, tokenizer)
    console.card("exported", rows | {kind: ", ".join(written), "tokenizer": out})
    for note in notes:
        console.warn(note)


def _adapter_of_folder(
    config: Config, tokenizer: Any, model: Model, from_weights: bool
) -> tuple[Any, Any]:
    """The adapter in the folder, and what it started from if the base's weights tell."""
    if from_weights:
        job = _open(config, tokenizer, trained=True)
        return job.trainable, job.initial
    adapter = load_adapter(config.train.output_dir, abstract_base(config, model))
    return with_base_name(config, adapter), None


def _embeddings(
    config: Config, tokenizer: Any, model: Model, adapter: LoraConfig, trained: bool
) -> Mapping[str, Any]:
    """What ``save_adapter`` needs of a resized base, whose other weights are not read."""
    if not (needed := needed_weights(model, adapter)):
        return {}
    shapes = abstract_base(config, model)
    if any(is_quantized(paths.get(shapes, leaf.path)) for leaf in needed):
        job = _open(config, tokenizer, trained)
        return embeddings_to_save(job.model, job.base, adapter)
    folder = find_folder(config.model.name_or_path, config.model.revision)
    params = read_vocabulary(folder, dataclasses.replace(model, dtype=config.model.dtype))
    if source := adapter_folder(config, trained):
        params = with_saved_embeddings(source, model, params)
    return embeddings_to_save(model, params, adapter)


def _abstract_trained(config: Config, model: Model) -> Any:
    """The shapes of what was trained, on one device."""
    shapes = dataclasses.replace(model, dtype="float32").shapes  # master weights
    if config.lora:
        shapes = dataclasses.replace(abstract_adapter(config, model.shapes), initial=None)
    adapters = (len(config.adapters),) if config.adapters else ()
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*adapters, *x.shape), x.dtype), shapes)


def _open(config: Config, tokenizer: Any, trained: bool) -> Job:
    """The job with the base's weights, from which PiSSA and OLoRA started."""
    with Console().loading() as progress:
        return open_job(config, tokenizer, trained=trained, progress=progress)


def _chosen_checkpoint(config: Config) -> tuple[Path, int] | None:
    """The folder and the step of the checkpoint that the settings name; else the last one.

    None if there is none, but an adapter.
    """
    folder, asked = Path(config.train.output_dir) / "checkpoints", config.export.checkpoint
    if asked is not None:
        name = folder / str(asked) if isinstance(asked, int) else asked
        return find_checkpoint(str(name), "export.checkpoint")
    newest = checkpoint.latest(folder)
    if newest is None and config.lora and (folder.parent / CONFIG_FILE).is_file():
        return None
    if newest is None:
        raise ConfigError("holds no complete checkpoint", where=str(folder), fix="train it first")
    return folder, newest
