"""``python -m jlora.train CONFIG.yaml``: LoRA, QLoRA and full fine-tuning by one loop."""

from jlora import cli

if __name__ == "__main__":  # settings are checked before the imports below, which take seconds
    cli.leave(cli.main("train"))

import argparse
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jlora import data
from jlora.config import Config
from jlora.data.classification import listed
from jlora.distributed import processes, sharding
from jlora.distributed.lock import RunLock
from jlora.distributed.signals import StopSignals
from jlora.io.hf.folder import find_folder
from jlora.plan.check import compiled_beside, unless_refused
from jlora.run import environment
from jlora.run.abstract_job import describe_job, describe_model
from jlora.run.batches import check_fit, check_same, parts, plan_of, prepare
from jlora.run.compiled_step import Program
from jlora.run.header import show_header
from jlora.run.job import Job, open_job, open_tokenizer
from jlora.run.label_names import with_classes
from jlora.run.loop import Loop
from jlora.training.optim import check_optimizer
from jlora.ui.console import Console
from jlora.ui.metrics_log import MetricsLog

main = functools.partial(cli.main, "train")


def run(config: Config, options: argparse.Namespace) -> None:
    """Trains what the settings say and writes everything to ``train.output_dir``."""
    processes.initialize()
    if config.train.compilation_cache:
        environment.enable_compilation_cache()
    first, out = jax.process_index() == 0, Path(config.train.output_dir)
    console = Console(enabled=first)
    check_optimizer(config.train)
    config, origin = with_classes(config)
    tokenizer = open_tokenizer(config)
    if options.show_batch:
        for text in _first_batches(config, tokenizer):
            console.text(text)
        return
    with (
        RunLock(out, enabled=first),
        MetricsLog(out / "metrics.jsonl", enabled=first) as log,
        StopSignals() as signals,
    ):
        if names := config.model.id2label:
            console.note(f"{len(names)} classes, from {origin}: {listed(names)}")
        console.note("reading and tokenizing the data …")
        rows = prepare(config, tokenizer, "train")
        held_out = prepare(config, tokenizer, "eval") if config.data.eval else None
        shapes = _described(config, tokenizer)
        for what, prepared in (("data.train", rows), ("data.eval", held_out)):
            if prepared:
                check_fit(shapes, prepared)
                check_same(prepared, what)
        plan = plan_of(config, shapes.mesh, rows)
        show_header(console, shapes, plan, rows, held_out)
        program = Program.of(shapes, plan, rows.length)
        console.note(f"loading {config.model.name_or_path}, and compiling …")
        with compiled_beside(program, rows) as compiling, console.loading() as progress:
            progress = unless_refused(compiling, progress)
            job = open_job(config, tokenizer, trained=False, progress=progress)
            if not compiling.done():
                console.note("compiling …")
            train_step = compiling.result()
        with jax.set_mesh(job.mesh):
            loop = Loop(job, plan, program.start(job.trainable), rows, held_out, console, log)
            loop.run(train_step, signals)


def _described(config: Config, tokenizer: Any) -> Job:
    """The job before a weight is read; how a base came packed stands in its weights."""
    model = describe_model(config, tokenizer)
    if model.config.prequantized:
        find_folder(config.model.name_or_path, config.model.revision)
    return describe_job(config, model, tokenizer, sharding.make_mesh(config.mesh))


def _first_batches(config: Config, tokenizer: Any) -> Iterator[Any]:
    """The first batch as text, its targets marked; one for each adapter."""
    rows = prepare(config, tokenizer, "train")
    size, shuffle = config.train.per_device_train_batch_size, config.data.shuffle
    for part in parts(rows, config.adapters):
        batch = data.batch_at(part, part.order(size, config.train.seed, shuffle), 0)
        yield data.show_batch(batch, tokenizer, id2label=config.model.id2label or ())
