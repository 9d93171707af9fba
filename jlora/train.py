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
from jlora.data.labelled_texts import first_ten
from jlora.distributed import processes, sharding
from jlora.distributed.lock import RunLock
from jlora.distributed.mesh import times_kernels
from jlora.distributed.signals import StopSignals
from jlora.files import check_output
from jlora.plan.auto_checkpointing import with_checkpointing
from jlora.plan.check import compiled_beside
from jlora.run import environment
from jlora.run.abstract_job import abstract_job
from jlora.run.artifacts import check_no_adapter
from jlora.run.batches import (
    check_rows_fit,
    check_same_rows,
    count_steps,
    prepare_rows,
    rows_per_adapter,
)
from jlora.run.checkpoints import check_resumable
from jlora.run.header import checkpointing_text, show_header
from jlora.run.init_from import taken_over
from jlora.run.label_names import with_label_names
from jlora.run.loop import start_run, train_loop
from jlora.run.open_job import open_job
from jlora.run.open_tokenizer import note_other_tokenizer, open_with_new_tokens
from jlora.run.train_step import TrainStep
from jlora.training.optim import check_optimizer
from jlora.tree.fingerprint import fingerprint
from jlora.ui.console import Console
from jlora.ui.metrics_log import MetricsLog

main = functools.partial(cli.main, "train")


def run(config: Config, options: argparse.Namespace) -> None:
    """Trains what the settings say and writes everything to ``train.output_dir``."""
    processes.initialize()
    if config.train.compilation_cache:
        environment.enable_compilation_cache()
    is_first, out = jax.process_index() == 0, Path(config.train.output_dir)
    console = Console(enabled=is_first)
    inputs = {
        "the folder of the base model": config.model.name_or_path,
        "lora.init_from": config.lora and config.lora.init_from,
    }
    check_output("train.output_dir", out, inputs, above=False)
    if config.lora is None:
        check_no_adapter("train.output_dir", out)
    check_optimizer(config.train)
    config, origin = with_label_names(config)
    config, tokenizer = open_with_new_tokens(config, console)
    if options.show_batch:
        for text in _first_batches(config, tokenizer):
            console.text(text)
        return
    with (
        # First: whoever does not get the lock has not touched the log of the run that has it.
        RunLock(out, enabled=is_first),
        MetricsLog(out / "metrics.jsonl", enabled=is_first) as log,
        StopSignals() as signals,
    ):
        if names := config.model.id2label:
            console.note(f"{len(names)} classes, from {origin}: {first_ten(names)}")
        note_other_tokenizer(console, config, tokenizer)
        console.note("reading and tokenizing the data …")
        rows = prepare_rows(config, tokenizer, "train")
        held_out = prepare_rows(config, tokenizer, "eval") if config.data.eval else None
        # The header, the checks and the compiler need shapes only: all of it happens before, or
        # while, the weights are loaded.
        mesh = sharding.make_mesh(config.mesh)
        abstract = abstract_job(config=config, tokenizer=tokenizer, mesh=mesh, download=True)
        if taken := taken_over(config, abstract.config):
            console.note(f"from lora.init_from: {taken}")
        config = abstract.config
        for key, prepared in (("data.train", rows), ("data.eval", held_out)):
            if prepared:
                check_rows_fit(abstract, prepared)
                check_same_rows(prepared, key)
        counts = count_steps(config, mesh, rows)
        check_resumable(config, counts, rows.fingerprint)
        show_header(console, abstract, counts, rows, held_out)
        programs = [
            TrainStep.of(one, counts, rows.length, rows.packed.documents)
            for one in with_checkpointing(abstract)
        ]
        loading, compiles_first = f"loading {config.model.name_or_path}", times_kernels(mesh)
        console.note("compiling …" if compiles_first else f"{loading}, and compiling …")
        with compiled_beside(programs, rows) as compiling, console.loading() as progress:
            if compiles_first:
                console.note(f"{loading} …")
            job = open_job(
                config,
                tokenizer,
                trained=False,
                progress=progress,
                cancel=compiling.has_failed,
            )
            if not compiling.is_done:
                console.note("compiling …")
            program, train_step = compiling.result()
        if len(programs) > 1:
            console.note(f"gradient checkpointing: {checkpointing_text(program.job.config.train)}")
        with jax.set_mesh(job.mesh):
            run_state = start_run(
                job=job,
                counts=counts,
                state=program.init_state(job.trainable),
                rows=rows,
                held_out=held_out,
                base_fingerprint=fingerprint(job.base),
                console=console,
                log=log,
            )
            train_loop(run_state, train_step, signals)


def _first_batches(config: Config, tokenizer: Any) -> Iterator[Any]:
    """The first batch as text, its target tokens marked; one for each adapter."""
    rows = prepare_rows(config, tokenizer, "train")
    size, shuffle = config.train.per_device_train_batch_size, config.data.shuffle
    for part in rows_per_adapter(rows, config.adapters):
        batch = data.batch_at(part, part.order(size, config.train.seed, shuffle), 0)
        yield data.show_batch(batch, tokenizer, id2label=config.model.id2label or ())
