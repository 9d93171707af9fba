"""The training loop: one function, from the first step or the last checkpoint to the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jlora import data
from jlora.distributed.mesh import compiler_options
from jlora.distributed.signals import StopSignals
from jlora.inference import scoring
from jlora.io.peft import base_record
from jlora.run.artifacts import write_results, write_settings
from jlora.run.batches import (
    eval_device_batches,
    make_batch_at,
    make_multi_adapter_batch_at,
    rows_per_adapter,
)
from jlora.run.checkpoints import Checkpoints, identity, stopped_error
from jlora.run.divergence import check_evaluation, check_finite, check_learning
from jlora.run.job import Job
from jlora.run.progress import Progress, ThroughputMeter, total_metrics
from jlora.run.replies import greedy_replies, reply_prompts
from jlora.run.step_counts import StepCounts
from jlora.training.optim import rates
from jlora.training.state import TrainState
from jlora.training.step import make_eval_step
from jlora.ui.console import Console
from jlora.ui.metrics_log import MetricsLog


@dataclasses.dataclass
class RunState:
    """What the loop works with: fixed parts, and the state and the progress that it replaces.

    Nothing but ``state`` holds what is trained. A second copy (the job's first values, a state that
    someone still refers to) would be memory that ``jlora plan`` does not count.
    """

    job: Job
    counts: StepCounts
    rows: data.Prepared
    held_out: list[data.Prepared]
    """Held-out rows of each adapter; empty if there are none."""
    prompts: list[list[data.ReplyRow]]
    """Prompts of each adapter that replies are generated for."""
    eval_step: Callable[[Any, Any, Any], Any]
    checkpoints: Checkpoints
    base_record: dict[str, str] | None
    """What base_model.json says of the base, for an adapter."""
    rates: np.ndarray
    """The learning rate of every update."""
    console: Console
    log: MetricsLog
    state: TrainState
    progress: Progress = dataclasses.field(default_factory=Progress)
    meter: ThroughputMeter = dataclasses.field(default_factory=ThroughputMeter)


def start_run(
    *,
    job: Job,
    counts: StepCounts,
    state: TrainState,
    rows: data.Prepared,
    held_out: data.Prepared | None,
    base_fingerprint: str,
    console: Console,
    log: MetricsLog,
) -> RunState:
    """A run before its first step; ``train_loop`` resumes it if there is a checkpoint.

    Args:
      job: what is trained, and on what; its ``trainable`` may be deleted (donated to ``state``).
      counts: rows and steps.
      state: the state before the first step.
      rows: the training rows.
      held_out: the rows of ``data.eval``.
      base_fingerprint: of ``job.base``, which checkpoints must have in common.
      console: what the user sees.
      log: metrics.jsonl.
    """
    settings = job.config.train
    checkpoints = Checkpoints(
        Path(settings.output_dir) / "checkpoints",
        settings,
        identity=identity(job.config, counts, rows.fingerprint),
        base_fingerprint=base_fingerprint,
    )
    options = compiler_options(job.mesh, full_determinism=settings.full_determinism)
    record = None
    if job.config.lora:
        record = base_record(job.base, job.trainable.config, base_fingerprint)
    return RunState(
        job=job,
        counts=counts,
        rows=rows,
        held_out=rows_per_adapter(held_out, job.adapters) if held_out else [],
        prompts=[reply_prompts(adapter_job) for adapter_job, _ in job.per_adapter(None)],
        eval_step=make_eval_step(job.model, job.bind, options),
        checkpoints=checkpoints,
        base_record=record,
        rates=rates(settings, counts.total_steps),
        console=console,
        log=log,
        state=state,
    )


def train_loop(
    run: RunState, train_step: Callable[[Any, Any, Any], Any], signals: StopSignals
) -> None:
    """Trains from the last checkpoint, or the first step, to the end, and writes the result.

    Raises:
      StoppedError: a signal asked for it; the state was saved.
      DivergedError: see ``run/divergence.py``.
    """
    settings, total = run.job.config.train, run.counts.total_steps
    run.state, run.progress = run.checkpoints.resume(run.state, run.progress, run.console)
    # Not before: a checkpoint of other settings is refused, and then keeps its config.yaml.
    write_settings(run.job, run.base_record)
    # The lines after the checkpoint are of steps that are now done again.
    restore_log(run)
    if run.progress.step == 0:
        evaluate_untrained(run)
    unfetched = None  # metrics of a step that may still be running
    with run.checkpoints, run.console.progress(total, run.progress.step):
        for step, batch in enumerate(remaining_batches(run), run.progress.step + 1):
            run.state, metrics = train_step(run.state, run.job.frozen, batch)
            run.meter.dispatched(metrics["loss"])
            # In every step: a full disk ends the run now, not at the next checkpoint.
            run.checkpoints.raise_failed()
            # Only now, with the next step dispatched, are the last one's metrics waited for: the
            # devices never idle while the host fetches and logs.
            if unfetched:
                finish_step(run, unfetched)
            unfetched = metrics
            stop, last = signals.stop(step), step == total
            evaluating = bool(settings.eval_steps) and step % settings.eval_steps == 0
            saving = bool(settings.save_steps) and step % settings.save_steps == 0
            if not (evaluating or saving or stop or last):
                continue
            finish_step(run, unfetched)
            unfetched = None
            with run.meter.paused():
                # finish_run evaluates after the last step.
                if evaluating and not last and run.held_out:
                    record_line(run, evaluate(run))
                if saving or stop or run.progress.stopped_early:
                    save_checkpoint(run)
            if stop:
                run.checkpoints.wait()
                raise stopped_error(step, stop, settings)
            if run.progress.stopped_early:
                run.console.note(f"stopped early at step {step}: eval_loss no longer improves")
                break
    finish_run(run)


def restore_log(run: RunState) -> None:
    """Cuts the log back to the lines that the checkpoint counts; a warning if lines are missing."""
    counted = run.progress.log_lines
    run.progress.log_lines = run.log.truncate_to(counted)
    if missing := counted - run.progress.log_lines:
        run.console.warn(
            f"{run.log.path} lacks {missing} of the {counted} lines written before step "
            f"{run.progress.step}: the log and the report have a gap there"
        )


def evaluate_untrained(run: RunState) -> None:
    """Replies, and with exact match an evaluation, of the model before it is trained."""
    samples, wanted = generate_replies(run, run.state.trainable), run.job.config.evaluate
    run.progress.replies_before = [s.reply for s in samples[: wanted.samples * len(run.prompts)]]
    if wanted.exact_match:
        record_line(run, evaluate(run) | {"eval_exact_match": scoring.exact_match(samples)})


def remaining_batches(run: RunState) -> Iterator[Any]:
    """The batches of the steps that are left, prefetched by a thread."""
    job, counts, config = run.job, run.counts, run.job.config
    steps = range(run.progress.step, 0 if run.progress.stopped_early else counts.total_steps)
    parts = [
        (rows, rows.order(counts.rows_per_step, config.train.seed, config.data.shuffle))
        for rows in rows_per_adapter(run.rows, job.adapters)
    ]
    if job.adapters:
        batch_at = make_multi_adapter_batch_at(job.mesh, parts, counts.accumulation)
    else:
        batch_at = make_batch_at(job.mesh, *parts[0], counts.accumulation)
    return data.prefetch(batch_at, steps)


def finish_step(run: RunState, metrics: dict[str, Any]) -> None:
    """Waits for a step's metrics; counts, checks and logs them.

    The next step is running: after ``device_get`` nothing here may use a device, or it would wait.
    """
    job, counts, progress = run.job, run.counts, run.progress
    values = jax.device_get(metrics)
    run.meter.completed(int(np.sum(values["tokens"])))
    values = total_metrics(values, job.adapters) if job.adapters else values
    progress.count_step(values)
    check_finite(values, progress, counts)
    check_learning(progress, run.state.trainable, counts, job.adapters)
    run.console.advance(progress.step)
    logging = progress.step % job.config.train.logging_steps == 0
    if logging or progress.step == counts.total_steps:
        # By updates, from 0, as the optimizer counts: a step that overflowed in float16 is none.
        rate = float(run.rates[max(progress.updates - 1, 0)])
        line = progress.training_line(rate, counts)
        progress.start_interval()
        record_line(run, line | run.meter.measure_and_restart())


def evaluate(run: RunState) -> dict[str, float]:
    """The held-out loss as figures of a log line, counted for early stopping; {} without rows."""
    if not run.held_out:
        return {}
    job, settings, results = run.job, run.job.config.train, []
    for (_, part), rows in zip(job.per_adapter(run.state.trainable), run.held_out, strict=True):
        batches = eval_device_batches(job.mesh, rows, run.counts.eval_rows)
        results.append(scoring.held_out(run.eval_step, part, job.frozen, batches))
    loss = scoring.mean_loss(results)
    check_evaluation(loss, run.progress)
    if run.progress.is_best(loss, settings):
        run.checkpoints.set_best(run.state.trainable)
    run.progress.count_evaluation(loss, settings)
    return scoring.figures(results, job.adapters)


def generate_replies(run: RunState, trainable: Any) -> list[scoring.Sample]:
    """The replies of every adapter to its prompts."""
    pairs = zip(run.job.per_adapter(trainable), run.prompts, strict=True)
    return [s for (job, part), prompts in pairs for s in greedy_replies(job, part, prompts)]


def finish_run(run: RunState) -> None:
    """The last evaluation and checkpoint, unless a run that is resumed had them, and the result."""
    progress, unfinished = run.progress, not run.progress.finished
    line = evaluate(run) if unfinished and not progress.stopped_early else {}
    best = run.checkpoints.best
    trained = run.state.trainable if best is None else best
    samples = generate_replies(run, trained)
    if unfinished:
        if run.job.config.evaluate.exact_match:
            line["eval_exact_match"] = scoring.exact_match(samples)
        if line:
            record_line(run, line)
        progress.finished = True
        save_checkpoint(run)
        run.checkpoints.wait()
    shown = [
        {"prompt": s.prompt, "before": before, "after": s.reply, "expected": s.expected}
        # With exact match there are more replies afterwards than samples before.
        for before, s in zip(progress.replies_before, samples, strict=False)
    ]
    rows = {"train": [run.rows], "eval": run.held_out}
    write_results(run.job, run.counts, rows, trained, run.base_record, shown, run.console)


def record_line(run: RunState, line: dict[str, float]) -> None:
    """Writes a line to the log and the console, and counts it."""
    run.progress.count_log_line()
    run.log.write(run.progress.step, **line)
    run.console.log(run.progress.step, line)


def save_checkpoint(run: RunState) -> None:
    """Starts to save a checkpoint; the log lines that it counts are on the disk before."""
    run.log.sync()
    run.checkpoints.save(run.state, run.progress)
