"""Memory of a step without a compiler for its device: arguments exactly, the rest by formula.

The formula follows what the compiled step was seen to hold at its peak, in the backward pass: the
gradients of what trains; the input of every layer (and its products, without gradient
checkpointing), and all that one layer makes of them and its gradients; one layer's matrices
dequantized; a chunk of logits and its gradient; in full fine-tuning a copy of the weights in the
type of computation. ``tests/test_plan_estimate.py`` holds it against the compiler.
"""

from __future__ import annotations

import math
from typing import Any

import jax

from jlora.models.layer_scan import OFFLOAD
from jlora.plan.memory import Memory, arguments, device_bytes
from jlora.quant.params import is_quantized
from jlora.run.job import Job
from jlora.run.step_counts import StepCounts
from jlora.run.train_step import TrainStep
from jlora.training.step import CHUNK_ELEMENTS

TOLERANCE = 0.25
"""By which part of the compiled peak an estimate was off at most, where it is tested."""


def memory(program: TrainStep, plan: StepCounts, length: int) -> Memory:
    """What a step takes of a device's memory, about."""
    mesh = program.job.mesh
    rows = plan.rows_per_step // plan.accumulation // (mesh.shape["data"] * mesh.shape["fsdp"])
    tokens = rows * length * max(1, len(program.job.adapters))
    temporaries = _temporaries(program.job, tokens, plan.accumulation)
    host = device_bytes(program.state.opt_state, "pinned_host")
    if (model := program.job.model).gradient_checkpointing == OFFLOAD:
        width = jax.numpy.dtype(model.dtype).itemsize
        host += model.config.num_hidden_layers * tokens * model.config.hidden_size * width
    parts = {**arguments(program), "best": device_bytes(program.best)}
    return Memory(**parts, temporaries=temporaries, outputs=0, padding=0, host=host)


def _temporaries(job: Job, tokens: int, accumulation: int) -> int:
    c, width = job.model.config, jax.numpy.dtype(job.model.dtype).itemsize
    tensor = job.mesh.shape["tensor"]
    gradients = device_bytes(job.trainable) * (1 if accumulation == 1 else 2)
    heads, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    inner = c.intermediate_size
    if c.experts is not None:
        inner = c.experts.per_token * c.experts.intermediate_size + (c.experts.shared_size or 0)
    split = (3 * heads + 2 * keys + 4 * inner) / tensor
    layer = tokens * width * (6 * c.hidden_size + split)
    layers = c.num_hidden_layers
    products = 2 * heads + 2 * keys + 2 * inner  # see jlora.kept
    each = 0 if job.model.gradient_checkpointing == OFFLOAD else c.hidden_size
    if not job.model.gradient_checkpointing:
        each += c.hidden_size + products / tensor
    kept = layers * tokens * width * each + layer
    logits = 2 * 4 * min(tokens * c.num_outputs, CHUNK_ELEMENTS) / tensor
    return round(gradients + kept + logits + _dense(job, width))


def _dense(job: Job, width: int) -> float:
    """Bytes of weights that are there in another form: dequantized, gathered, or cast."""
    if job.config.lora is None:
        return sum(
            width * math.prod(leaf.sharding.shard_shape(leaf.shape))
            for leaf in jax.tree.leaves(job.trainable)
        )
    leaves = jax.tree.leaves(job.base, is_leaf=is_quantized)
    stacked = [_one_layer(leaf) for leaf in leaves if is_quantized(leaf) or len(leaf.shape) > 2]
    gathered = job.mesh.shape["fsdp"] > 1
    packed = [_one_layer(leaf) for leaf in leaves if is_quantized(leaf)]
    sizes = sorted(stacked if gathered else packed, reverse=True)
    return width * sum(sizes[:2]) / job.mesh.shape["tensor"]


def _one_layer(leaf: Any) -> int:
    return math.prod(leaf.shape[-2:])
