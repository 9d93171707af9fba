"""How far a run is: its plan, what has been counted so far, and the checks on every step."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from jlora.config import Config, TrainConfig
from jlora.errors import DivergedError
from jlora.training.optim import frozen_kinds, is_frozen, warmup_steps

LEARNING_BY = 2
"""Updates by which every leaf must have had a gradient: B moves first, then A. With a warm-up it is
one more, since its first rate is zero."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The numbers of a run that follow from its settings, its data and its devices."""

    rows_per_step: int
    eval_rows: int
    accumulation: int
    steps_per_epoch: int
    total_steps: int
    fp16: bool
    learning_by: int
    """Updates by which every leaf must have had a gradient; a B that a long warm-up keeps tiny may
    be zero in float16, and A has none until then."""
    frozen: tuple[str, ...] = ()
    """Names of leaves that are to have no gradient."""

    @classmethod
    def of(
        cls, config: Config, mesh: jax.sharding.Mesh, steps_per_epoch: Callable[[int], int]
    ) -> Plan:
        """``steps_per_epoch(rows in a step)`` says how many steps an epoch takes."""
        settings = config.train
        replicas = mesh.shape["data"] * mesh.shape["fsdp"]
        accumulation = settings.gradient_accumulation_steps
        rows = settings.per_device_train_batch_size * replicas * accumulation
        steps = steps_per_epoch(rows)
        total = settings.max_steps
        if total < 0:
            total = math.ceil(settings.num_train_epochs * steps)
        fp16 = config.compute_dtype == "float16"
        warm = warmup_steps(settings, total)
        learning_by = LEARNING_BY + (warm > 0) + (warm if fp16 else 0)
        held_out, frozen = eval_rows(config, mesh), frozen_kinds(settings)
        return cls(rows, held_out, accumulation, steps, total, fp16, learning_by, frozen)


def eval_rows(config: Config, mesh: jax.sharding.Mesh) -> int:
    """Rows of an evaluation batch, over all devices."""
    settings = config.train
    per_device = settings.per_device_eval_batch_size or settings.per_device_train_batch_size
    return per_device * mesh.shape["data"] * mesh.shape["fsdp"]


@dataclasses.dataclass
class Progress:
    """What is counted along the way; all of it goes into every checkpoint."""

    step: int = 0
    tokens: int = 0
    interval_loss: float = 0.0
    interval_targets: int = 0
    last: dict[str, float] = dataclasses.field(default_factory=dict)
    alive: list[bool] = dataclasses.field(default_factory=list)
    updates: int = 0
    """Steps that did not overflow."""
    overflows: int = 0
    """Steps in a row that did."""
    lines: int = 0
    """Lines in metrics.jsonl."""
    best_loss: float | None = None
    evaluations_since_best: int = 0
    stopped_early: bool = False
    finished: bool = False
    before: list[str] = dataclasses.field(default_factory=list)
    each: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """Of several adapters: name → the sum of its losses since the last line, and of how many."""

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Counts one step's fetched metrics."""
        self.step += 1
        self.tokens += int(metrics["tokens"])
        if math.isfinite(metrics["loss"]):
            self.interval_loss += float(metrics["loss"]) * int(metrics["target_tokens"])
            self.interval_targets += int(metrics["target_tokens"])
        for name, new in metrics.get("each", {}).items():
            self.each[name] = [a + b for a, b in zip(self.each.get(name, (0, 0)), new, strict=True)]
        self.last = {"grad_norm": float(metrics["grad_norm"])}
        self.updates += bool(metrics["finite"])
        if metrics["finite"]:
            alive = [bool(a) for a in metrics["has_gradient"]]
            self.alive = [a or b for a, b in zip(self.alive or alive, alive, strict=True)]

    def line(self, learning_rate: float, plan: Plan) -> dict[str, float]:
        """A training line of metrics.jsonl: means over the steps since the last one."""
        loss = self.interval_loss / max(self.interval_targets, 1)
        self.interval_loss, self.interval_targets = 0.0, 0
        each, self.each = self.each, {}
        return {
            "loss": loss,
            **{f"loss/{name}": total / max(targets, 1) for name, (total, targets) in each.items()},
            "learning_rate": learning_rate,
            **self.last,
            "epoch": round(self.step / plan.steps_per_epoch, 4),
            "tokens": self.tokens,
        }

    def note_evaluation(self, loss: float, settings: TrainConfig) -> bool:
        """Counts an evaluation for early stopping; whether it is the best so far."""
        better = self.best_loss is None or loss < self.best_loss - settings.early_stopping_threshold
        if better:
            self.best_loss, self.evaluations_since_best = loss, 0
        else:
            self.evaluations_since_best += 1
            patience = settings.early_stopping_patience
            self.stopped_early = bool(patience and self.evaluations_since_best >= patience)
        return better


