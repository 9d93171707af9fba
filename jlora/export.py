"""``jlora export RUN``: a checkpoint's weights as a folder of PEFT, or of transformers."""

from jlora import cli

if __name__ == "__main__":  # settings are checked before the imports below, which take seconds
    cli.leave(cli.main("export"))

import argparse
import dataclasses
import functools
from pathlib import Path

import jax

from jlora import checkpoint, outputs
from jlora.adapter_io import BASE_FILE
from jlora.classes import with_classes
from jlora.config import Config
from jlora.console import Console
from jlora.errors import ConfigError
from jlora.files import write_atomic
from jlora.job import adapter_shapes, describe_model, open_tokenizer

main = functools.partial(cli.main, "export")

PART = "state.trainable"
"""Where a checkpoint has the trained weights, see ``outputs.Checkpoints``."""


def run(config: Config, options: argparse.Namespace) -> None:
    """Writes a checkpoint's weights to ``export.output_dir`` as training writes its last ones.

    Of the checkpoint only these are read, and of the base only its description. With early stopping
    they are the step's own; the best are in the run's folder when it is done.
    """
    del options
    jax.config.update("jax_platforms", "cpu")  # nothing is computed: leave accelerators alone
    if names := config.adapters:
        raise ConfigError(
            f"a checkpoint of {len(names)} adapters cannot be exported",
            where=config.train.output_dir,
            fix="let the run end, which writes each to a folder of its own",
        )
    folder, step = _chosen(config)
    config, _ = with_classes(config)
    tokenizer = open_tokenizer(config)
    model = describe_model(config, tokenizer)
    if config.lora:
        like = adapter_shapes(config, model.shapes)
    else:
        like = dataclasses.replace(model, dtype="float32").shapes
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)  # on one device
    run = outputs.settled(config, "model", "quantization", "lora")
    trained = checkpoint.restore_part(folder, step, PART, like, run)
    out = Path(config.export.output_dir or Path(config.train.output_dir) / "exported" / str(step))
    written = outputs.write_model(out, config.model.dtype, model, tokenizer, trained)
    kind = "adapter" if config.lora else "model"
    base = Path(config.train.output_dir) / BASE_FILE
    if config.lora and base.is_file():
        write_atomic(out / BASE_FILE, base.read_bytes())
    rows = {"checkpoint": folder / str(step), "steps": step, kind: written, "tokenizer": out}
    Console().card("exported", rows)


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
