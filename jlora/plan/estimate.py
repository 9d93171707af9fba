"""Estimates the memory of a step without a compiler: exact for arguments, a formula for the rest.

The formula adds up what compiled steps were seen to hold at their peak, in the backward pass: the
gradients; the input of every layer (without gradient checkpointing also the saved products); all
activations and their gradients of one layer; the dequantized matrices of one layer; a chunk of the
logits and its gradient; in full fine-tuning a copy of the weights in the compute dtype.
``tests/test_plan_estimate.py`` compares it with the compiler.
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
"""Largest relative error of an estimated peak in the tests."""


def memory(program: TrainStep, plan: StepCounts, length: int) -> Memory:
    """Estimated memory of a step on one device."""
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
    # With accumulation, a sum of gradients beside those of one micro-batch.
    gradients = device_bytes(job.trainable) * (1 if accumulation == 1 else 2)
    heads, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    inner = c.intermediate_size
    if c.experts is not None:
        inner = c.experts.per_token * c.experts.intermediate_size + (c.experts.shared_size or 0)
    split = (3 * heads + 2 * keys + 4 * inner) / tensor
    layer = tokens * width * (6 * c.hidden_size + split)
    layers = c.num_hidden_layers
    products = 2 * heads + 2 * keys + 2 * inner  # saved outputs, see jlora.ops.remat
    per_layer = 0 if job.model.gradient_checkpointing == OFFLOAD else c.hidden_size
    if not job.model.gradient_checkpointing:
        per_layer += c.hidden_size + products / tensor
    activations = layers * tokens * width * per_layer + layer
    logits = 2 * 4 * min(tokens * c.num_outputs, CHUNK_ELEMENTS) / tensor
    return round(gradients + activations + logits + _dense(job, width))


def _dense(job: Job, width: int) -> float:
    """Bytes of temporary copies of weights: dequantized, gathered or cast."""
    if job.config.lora is None:
        return sum(
            width * math.prod(leaf.sharding.shard_shape(leaf.shape))
            for leaf in jax.tree.leaves(job.trainable)
        )
    leaves = jax.tree.leaves(job.base, is_leaf=is_quantized)
    stacked = [_one_layer(leaf) for leaf in leaves if is_quantized(leaf) or len(leaf.shape) > 2]
    gathered = job.mesh.shape["fsdp"] > 1
    quantized = [_one_layer(leaf) for leaf in leaves if is_quantized(leaf)]
    sizes = sorted(stacked if gathered else quantized, reverse=True)
    return width * sum(sizes[:2]) / job.mesh.shape["tensor"]


def _one_layer(leaf: Any) -> int:
    return math.prod(leaf.shape[-2:])
