"""The checks on every step and evaluation that end a run which does not learn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jlora.errors import DivergedError
from jlora.run.progress import Progress
from jlora.run.step_counts import StepCounts
from jlora.training.optim import is_frozen

# The loss scale, 2²⁴ at most, is 1 after 24 of them: then it is not the scale that overflows.
MAX_OVERFLOWS_IN_A_ROW = 100


def check_finite(metrics: Mapping[str, Any], progress: Progress, counts: StepCounts) -> None:
    """Raises DivergedError when the loss, the gradient or a weight is not finite.

    ``progress`` has counted the step already. In float16 a step may overflow: it is skipped and the
    loss scale halved; only ``MAX_OVERFLOWS_IN_A_ROW`` of them mean that the run diverged.
    """
    cause = f"loss {float(metrics['loss'])}, gradient norm {float(metrics['grad_norm'])}"
    if bool(metrics["weights_finite"]):
        tolerated = counts.fp16 and progress.overflows_in_a_row < MAX_OVERFLOWS_IN_A_ROW
        if bool(metrics["finite"]) or tolerated:
            return
    else:
        cause += ", and weights that are not finite after the update"
    raise DivergedError(
        cause,
        where=f"step {progress.step}",
        fix="lower train.learning_rate, add warm-up, or use bf16; the last checkpoint is intact",
    )


def check_evaluation(loss: float, progress: Progress) -> None:
    """Raises DivergedError when the held-out loss is not finite."""
    if not math.isfinite(loss):
        raise DivergedError(
            f"eval_loss {loss}",
            where=f"step {progress.step}",
            fix="lower train.learning_rate, or use bf16",
        )


def check_learning(
    progress: Progress, trainable: Any, counts: StepCounts, adapters: Sequence[str] = ()
) -> None:
    """Raises DivergedError, naming the leaves that had no gradient in any of the first updates.

    Such a leaf belongs to a module that the model does not use.
    """
    if progress.updates != counts.all_learning_by:
        return
    prefixes = [f"{adapter}: " for adapter in adapters] or [""]
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(trainable)]
    leaves = [(prefix, path) for prefix in prefixes for path in paths]
    dead = [
        prefix + jax.tree_util.keystr(path, simple=True, separator=".")
        for (prefix, path), has_gradient in zip(leaves, progress.has_gradient, strict=True)
        if not has_gradient and not is_frozen(path, counts.frozen)
    ]
    if not dead:
        return
    raise DivergedError(
        f"no gradient reaches {len(dead)} of {len(leaves)} trainable leaves: {', '.join(dead[:5])}",
        where=f"step {progress.step}",
        fix="leave these modules out of lora.target_modules or lora.modules_to_save",
    )
