"""Memory, FLOPs and exchanges of a forecast against arrays, the compiler and arithmetic."""

import gc
import math
import shutil

import jax
import numpy as np
import pytest
from tiny_plans import QLORA, load, looked, opened

from jlora.plan import flops
from jlora.run.header import tree_bytes
from jlora.run.train_step import TrainStep
from jlora.ui.metrics_log import MetricsLog


def test_memory_is_the_compilers(place, standard_promotion):
    """Parts by hand; the sum is what XLA says."""
    result = looked(load(place, **QLORA, mesh={"data": 1, "fsdp": 2}), 2)
    settings = result.config
    job = opened(settings, 2)
    program = TrainStep.of(job, result.plan, 64, documents=1)
    stats = program.compile().memory_analysis()
    got = result.memory
    assert got.peak == (
        stats.argument_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
    )
    first = jax.devices()[0]

    def on_first(tree):
        shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
        return sum(s.data.nbytes for s in shards if s.device == first)

    state = program.init_state(job.trainable)
    assert got.base == on_first(job.base) < tree_bytes(job.base)
    assert got.adapter == on_first(state.trainable)
    assert got.optimizer == on_first((state.opt_state, state.step))
    # Arrays of int32, and segment ids of one byte; accumulated, rows, tokens.
    assert got.batch == (3 * 4 + 1) * 2 * 2 * 64
    assert got.temporaries == stats.temp_size_in_bytes and got.padding == 0
    assert result.state_bytes == tree_bytes(state)


STOPPING = {"early_stopping_patience": 3}


@pytest.mark.parametrize(
    ("sections", "resumed"),
    [
        pytest.param({"lora": {"r": 64}}, False, marks=pytest.mark.slow),
        ({"lora": {"r": 64}, "train": STOPPING}, True),
        pytest.param({"lora": None}, False, marks=pytest.mark.slow),
    ],
    ids=["LoRA", "LoRA, early stopping, resumed", "full"],
)
def test_between_steps_a_run_holds_what_is_planned(
    place, standard_promotion, monkeypatch, sections, resumed
):
    """No second copy of what is trained: all buffers that are alive, at every line of the log."""
    if resumed:  # from step 6, when early stopping has its tree
        place.run(**sections)
        shutil.rmtree(place.output / "checkpoints" / "8")
    said = looked(load(place, **sections), 1, count_work=False).memory
    assert said.best == (said.adapter if "train" in sections else 0) and said.host == 0
    planned = said.base + said.adapter + said.optimizer + said.best
    seen, write = [], MetricsLog.write

    def alive():
        gc.collect()
        shards = [s.data for array in jax.live_arrays() for s in array.addressable_shards]
        return sum({one.unsafe_buffer_pointer(): one.nbytes for one in shards}.values())

    def look(log, step, **values):
        seen.append(alive() - before)
        write(log, step, **values)

    before = alive()
    monkeypatch.setattr(MetricsLog, "write", look)
    place.run(**sections)
    slack = 4 * said.batch  # those that are made ahead, and metrics
    assert slack < said.adapter / 4
    assert seen and all(planned <= size <= planned + slack for size in seen), (planned, seen)


def test_paged_moments_are_the_hosts(place, standard_promotion):
    plain = looked(load(place), 1, count_work=False)
    paged = looked(load(place, train={"optim": "paged_adamw_32bit"}), 1, count_work=False)
    moved = 2 * tree_bytes(plain.job.trainable)
    assert plain.memory.optimizer - paged.memory.optimizer == moved


@pytest.mark.parametrize("remat", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_flops_are_four_for_a_frozen_parameter_and_attention(place, standard_promotion, remat):
    """By hand, for a llama: 2 forward, 2 for the inputs' gradients, what is recomputed again.

    Without checkpointing that is the scores.
    """
    settings = load(
        place,
        model={"attention": "reference"},
        lora={"target_modules": "all-linear"},
        train={"gradient_checkpointing": remat},
    )
    result = looked(settings, 1)
    width, inner, keys, layers, vocabulary, r, length = 32, 64, 16, 2, 336, 4, 64
    shapes = 2 * [(width, width)] + 2 * [(width, keys)] + 2 * [(width, inner)]  # all but down_proj
    down = inner * width
    frozen = layers * (sum(a * b for a, b in shapes) + down)
    adapter = layers * r * (sum(a + b for a, b in shapes) + inner + width)
    again = 2 * (frozen - layers * down + adapter - layers * r * width) if remat else 0
    products = 4 * frozen + 6 * adapter + 4 * width * vocabulary + again
    attention = (12 + (4 if remat else 2)) * layers * width * length * (length + 1) / (2 * length)
    tokens = result.tokens_per_step
    assert tokens == 4 * length
    assert result.work.flops_attention == pytest.approx(tokens * attention)
    assert result.work.flops == pytest.approx(tokens * (products + attention), rel=0.05)
    # And by the compiled step, in which attention is not causal: all pairs are computed.
    whole = result.work.flops + result.work.flops_attention * (2 * length / (length + 1) - 1)
    assert result.work.flops_compiled == pytest.approx(whole, rel=0.05)


@pytest.mark.parametrize("window", [None, 8])
def test_pairs_that_are_seen(window):
    windows = (window, None)
    distance = np.arange(20)[:, None] - np.arange(20)
    each = [(distance >= 0) & (distance < (w or 20)) for w in windows]
    assert flops.mean_visible(windows, 20) == pytest.approx(np.mean(each))


def test_data_parallel_devices_exchange_gradients_only(place, standard_promotion):
    result = looked(load(place), 4)
    reduced = max(result.work.collectives, key=lambda c: c.bytes)
    assert (reduced.kind, reduced.group) == ("all-reduce", 4)
    gradients = 2 * tree_bytes(result.job.trainable)  # of two micro-batches, each for itself
    assert gradients <= reduced.bytes <= 1.01 * gradients + 1024
    others = sum(c.bytes for c in result.work.collectives if c is not reduced)
    assert others < 0.1 * gradients
    assert reduced.sent == pytest.approx(2 * 3 / 4 * reduced.bytes)


def test_fsdp_gathers_every_layer_when_it_is_used(place, standard_promotion):
    result = looked(load(place, mesh={"data": 1, "fsdp": 4}), 4)
    gathered = sum(c.bytes for c in result.work.collectives if c.kind == "all-gather")
    layers = result.job.base["model"]["layers"]
    part = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * 4
        for x in jax.tree.leaves(layers)
        if len(x.shape) == 3
    )
    # Forward and backward, in each of two micro-batches.
    assert 3 * part <= gathered <= 6 * part
