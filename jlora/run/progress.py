"""How far a run is: what is counted from step to step and saved in every checkpoint."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from jlora.config import TrainConfig
from jlora.errors import DataError
from jlora.run.step_counts import StepCounts


@dataclasses.dataclass
class Progress:
    """What is counted along the way; all of it goes into every checkpoint, as JSON.

    The ``count_…`` and ``start_…`` methods change it; everything else only reads.
    """

    step: int = 0
    tokens: int = 0
    interval_loss: float = 0.0
    """Summed loss of the labelled tokens since the last training line."""
    interval_targets: int = 0
    """Labelled tokens since the last training line."""
    grad_norm: float = 0.0
    """Of the last step."""
    has_gradient: list[bool] = dataclasses.field(default_factory=list)
    """For each trainable leaf, whether any update so far had a nonzero gradient for it."""
    updates: int = 0
    """Steps that did not overflow."""
    overflows_in_a_row: int = 0
    """Steps that overflowed since the last one that did not."""
    log_lines: int = 0
    """Lines in metrics.jsonl."""
    best_loss: float | None = None
    evaluations_since_best: int = 0
    stopped_early: bool = False
    finished: bool = False
    replies_before: list[str] = dataclasses.field(default_factory=list)
    """The model's replies to sample prompts before it was trained."""
    adapter_losses: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """In a multi-adapter run: adapter → its summed loss and labelled tokens in this interval."""

    @classmethod
    def from_checkpoint(cls, saved: Mapping[str, Any]) -> Progress:
        """The progress that a checkpoint holds; DataError if its fields are not ours."""
        names = {field.name for field in dataclasses.fields(cls)}
        if names != set(saved):
            raise DataError(
                "the checkpoint was written by another version of jlora",
                where=f"progress: {', '.join(sorted(names ^ set(saved)))}",
                fix="continue with that version, or start anew with train.resume=never",
            )
        return cls(**saved)

    def count_step(self, metrics: Mapping[str, Any]) -> None:
        """Adds one step's metrics, fetched from the devices."""
        self.step += 1
        self.tokens += int(metrics["tokens"])
        # One float16 step that overflowed would make the mean of the whole interval infinite.
        if math.isfinite(metrics["loss"]):
            self.interval_loss += float(metrics["loss"]) * int(metrics["target_tokens"])
            self.interval_targets += int(metrics["target_tokens"])
        for name, new in metrics.get("adapter_losses", {}).items():
            total = self.adapter_losses.get(name, (0, 0))
            self.adapter_losses[name] = [a + b for a, b in zip(total, new, strict=True)]
        self.grad_norm = float(metrics["grad_norm"])
        if not metrics["finite"]:
            self.overflows_in_a_row += 1
            return
        self.updates += 1
        self.overflows_in_a_row = 0
        has_gradient = [bool(a) for a in metrics["has_gradient"]]
        pairs = zip(self.has_gradient or has_gradient, has_gradient, strict=True)
        self.has_gradient = [a or b for a, b in pairs]

    def count_evaluation(self, loss: float, settings: TrainConfig) -> None:
        """Counts an evaluation for early stopping."""
        if self.is_best(loss, settings):
            self.best_loss, self.evaluations_since_best = loss, 0
        else:
            self.evaluations_since_best += 1
            patience = settings.early_stopping_patience
            self.stopped_early = bool(patience and self.evaluations_since_best >= patience)

    def count_log_line(self) -> None:
        """Counts a line of metrics.jsonl; a resumed run keeps as many as its checkpoint counted."""
        self.log_lines += 1

    def start_interval(self) -> None:
        """Starts the means of the next training line."""
        self.interval_loss, self.interval_targets, self.adapter_losses = 0.0, 0, {}

    def is_best(self, loss: float, settings: TrainConfig) -> bool:
        """Whether an evaluation is the best so far, by more than the threshold."""
        return self.best_loss is None or loss < self.best_loss - settings.early_stopping_threshold

    def training_line(self, learning_rate: float, counts: StepCounts) -> dict[str, float]:
        """A training line of metrics.jsonl: means over the steps since ``start_interval``."""
        adapters = self.adapter_losses.items()
        return {
            "loss": self.interval_loss / max(self.interval_targets, 1),
            **{f"loss/{name}": loss / max(targets, 1) for name, (loss, targets) in adapters},
            "learning_rate": learning_rate,
            "grad_norm": self.grad_norm,
            "epoch": round(self.step / counts.steps_per_epoch, 4),
            "tokens": self.tokens,
        }


def total_metrics(metrics: Mapping[str, Any], adapters: Sequence[str]) -> dict[str, Any]:
    """The metrics of a multi-adapter step (leading axis: adapters) as those of one run.

    The loss is the mean over all labelled tokens, the norm that of all gradients together.
    """
    targets = np.asarray(metrics["target_tokens"])
    losses = np.asarray(metrics["loss"]) * targets
    pairs = zip(losses.tolist(), targets.tolist(), strict=True)
    return {
        "loss": losses.sum() / max(targets.sum(), 1),
        "grad_norm": np.sqrt(np.sum(np.square(metrics["grad_norm"]))),
        "target_tokens": targets.sum(),
        "tokens": np.sum(metrics["tokens"]),
        "finite": np.all(metrics["finite"]),
        "weights_finite": np.all(metrics["weights_finite"]),
        "has_gradient": np.ravel(metrics["has_gradient"]),
        "adapter_losses": {name: list(pair) for name, pair in zip(adapters, pairs, strict=True)},
    }


class ThroughputMeter:
    """Tokens a second of completed steps, without the first (which compiles) and without pauses.

    A step that ran within its dispatch, as it may on a CPU, was complete when that returned, and
    not when its metrics are fetched a step later.
    """

    def __init__(self) -> None:
        self._ready: deque[float | None] = deque()
        """For each step in flight, when it was seen to be complete, if that was at its dispatch."""
        self._since: float | None = None
        self._last = 0.0
        self._tokens = 0
        self._paused = 0.0

    def dispatched(self, result: Any) -> None:
        """Notes a step's dispatch; ``result`` is an array that it computes."""
        # On CPUs a fetch may return late, or at once: rates by it alone were half or a thousand
        # times the truth.
        self._ready.append(time.monotonic() if result.is_ready() else None)

    def completed(self, tokens: int) -> None:
        """Counts the step that was dispatched first; the run's first one only starts the clock."""
        ready = self._ready.popleft()
        self._last = time.monotonic() if ready is None else ready
        if self._since is None:
            self._since = self._last
        else:
            self._tokens += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time in the block out: evaluations and checkpoints are not training."""
        start = time.monotonic()
        yield
        self._paused += time.monotonic() - start

    def measure_and_restart(self) -> dict[str, float]:
        """``tokens_per_second`` since the last call, if a whole step was timed."""
        if self._since is None or not self._tokens:
            return {}
        elapsed = self._last - self._since - self._paused
        tokens, self._since, self._tokens, self._paused = self._tokens, self._last, 0, 0.0
        return {"tokens_per_second": round(tokens / elapsed, 1)} if elapsed > 0 else {}
