"""``python -m jlora.train CONFIG.yaml``: LoRA, QLoRA and full fine-tuning by one loop."""

from jlora import cli

if __name__ == "__main__":  # settings are checked before the imports below, which take seconds
    cli.leave(cli.main("train"))

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jlora import data, evaluation, outputs, runtime, sharding
from jlora.batches import (
    batch_at,
    batches_at,
    check_fit,
    check_same,
    eval_batches,
    parts,
    plan_of,
    prepare,
)
from jlora.classes import with_classes
from jlora.config import Config
from jlora.console import Console
from jlora.data.classification import listed
from jlora.described import describe_job, describe_model
from jlora.header import show_header
from jlora.job import Job, open_job, open_tokenizer
from jlora.metrics import MetricsLog
from jlora.models.hf_folder import find_folder
from jlora.optim import check_optimizer, schedule
from jlora.plan.check import compiled_beside, unless_refused
from jlora.program import Program
from jlora.progress import (
    Meter,
    Plan,
    Progress,
    check_evaluation,
    check_finite,
    check_learning,
    together,
)
from jlora.state import TrainState
from jlora.step import make_eval_step

main = functools.partial(cli.main, "train")


def run(config: Config, options: argparse.Namespace) -> None:
    """Trains what the settings say and writes everything to ``train.output_dir``."""
    runtime.distributed()
    if config.train.compilation_cache:
        runtime.compilation_cache()
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
        runtime.RunLock(out, enabled=first),
        MetricsLog(out / "metrics.jsonl", enabled=first) as log,
        runtime.Signals() as signals,
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
            state = program.start(job.trainable)
            train(job, plan, state, train_step, rows, held_out, console, log, signals)


def _described(config: Config, tokenizer: Any) -> Job:
    """The job before a weight is read; how a base came packed stands in its weights."""
    model = describe_model(config, tokenizer)
    if model.config.prequantized:
        find_folder(config.model.name_or_path, config.model.revision)
    return describe_job(config, model, tokenizer, sharding.make_mesh(config.mesh))


def train(
    job: Job,
    plan: Plan,
    state: TrainState,
    train_step: Callable[[Any, Any, Any], Any],
    rows: data.Prepared,
    held_out: data.Prepared | None,
    console: Console,
    log: MetricsLog,
    signals: runtime.Signals,
) -> None:
    """The run from its first step, or its last checkpoint, to what it leaves behind."""
    settings, out = job.config.train, Path(job.config.train.output_dir)
    learning_rate = schedule(settings, plan.total_steps)
    eval_step = make_eval_step(job.model, job.bind, sharding.compiler_options(job.mesh))
    checkpoints = outputs.Checkpoints(out / "checkpoints", job, plan, rows.fingerprint)
    held_out_parts = parts(held_out, job.adapters) if held_out else []
    state, progress = checkpoints.resume(state, Progress(), console)
    outputs.write_settings(job)
    log.truncate_to(progress.lines)
    meter, prompts = Meter(), [outputs.prompts(one) for one, _ in job.each(job.trainable)]

    def reply(trainable: Any) -> list[evaluation.Sample]:
        asked = zip(job.each(trainable), prompts, strict=True)
        return [sample for (one, own), p in asked for sample in outputs.replies(one, own, p)]

    def record(line: dict[str, float]) -> None:
        """Logs a line, and counts it: a run that resumes keeps as many as its checkpoint counts."""
        progress.lines += 1
        log.write(progress.step, **line)
        console.log(progress.step, line)

    def evaluate(state: TrainState) -> dict[str, float]:
        """The held-out loss as part of a line, noted for early stopping."""
        if held_out is None:
            return {}
        results = []
        for (_, own), part in zip(job.each(state.trainable), held_out_parts, strict=True):
            batches = eval_batches(job.mesh, part, plan.eval_rows)
            results.append(evaluation.held_out(eval_step, own, job.frozen, batches))
        loss = evaluation.mean_loss(results)
        check_evaluation(loss, progress)
        if progress.note_evaluation(loss, settings):
            checkpoints.keep_best(state.trainable)
        return evaluation.figures(results, job.adapters)

    def finish_step(metrics: dict[str, Any]) -> None:
        """Fetches a step's metrics, while the next step is under way, and logs them."""
        values = jax.device_get(metrics)
        values = together(values, job.adapters) if job.adapters else values
        check_finite(values, progress, plan)
        progress.add(values)
        check_learning(progress, job.trainable, plan, job.adapters)
        meter.add(int(values["tokens"]))
        console.advance(progress.step)
        if progress.step % settings.logging_steps == 0 or progress.step == plan.total_steps:
            rate = float(learning_rate(max(progress.updates - 1, 0)))
            record(progress.line(rate, plan) | meter.rate())

    if progress.step == 0:
        before = reply(state.trainable)
        progress.before = [s.reply for s in before[: job.config.evaluate.samples * len(prompts)]]
        if job.config.evaluate.exact_match:
            record(evaluate(state) | {"eval_exact_match": evaluation.exact_match(before)})

    steps = range(progress.step, 0 if progress.stopped_early else plan.total_steps)
    shuffle = job.config.data.shuffle
    own = [
        (p, p.order(plan.rows_per_step, settings.seed, shuffle)) for p in parts(rows, job.adapters)
    ]
    make = batches_at(job.mesh, own, plan.accumulation)
    if not job.adapters:
        make = batch_at(job.mesh, *own[0], plan.accumulation)
    batches = data.prefetch(make, steps)
    pending = None
    with console.progress(plan.total_steps, progress.step):
        for step, batch in enumerate(batches, progress.step + 1):
            state, metrics = train_step(state, job.frozen, batch)
            if pending:
                finish_step(pending)
            pending = metrics
            stop, last = signals.stop(step), step == plan.total_steps
            evaluating = bool(settings.eval_steps) and step % settings.eval_steps == 0
            saving = bool(settings.save_steps) and step % settings.save_steps == 0
            if not (evaluating or saving or stop or last):
                continue
            finish_step(pending)
            pending = None
            with meter.paused():
                if evaluating and not last and held_out:
                    record(evaluate(state))
                if saving or stop or progress.stopped_early:
                    log.sync()
                    checkpoints.save(state, progress)
            if stop:
                raise outputs.stopped(step, stop, settings)
            if progress.stopped_early:
                console.note(f"stopped early at step {step}: eval_loss no longer improves")
                break

    ending = not progress.finished
    line = evaluate(state) if ending and not progress.stopped_early else {}
    trained = state.trainable if checkpoints.best is None else checkpoints.best
    after = reply(trained)
    if ending:
        if job.config.evaluate.exact_match:
            line["eval_exact_match"] = evaluation.exact_match(after)
        if line:
            record(line)
        progress.finished = True
        log.sync()
        checkpoints.save(state, progress)
    outputs.finish(job, plan, trained, progress.before, after, console)


def _first_batches(config: Config, tokenizer: Any) -> Iterator[Any]:
    """The first batch as text, its targets marked; one for each adapter."""
    rows = prepare(config, tokenizer, "train")
    size, shuffle = config.train.per_device_train_batch_size, config.data.shuffle
    for part in parts(rows, config.adapters):
        batch = data.batch_at(part, part.order(size, config.train.seed, shuffle), 0)
        yield data.show_batch(batch, tokenizer, id2label=config.model.id2label or ())