def together(metrics: Mapping[str, Any], adapters: Sequence[str]) -> dict[str, Any]:
    """The metrics of a step of several adapters (``make_train_step``) as those of one run.

    The loss is that of all labelled tokens, the norm that of all gradients.
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
        "each": {name: list(pair) for name, pair in zip(adapters, pairs, strict=True)},
    }


class Meter:
    """Tokens a second, leaving out the first step (which compiles) and what is not training."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._tokens = 0
        self._away = 0.0

    def add(self, tokens: int) -> None:
        """Counts a step that is done."""
        if self._since is None:
            self._since = time.monotonic()
        else:
            self._tokens += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in the block does not count."""
        start = time.monotonic()
        yield
        self._away += time.monotonic() - start

    def rate(self) -> dict[str, float]:
        """``tokens_per_second`` since the last call, if a whole step was timed."""
        if self._since is None or not self._tokens:
            return {}
        now = time.monotonic()
        rate = self._tokens / max(now - self._since - self._away, 1e-9)
        self._since, self._tokens, self._away = now, 0, 0.0
        return {"tokens_per_second": round(rate, 1)}


def check_finite(metrics: Mapping[str, Any], progress: Progress, plan: Plan) -> None:
    """Raises DivergedError when the loss, the gradient or a weight is no longer a number.

    With float16 a step may overflow: it is skipped and the loss scale halved; a hundred of them in
    a row are too many.
    """
    cause = f"loss {float(metrics['loss'])}, gradient norm {float(metrics['grad_norm'])}"
    if not bool(metrics["weights_finite"]):
        cause += ", and weights that are not finite after the update"
    elif bool(metrics["finite"]):
        progress.overflows = 0
        return
    else:
        progress.overflows += 1
        if plan.fp16 and progress.overflows < 100:
            return
    raise DivergedError(
        cause,
        where=f"step {progress.step + 1}",
        fix="lower train.learning_rate, add warm-up, or use bf16; the last checkpoint is whole",
    )


def check_evaluation(loss: float, progress: Progress) -> None:
    """Raises DivergedError when the held-out loss is no longer a number."""
    if not math.isfinite(loss):
        raise DivergedError(
            f"eval_loss {loss}",
            where=f"step {progress.step}",
            fix="lower train.learning_rate, or use bf16",
        )


def check_learning(
    progress: Progress, trainable: Any, plan: Plan, adapters: Sequence[str] = ()
) -> None:
    """Raises DivergedError, naming them, when some leaves had no gradient in the first updates."""
    if progress.updates != plan.learning_by:
        return
    owners = [f"{adapter}: " for adapter in adapters] or [""]
    leaves = [(o, p) for o in owners for p, _ in jax.tree_util.tree_leaves_with_path(trainable)]
    dead = [
        owner + jax.tree_util.keystr(path, simple=True, separator=".")
        for (owner, path), alive in zip(leaves, progress.alive, strict=True)
        if not alive and not is_frozen(path, plan.frozen)
    ]
    if not dead:
        return
    raise DivergedError(
        f"no gradient reaches {len(dead)} of {len(leaves)} trainable leaves: {', '.join(dead[:5])}",
        where=f"step {progress.step}",
        fix="leave these modules out of lora.target_modules or lora.modules_to_save",
    )
