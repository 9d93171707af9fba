"""FLOPs of a training step, counted in its jaxpr and so independent of the device.

Only matrix products count: 2 FLOPs per multiply-add, times the trip counts of the loops around
them. What gradient checkpointing recomputes is included. For a Llama that is, per token, 4 FLOPs
for each frozen parameter (2 more with gradient checkpointing) and 6 for each adapter parameter,
plus those of attention.
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
    """FLOPs of one step, summed over all devices."""

    products: float
    """Of products with weights."""
    attention: float
    """Of QKᵀ and PV, only for the (query, key) pairs that the causal mask and the window allow."""

    @property
    def total(self) -> float:
        """FLOPs of all matrix products."""
        return self.products + self.attention


def of_step(job: Job, plan: StepCounts, length: int) -> Flops:
    """FLOPs of a run's step on rows of ``length`` tokens.

    Attention is counted in the reference implementation, times the fraction of pairs that the
    causal mask and the windows allow. A flash-attention kernel, which recomputes scores in its
    backward pass, does an eighth more.
    """
    plain = dataclasses.replace(job.model, attention="reference")
    program = TrainStep.of(dataclasses.replace(job, model=plain), plan, length, documents=1)
    with jax.set_mesh(job.mesh):
        traced = program.step.trace(program.state, job.frozen, program.batch)  # pyright: ignore
    batched = 2 + bool(job.adapters)
    products, attention = _count(traced.jaxpr.jaxpr, batched)
    return Flops(products, attention * mean_visible(job.model.config.windows, length))


def mean_visible(windows: Sequence[int | None], length: int) -> float:
    """Fraction of the (query, key) pairs of a row that masks allow, averaged over the layers.

    ``windows`` holds the sliding window of each layer; None is full causal attention.
    """
    parts = []
    for window in windows:
        w = min(window or length, length)
        parts.append((w * (w + 1) / 2 + (length - w) * w) / length**2)
    return sum(parts) / len(parts)


def _count(jaxpr: Any, batched: int) -> tuple[float, float]:
    """FLOPs of products with weights and of attention's products.

    Products with at least ``batched`` batch dimensions (rows and heads; with several adapters their
    axis too) are attention's.
    """
    weights = attention = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), (batch, _) = params["dimension_numbers"]
            product = _product(equation, contracted)
            if len(batch) >= batched:
                attention += product
            else:
                weights += product
        elif name.startswith("ragged_dot"):
            weights += _ragged(equation)
        elif name == "cond":
            branches = [_count(branch.jaxpr, batched) for branch in params["branches"]]
            # Of a choice between kernels one runs.
            most = max(branches, key=sum)
            weights, attention = weights + most[0], attention + most[1]
        else:
            times = _times(name, params)
            for inner in jaxprs_in_params(params):
                inner_weights, inner_attention = _count(inner, batched)
                weights += times * inner_weights
                attention += times * inner_attention
    return weights, attention


def _times(name: str, params: Any) -> int:
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # its body is the work of one device
        return math.prod(params["mesh"].shape[axis] for axis in params["manual_axes"])
    return 1


def _product(equation: Any, contracted: Any) -> float:
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _ragged(equation: Any) -> float:
    """FLOPs of ``ragged_dot``: each row is multiplied with the matrix of its group."""
    a, b = (v.aval.shape for v in equation.invars[:2])
    out = equation.outvars[0].aval.shape
    if len(out) == 3:  # gradient of the matrices: rows are contracted
        return 2.0 * math.prod(a) * b[-1]
    return 2.0 * math.prod(out) * a[-1]
