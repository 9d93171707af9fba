"""``jlora export RUN``: a checkpoint's weights as a folder of PEFT, or of transformers."""

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
from jlora.files import write_atomic
from jlora.io import checkpoint
from jlora.io.peft import BASE_FILE
from jlora.models import Model
from jlora.run import outputs
from jlora.run.abstract_job import adapter_shapes, describe_model
from jlora.run.job import each_adapter, open_job, open_tokenizer
from jlora.run.label_names import with_classes
from jlora.ui.console import Console

main = functools.partial(cli.main, "export")

PART = "state.trainable"
"""Where a checkpoint has the trained weights, see ``outputs.Checkpoints``."""


def run(config: Config, options: argparse.Namespace) -> None:
    """Writes a checkpoint's weights to ``export.output_dir`` as training writes its last ones.

    Of the checkpoint only these are read, and of the base only its description, unless the adapter
    started from a part of it (PiSSA, OLoRA). With early stopping they are the step's own; the best
    are in the run's folder when it is done. Adapters that were trained together get a folder each.
    """
    del options
    from_weights = config.lora is not None and config.lora.begins_from_weights
    if not from_weights:  # nothing is computed: leave accelerators alone
        jax.config.update("jax_platforms", "cpu")
    folder, step = _chosen(config)
    config, _ = with_classes(config)
    tokenizer = open_tokenizer(config)
    model = describe_model(config, tokenizer)
    run = outputs.settled(config, "model", "quantization", "lora")
    trained = checkpoint.restore_part(folder, step, PART, _like(config, model), run)
    initial = _initial(config, tokenizer) if from_weights else None
    ran = Path(config.train.output_dir)
    out = Path(config.export.output_dir or ran / "exported" / str(step))
    written = []
    for one, own in each_adapter(config, trained):
        if config.lora:
            own = dataclasses.replace(own, initial=initial)
        where = out / Path(one.train.output_dir).relative_to(ran)
        written.append(outputs.write_model(where, config.model.dtype, model, tokenizer, own))
        if config.lora and (ran / BASE_FILE).is_file():
            write_atomic(where / BASE_FILE, (ran / BASE_FILE).read_bytes())
    kind = "adapter" if config.lora else "model"
    rows = {"checkpoint": folder / str(step), "steps": step, kind: ", ".join(written)}
    Console().card("exported", rows | {"tokenizer": out})


def _like(config: Config, model: Model) -> Any:
    """The shapes of what was trained, on one device."""
    shapes = dataclasses.replace(model, dtype="float32").shapes
    if config.lora:
        shapes = dataclasses.replace(adapter_shapes(config, model.shapes), initial=None)
    several = (len(config.adapters),) if config.adapters else ()
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*several, *x.shape), x.dtype), shapes)


def _initial(config: Config, tokenizer: Any) -> Any:
    """What PiSSA and OLoRA started from: computed from the base, which is read for it."""
    with Console().loading() as progress:
        return open_job(config, tokenizer, trained=False, progress=progress).initial


def _chosen(config: Config) -> tuple[Path, int]:
    """The folder and the step of the checkpoint that the settings name."""
    folder, asked = Path(config.train.output_dir) / "checkpoints", config.export.checkpoint
    if asked is not None:
        name = folder / str(asked) if isinstance(asked, int) else asked
        return outputs.named(str(name), "export.checkpoint")
    newest = checkpoint.latest(folder)
    if newest is None:
        raise ConfigError("holds no whole checkpoint", where=str(folder), fix="train it first")
    return folder, newest
