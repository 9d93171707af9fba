"""The training loop: steps, and what comes between them, from where a run is to its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jlora import data
from jlora.distributed.mesh import compiler_options
from jlora.distributed.signals import StopSignals
from jlora.inference import scoring
from jlora.run import outputs
from jlora.run.batches import batch_at, batches_at, eval_batches, parts
from jlora.run.job import Job
from jlora.run.progress import (
    Meter,
    Plan,
    Progress,
    check_evaluation,
    check_finite,
    check_learning,
    together,
)
from jlora.training.optim import schedule
from jlora.training.state import TrainState
from jlora.training.step import make_eval_step
from jlora.ui.console import Console
from jlora.ui.metrics_log import MetricsLog


@dataclasses.dataclass
class Loop:
    """A run: what it works on, whom it tells, and how far it is.

    What is trained is in ``state`` only: a second copy of it, ``job``'s first values or a state
    that somebody holds on to, would be memory that ``jlora plan`` does not count.
    """

    job: Job
    plan: Plan
    state: TrainState
    rows: data.Prepared
    held_out: data.Prepared | None
    console: Console
    log: MetricsLog

    def __post_init__(self) -> None:
        job, plan, settings = self.job, self.plan, self.job.config.train
        self.settings = settings
        self.progress, self.meter = Progress(), Meter()
        self.learning_rate = schedule(settings, plan.total_steps)
        self.eval_step = make_eval_step(job.model, job.bind, compiler_options(job.mesh))
        folder = Path(settings.output_dir) / "checkpoints"
        self.checkpoints = outputs.Checkpoints(folder, job, plan, self.rows.fingerprint)
        self.held_out_parts = parts(self.held_out, job.adapters) if self.held_out else []
        self.prompts = [outputs.prompts(one) for one, _ in job.each(None)]

    def run(self, train_step: Callable[[Any, Any, Any], Any], signals: StopSignals) -> None:
        """Takes the run from its first step, or its last checkpoint, to what it leaves behind."""
        resume = self.checkpoints.resume
        self.state, self.progress = resume(self.state, self.progress, self.console)
        outputs.write_settings(self.job)
        self.log.truncate_to(self.progress.lines)
        if self.progress.step == 0:
            self._look_before()
        self._steps(train_step, signals)
        self._finish()

    def _look_before(self) -> None:
        """What the model says before it is trained."""
        before, wanted = self._replies(self.state.trainable), self.job.config.evaluate
        self.progress.before = [s.reply for s in before[: wanted.samples * len(self.prompts)]]
        if wanted.exact_match:
            exact = scoring.exact_match(before)
            self._record(self._evaluate() | {"eval_exact_match": exact})

    def _steps(self, train_step: Callable[[Any, Any, Any], Any], signals: StopSignals) -> None:
        """All steps that are left; metrics are fetched while the next step is under way."""
        progress, settings, total = self.progress, self.settings, self.plan.total_steps
        pending = None
        with self.console.progress(total, progress.step):
            for step, batch in enumerate(self._batches(), progress.step + 1):
                self.state, metrics = train_step(self.state, self.job.frozen, batch)
                if pending:
                    self._finish_step(pending)
                pending = metrics
                stop, last = signals.stop(step), step == total
                evaluating = bool(settings.eval_steps) and step % settings.eval_steps == 0
                saving = bool(settings.save_steps) and step % settings.save_steps == 0
                if not (evaluating or saving or stop or last):
                    continue
                self._finish_step(pending)
                pending = None
                with self.meter.paused():
                    if evaluating and not last and self.held_out:
                        self._record(self._evaluate())
                    if saving or stop or progress.stopped_early:
                        self._save()
                if stop:
                    raise outputs.stopped(step, stop, settings)
                if progress.stopped_early:
                    self.console.note(f"stopped early at step {step}: eval_loss no longer improves")
                    break

    def _batches(self) -> Iterator[Any]:
        """The batches of the steps that are left, made ahead."""
        job, plan, settings = self.job, self.plan, self.job.config
        steps = range(self.progress.step, 0 if self.progress.stopped_early else plan.total_steps)
        own = [
            (p, p.order(plan.rows_per_step, settings.train.seed, settings.data.shuffle))
            for p in parts(self.rows, job.adapters)
        ]
        if job.adapters:
            return data.prefetch(batches_at(job.mesh, own, plan.accumulation), steps)
        return data.prefetch(batch_at(job.mesh, *own[0], plan.accumulation), steps)

    def _finish_step(self, metrics: dict[str, Any]) -> None:
        """Fetches a step's metrics, checks, counts and logs them."""
        job, plan, progress = self.job, self.plan, self.progress
        values = jax.device_get(metrics)
        values = together(values, job.adapters) if job.adapters else values
        check_finite(values, progress, plan)
        progress.add(values)
        check_learning(progress, self.state.trainable, plan, job.adapters)
        self.meter.add(int(values["tokens"]))
        self.console.advance(progress.step)
        if progress.step % self.settings.logging_steps == 0 or progress.step == plan.total_steps:
            rate = float(self.learning_rate(max(progress.updates - 1, 0)))
            self._record(progress.line(rate, plan) | self.meter.rate())

    def _finish(self) -> None:
        """The last evaluation and checkpoint of a run that has not had them, and its result."""
        ending = not self.progress.finished
        line = self._evaluate() if ending and not self.progress.stopped_early else {}
        best = self.checkpoints.best
        trained = self.state.trainable if best is None else best
        after = self._replies(trained)
        if ending:
            if self.job.config.evaluate.exact_match:
                line["eval_exact_match"] = scoring.exact_match(after)
            if line:
                self._record(line)
            self.progress.finished = True
            self._save()
        outputs.finish(self.job, self.plan, trained, self.progress.before, after, self.console)

    def _evaluate(self) -> dict[str, float]:
        """The held-out loss as part of a line, noted for early stopping."""
        if self.held_out is None:
            return {}
        job, results = self.job, []
        for (_, own), part in zip(job.each(self.state.trainable), self.held_out_parts, strict=True):
            batches = eval_batches(job.mesh, part, self.plan.eval_rows)
            results.append(scoring.held_out(self.eval_step, own, job.frozen, batches))
        loss = scoring.mean_loss(results)
        check_evaluation(loss, self.progress)
        if self.progress.note_evaluation(loss, self.settings):
            self.checkpoints.keep_best(self.state.trainable)
        return scoring.figures(results, job.adapters)

    def _replies(self, trainable: Any) -> list[scoring.Sample]:
        asked = zip(self.job.each(trainable), self.prompts, strict=True)
        return [s for (one, own), p in asked for s in outputs.replies(one, own, p)]

    def _record(self, line: dict[str, float]) -> None:
        """Logs a line, and counts it: a run that resumes keeps as many as its checkpoint counts."""
        self.progress.lines += 1
        self.log.write(self.progress.step, **line)
        self.console.log(self.progress.step, line)

    def _save(self) -> None:
        """A checkpoint; the log's lines that it counts are on the disk before it is."""
        self.log.sync()
        self.checkpoints.save(self.state, self.progress)
