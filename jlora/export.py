"""``jlora export RUN``: the weights of a checkpoint as a PEFT or transformers folder."""

from jlora import cli

if __name__ == "__main__":  # settings are checked before the imports below, which take seconds
    cli.leave(cli.main("export"))

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax

from jlora.config import Config
from jlora.errors import ConfigError
from jlora.files import check_output, write_atomic
from jlora.io import checkpoint
from jlora.io.peft import BASE_FILE, misreadings
from jlora.models import Model
from jlora.run.abstract_job import abstract_adapter, abstract_model
from jlora.run.artifacts import note_local_base, write_trained
from jlora.run.checkpoints import find_checkpoint, fixed_settings
from jlora.run.job import open_tokenizer, split_adapters
from jlora.run.label_names import with_label_names
from jlora.run.open_job import open_job
from jlora.ui.console import Console

main = functools.partial(cli.main, "export")

TRAINED = "state.trainable"
"""The part of a checkpoint that holds the trained weights, see ``run.checkpoints``."""


def run(config: Config, options: argparse.Namespace) -> None:
    """Writes a checkpoint's weights to ``export.output_dir``, as training writes its last ones.

    Only they are read from the checkpoint, and only the configuration of the base, unless the
    adapter was initialized from the base's weights (PiSSA, OLoRA). With early stopping they are the
    weights of that step; the best ones are in the run's folder when it is done. Each adapter of a
    multi-adapter run gets a folder.
    """
    del options
    from_weights = config.lora is not None and config.lora.run_splits_base
    if not from_weights:  # nothing is computed: do not occupy an accelerator
        jax.config.update("jax_platforms", "cpu")
    folder, step = _chosen_checkpoint(config)
    run_folder = Path(config.train.output_dir)
    out = Path(config.export.output_dir or run_folder / "exported" / str(step))
    inputs = {
        "the folder of the run": run_folder,
        "the checkpoint": folder / str(step),
        "the folder of the base model": config.model.name_or_path,
    }
    check_output("export.output_dir", out, inputs)
    config, _ = with_label_names(config)
    tokenizer = open_tokenizer(config)
    model = abstract_model(config, tokenizer)
    settings = fixed_settings(config, "model", "quantization", "lora")
    like = _abstract_trained(config, model)
    trained = checkpoint.restore_part(folder, step, TRAINED, like, settings)
    initial = _compute_initial(config, tokenizer) if from_weights else None
    written, notes = [], {}
    for adapter_config, tree in split_adapters(config, trained):
        if config.lora:
            tree = dataclasses.replace(tree, initial=initial)
            notes |= dict.fromkeys(misreadings(tree))
        target = out / Path(adapter_config.train.output_dir).relative_to(run_folder)
        written.append(write_trained(target, config.model.dtype, model, tokenizer, tree))
        if config.lora and (run_folder / BASE_FILE).is_file():
            write_atomic(target / BASE_FILE, (run_folder / BASE_FILE).read_bytes())
    kind = "adapter" if config.lora else "model"
    rows = {"checkpoint": folder / str(step), "step": step, kind: ", ".join(written)}
    note_local_base(console := Console(), trained)
    console.card("exported", rows | {"tokenizer": out})
    for note in notes:
        console.warn(note)


def _abstract_trained(config: Config, model: Model) -> Any:
    """The shapes of what was trained, on one device."""
    shapes = dataclasses.replace(model, dtype="float32").shapes
    if config.lora:
        shapes = dataclasses.replace(abstract_adapter(config, model.shapes), initial=None)
    adapters = (len(config.adapters),) if config.adapters else ()
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*adapters, *x.shape), x.dtype), shapes)


def _compute_initial(config: Config, tokenizer: Any) -> Any:
    """What PiSSA and OLoRA started from, computed from the base's weights."""
    with Console().loading() as progress:
        return open_job(config, tokenizer, trained=False, progress=progress).initial


def _chosen_checkpoint(config: Config) -> tuple[Path, int]:
    """The folder and the step of the checkpoint that the settings name; else the last one."""
    folder, asked = Path(config.train.output_dir) / "checkpoints", config.export.checkpoint
    if asked is not None:
        name = folder / str(asked) if isinstance(asked, int) else asked
        return find_checkpoint(str(name), "export.checkpoint")
    newest = checkpoint.latest(folder)
    if newest is None:
        raise ConfigError("holds no complete checkpoint", where=str(folder), fix="train it first")
    return folder, newest
