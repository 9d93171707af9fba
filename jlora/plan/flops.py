"""FLOPs of a training step from its jaxpr: what is computed, whichever device computes it.

Every matrix product counts twice its multiplications, as often as its loop runs, and what gradient
checkpointing computes again counts again. For a llama that is 4 FLOPs for a parameter and token
where the base is frozen, 2 more where its layers are recomputed, 6 for the adapter's parameters,
and attention.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

from jlora.run.job import Job
from jlora.run.step_counts import StepCounts
from jlora.run.train_step import TrainStep


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one step on all devices together."""

    products: float
    """Products with weights."""
    attention: float
    """Products of queries, keys and values: of pairs that may see each other in one document."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.products + self.attention


def of_step(job: Job, plan: StepCounts, length: int) -> Flops:
    """Those of a run's step on rows of ``length`` tokens.

    Attention is counted as the reference computes it, of which causality and windows leave a part;
    a kernel that computes scores again in its backward pass does an eighth of that more.
    """
    plain = dataclasses.replace(job.model, attention="reference")
    program = TrainStep.of(dataclasses.replace(job, model=plain), plan, length)
    with jax.set_mesh(job.mesh):
        traced = program.step.trace(program.state, job.frozen, program.batch)  # pyright: ignore
    batched = 2 + bool(job.adapters)
    products, attention = _count(traced.jaxpr.jaxpr, batched)
    return Flops(products, attention * seen(job.model.config.windows, length))


def seen(windows: Sequence[int | None], length: int) -> float:
    """The part of all pairs of a row's tokens that see each other in layers of these windows."""
    parts = []
    for window in windows:
        w = min(window or length, length)
        parts.append((w * (w + 1) / 2 + (length - w) * w) / length**2)
    return sum(parts) / len(parts)


def _count(jaxpr: Any, batched: int) -> tuple[float, float]:
    """FLOPs of products with fewer than ``batched`` batch dimensions, and with so many."""
    few = many = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), (batch, _) = params["dimension_numbers"]
            own = _product(equation, contracted)
            few, many = (few, many + own) if len(batch) >= batched else (few + own, many)
        elif name.startswith("ragged_dot"):
            few += _ragged(equation)
        elif name == "cond":
            each = [_count(branch.jaxpr, batched) for branch in params["branches"]]
            most = max(each, key=sum)
            few, many = few + most[0], many + most[1]
        else:
            times = _times(name, params)
            for inner in jaxprs_in_params(params):
                own = _count(inner, batched)
                few, many = few + times * own[0], many + times * own[1]
    return few, many


def _times(name: str, params: Any) -> int:
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # what every device does
        return math.prod(params["mesh"].shape[axis] for axis in params["manual_axes"])
    return 1


def _product(equation: Any, contracted: Any) -> float:
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _ragged(equation: Any) -> float:
    """Of a product of rows in groups: each row meets one matrix."""
    a, b = (v.aval.shape for v in equation.invars[:2])
    out = equation.outvars[0].aval.shape
    if len(out) == 3:  # a gradient of the matrices: rows are summed over
        return 2.0 * math.prod(a) * b[-1]
    return 2.0 * math.prod(out) * a[-1]
