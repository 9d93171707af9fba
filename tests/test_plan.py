"""What ``plan`` says, against the run's own arrays, the compiler, arithmetic, and itself."""

import functools
import gc
import json
import math
import re
import shutil
import threading
import time
from unittest import mock

import jax
import numpy as np
import pytest
from tiny_runs import OFF, write_rows

import jlora
from jlora import cli, config, train
from jlora.distributed import sharding
from jlora.errors import ConfigError
from jlora.io.hf.read import LoadingCancelledError
from jlora.plan import flops, hlo, target
from jlora.plan.forecast import Rows, forecast
from jlora.run import batches
from jlora.run.abstract_job import abstract_job
from jlora.run.header import tree_bytes
from jlora.run.job import open_tokenizer
from jlora.run.open_job import open_job
from jlora.run.train_step import TrainStep
from jlora.ui.metrics_log import MetricsLog

HERE = target.Target()
QLORA = {"quantization": {"load_in_4bit": True, "block_size": 32}}
CASES = {
    "LoRA": ({}, 1),
    "QLoRA, fsdp and tensor": ({**QLORA, "mesh": {"fsdp": 2, "tensor": 2}}, 4),
    "in full, fsdp": ({"lora": None, "mesh": {"data": 1, "fsdp": 2}}, 2),
    "PiSSA, paged, data": (
        {"lora": {"init_lora_weights": "pissa"}, "train": {"optim": "paged_adamw_32bit"}},
        2,
    ),
    "8 bits, fp16, LoRA-FA, LoRA+": (
        {"train": {"optim": "adamw_8bit", "fp16": True, "lorafa": True, "loraplus_lr_ratio": 4.0}},
        1,
    ),
}


@pytest.fixture
def here():
    """optax does not promote strictly."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def load(place, *overrides, **sections):
    return config.load(place.write(**sections), [OFF, *overrides])


def opened(settings, devices):
    """The job of a run, loaded, on the first devices."""
    mesh = functools.partial(sharding.make_mesh, devices=jax.devices()[:devices])
    with mock.patch.object(sharding, "make_mesh", mesh):
        return open_job(settings, open_tokenizer(settings), trained=False)


def runs_as_planned(settings, devices):
    """Metrics of a step that was compiled from shapes and is given a run's own arrays."""
    tokenizer = open_tokenizer(settings)
    rows = batches.prepare_rows(settings, tokenizer, "train")
    mesh = sharding.make_mesh(settings.mesh, jax.devices()[:devices])
    described = abstract_job(config=settings, tokenizer=tokenizer, mesh=mesh)
    plan = batches.count_steps(settings, described.mesh, rows)
    compiled = TrainStep.of(described, plan, rows.length).compile()

    job = opened(settings, devices)
    assert jax.tree.structure(job.trainable) == jax.tree.structure(described.trainable)
    state = TrainStep.of(job, plan, rows.length).init_state(job.trainable)
    own = [(p, p.order(plan.rows_per_step, 0)) for p in batches.parts(rows, job.adapters)]
    if job.adapters:
        batch = batches.batches_at(job.mesh, own, plan.accumulation)(0)
    else:
        batch = batches.batch_at(job.mesh, *own[0], plan.accumulation)(0)
    for like, real in ((described.frozen, job.frozen), (described.trainable, job.trainable)):
        for a, b in zip(jax.tree.leaves(like), jax.tree.leaves(real), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert a.sharding.is_equivalent_to(b.sharding, b.ndim)
    state, _ = compiled(state, job.frozen, batch)  # raises where shapes or places differ
    _, metrics = compiled(state, job.frozen, batch)
    return metrics


@pytest.mark.parametrize("case", CASES)
def test_the_planned_step_is_the_runs(place, here, case):
    sections, devices = CASES[case]
    metrics = runs_as_planned(load(place, **sections), devices)
    assert np.isfinite(metrics["loss"]) and metrics["finite"]


def test_so_it_is_of_several_adapters(place, here):
    rows = {"path": str(place.rows), "format": "messages"}
    train = [rows | {"adapter": "one"}, rows | {"adapter": "two"}]
    settings = load(place, data={"train": train, "eval": []}, evaluate={"samples": 0})
    assert runs_as_planned(settings, 2)["loss"].shape == (2,)


LABELS = [{"text": f"a text, number {n}", "label": "odd" if n % 2 else "even"} for n in range(40)]


def classifying(place, **sections):
    """A run on rows with classes."""
    from jlora.run.label_names import with_label_names

    rows = write_rows(place.folder / "labels.jsonl", LABELS)
    source = [{"path": str(rows), "format": "classification"}]
    settings = load(
        place,
        data={"train": source, "eval": []},
        lora={"task_type": "SEQ_CLS"},
        evaluate={"samples": 0},
        **sections,
    )
    return with_label_names(settings)[0]


def test_so_it_is_of_a_classifier(place, here):
    settings = classifying(place)
    assert np.isfinite(runs_as_planned(settings, 1)["loss"])


@pytest.fixture
def packed(place):
    """The base, packed: a folder."""
    folder = place.folder / "packed"
    file = place.write(**{**QLORA, "quantize": {"output_dir": str(folder)}})
    assert cli.main("quantize", [str(file)]) == 0
    return str(folder)


def test_so_it_is_of_a_folder_that_came_packed(place, here, packed):
    settings = load(place, model={"name_or_path": packed})
    assert np.isfinite(runs_as_planned(settings, 1)["loss"])


def test_so_it_is_of_a_classifier_on_one(place, here, packed):
    """Its head is in no file."""
    settings = classifying(place, model={"name_or_path": packed})
    assert np.isfinite(runs_as_planned(settings, 1)["loss"])


@pytest.mark.parametrize("kind", [True, "olora"])
def test_so_it_is_of_an_adapter_that_goes_on(place, here, kind):
    """Of PEFT's olora the base's values are needed, and described is what comes of them."""
    _, params = jlora.load_pretrained(str(place.base), dtype="float32")
    plain = jlora.LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
    folder = place.folder / "before"
    jlora.save_adapter(folder, jlora.init_adapter(jax.random.key(0), params, plain))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": kind}))
    settings = load(place, lora={"init_from": str(folder)})
    assert np.isfinite(runs_as_planned(settings, 1)["loss"])
    assert (opened(settings, 1).initial is None) == (kind is True)


def looked(settings, devices, rows=None, **more):
    rows = rows or Rows(64)
    return forecast(settings, None, rows, HERE, jax.devices()[:devices], **more)


def test_memory_is_the_compilers(place, here):
    """Parts by hand; the sum is what XLA says."""
    result = looked(load(place, **QLORA, mesh={"data": 1, "fsdp": 2}), 2)
    settings = result.config
    job = opened(settings, 2)
    program = TrainStep.of(job, result.plan, 64)
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
    assert got.batch == 4 * 4 * 2 * 2 * 64  # arrays of int32, accumulated, rows, tokens
    assert got.temporaries == stats.temp_size_in_bytes and got.padding == 0
    assert result.state_bytes == tree_bytes(state)


STOPPING = {"early_stopping_patience": 3}


@pytest.mark.parametrize(
    ("sections", "resumed"),
    [
        ({"lora": {"r": 64}}, False),
        ({"lora": {"r": 64}, "train": STOPPING}, True),
        ({"lora": None}, False),
    ],
    ids=["LoRA", "LoRA, early stopping, resumed", "full"],
)
def test_between_steps_a_run_holds_what_is_planned(place, here, monkeypatch, sections, resumed):
    """No second copy of what is trained: all buffers that are alive, at every line of the log."""
    if resumed:  # from step 6, when early stopping has its tree
        place.run(**sections)
        shutil.rmtree(place.output / "checkpoints" / "8")
    said = looked(load(place, **sections), 1, whole=False).memory
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


def test_paged_moments_are_the_hosts(place, here):
    plain = looked(load(place), 1, whole=False)
    paged = looked(load(place, train={"optim": "paged_adamw_32bit"}), 1, whole=False)
    moved = 2 * tree_bytes(plain.job.trainable)
    assert plain.memory.optimizer - paged.memory.optimizer == moved


@pytest.mark.parametrize("remat", [True, False])
def test_flops_are_four_for_a_frozen_parameter_and_attention(place, here, remat):
    """By hand, for a llama: 2 forward, 2 for the inputs' gradients, what is recomputed again.

    Without checkpointing that is the scores.
    """
    settings = load(
        place, model={"attention": "reference"}, train={"gradient_checkpointing": remat}
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


def test_a_loop_counts_as_often_as_it_runs():
    def step(x, w):
        def layer(x, w):
            return jax.lax.map(lambda y: y @ w, x), None

        return jax.lax.scan(layer, x, w)[0]

    like = (
        jax.ShapeDtypeStruct((3, 8, 16), np.float32),
        jax.ShapeDtypeStruct((5, 16, 16), np.float32),
    )
    compiled = jax.jit(step).lower(*like).compile()
    work = hlo.work_of(compiled.as_text())
    assert work.flops == 5 * 3 * 2 * 8 * 16 * 16
    least = 4 * (5 * 16 * 16 + 5 * 2 * 3 * 8 * 16)  # every matrix once, rows in and out
    assert least <= work.bytes <= 6 * least


STARTS = {
    "(bf16[32,64], bf16[32,64]{LAYOUT}, u32[]) copy-start(%stack)": 2 * 32 * 64,
    "((bf16[32,64]{LAYOUT}, s32[], s32[]), bf16[1,64], u32[]) "
    "dynamic-slice-start(%stack, %at, %at)": 2 * 64,
    "((bf16[32,64]{LAYOUT}, bf16[1,64], s32[]), bf16[32,64]{LAYOUT}, u32[]) "
    "dynamic-update-slice-start(%stack, %row, %at, %at)": 2 * 64,
}
"""Operations on a stack that start, and what they read or write on their other side."""
MEMORIES = {"1,0": 2, "1,0:S(5)": 1, "1,0:T(8,128)(2,1)S(1)": 1}
"""Layouts of a stack in the device's memory, the host's and a TPU's VMEM: how many sides count."""


@pytest.mark.parametrize("layout", MEMORIES)
@pytest.mark.parametrize("line", STARTS)
def test_what_starts_early_counts_once_and_in_the_devices_memory(line, layout):
    text = f"""HloModule m

ENTRY %main (stack: bf16[32,64], row: bf16[1,64], at: s32[]) -> bf16[32,64] {{
  %stack = bf16[32,64]{{{layout}}} parameter(0)
  %row = bf16[1,64]{{1,0}} parameter(1)
  %at = s32[] parameter(2)
  ROOT %start = {line.replace("LAYOUT", layout)}
}}
"""
    work = hlo.work_of(text)
    assert work.bytes == MEMORIES[layout] * STARTS[line] and not work.flops


@pytest.mark.parametrize("layout", MEMORIES)
def test_an_update_on_its_way_counts_as_the_update(layout):
    """As activations go to the host: the stack they are written into is not read or written."""
    stack = f"bf16[32,64]{{{layout}}}"
    text = f"""HloModule m

%update (stack: bf16[32,64], row: bf16[1,64], at: s32[]) -> bf16[32,64] {{
  %stack = {stack} parameter(0)
  %row = bf16[1,64]{{1,0}} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %new = {stack} dynamic-update-slice(%stack, %row, %at, %zero)
}}

ENTRY %main (stack: bf16[32,64], row: bf16[1,64], at: s32[]) -> bf16[32,64] {{
  %stack = {stack} parameter(0)
  %row = bf16[1,64]{{1,0}} parameter(1)
  %at = s32[] parameter(2)
  %start = (({stack}, bf16[1,64], s32[]), {stack}, u32[]) async-start(%stack, %row, %at), calls=%update
  ROOT %done = {stack} async-done(%start)
}}
"""  # noqa: E501
    assert hlo.work_of(text).bytes == MEMORIES[layout] * 2 * 64


def test_a_slice_in_another_layout_counts_as_a_slice():
    """As TPUs read a layer's codes: what lays them out anew is a fusion within the fusion."""
    text = """HloModule m

%other (given: u8[32,64,128]) -> u8[32,64,128] {
  %given = u8[32,64,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %copy = u8[32,64,128]{2,1,0:T(8,128)(4,1)} copy(%given)
}

%taken (stack: u8[32,64,128], at: s32[]) -> u8[1,64,128] {
  %stack.1 = u8[32,64,128]{2,1,0:T(8,128)(4,1)} parameter(0)
  %at.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = u8[1,64,128]{2,1,0} dynamic-slice(%stack.1, %at.1, %zero, %zero), dynamic_slice_sizes={1,64,128}
}

%fused (at: s32[], stack: u8[32,64,128]) -> bf16[1,64,128] {
  %at.2 = s32[] parameter(0)
  %stack.2 = u8[32,64,128]{2,1,0:T(32,128)(4,1)} parameter(1)
  %again = u8[32,64,128]{2,1,0:T(8,128)(4,1)} fusion(%stack.2), kind=kLoop, calls=%other
  %layer = u8[1,64,128]{2,1,0} fusion(%again, %at.2), kind=kLoop, calls=%taken
  ROOT %wide = bf16[1,64,128]{2,1,0} convert(%layer)
}

ENTRY %main (stack: u8[32,64,128], at: s32[]) -> bf16[1,64,128] {
  %stack.3 = u8[32,64,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  %at.3 = s32[] parameter(1)
  ROOT %values = bf16[1,64,128]{2,1,0} fusion(%at.3, %stack.3), kind=kLoop, calls=%fused
}
"""  # noqa: E501
    assert hlo.work_of(text).bytes == 4 + (1 + 2) * 64 * 128


def test_an_exchange_that_goes_on_beside_fusions_counts_once():
    """As TPUs have it: each of the fusions from its start to its end names it."""
    gathering = """ (x: f32[4,8]) -> f32[16,8] {
  %x = f32[4,8]{1,0} parameter(0)
  ROOT %gathered = f32[16,8]{1,0} all-gather(%x), replica_groups={{0,1,2,3}}, dimensions={0}
}
"""
    names = ("fused_computation.1", "async_collective_fusion.1", "fused_computation.2")
    text = "HloModule m, num_partitions=4\n\n" + "\n".join(f"%{n}{gathering}" for n in names)
    text += f"""
ENTRY %main (x: f32[4,8]) -> f32[16,8] {{
  %x.1 = f32[4,8]{{1,0}} parameter(0)
  %async-collective-start.1 = f32[16,8]{{1,0}} fusion(%x.1), kind=kCustom, calls=%{names[0]}
  %fusion.1 = f32[16,8]{{1,0}} fusion(%x.1), kind=kCustom, calls=%{names[1]}
  ROOT %async-collective-done.1 = f32[16,8]{{1,0}} fusion(%x.1), kind=kCustom, calls=%{names[2]}
}}
"""
    assert hlo.work_of(text).collectives == {("all-gather", 4): (1, 4 * 8 * 4)}


@pytest.mark.parametrize(
    ("size", "window", "options"),
    [
        ((1,), (8,), {"padding": [(7, 7)]}),  # as XLA writes x @ w with heads, for TPUs
        ((9, 11), (3, 2), {"padding": "SAME", "window_strides": (2, 1)}),
        ((9, 11), (3, 2), {"padding": [(2, 0), (1, 3)], "rhs_dilation": (2, 1)}),
        ((5,), (4,), {"padding": [(3, 3)], "lhs_dilation": (2,)}),
        ((12,), (4,), {"padding": "VALID", "feature_group_count": 2}),
    ],
)
def test_a_convolution_counts_what_its_windows_see(size, window, options):
    """Against XLA's own account, which is right where there is no loop."""
    groups = options.get("feature_group_count", 1)
    options = {"window_strides": (1,) * len(size)} | options
    x, w = np.ones((3, 6, *size), np.float32), np.ones((8, 6 // groups, *window), np.float32)
    convolved = jax.jit(functools.partial(jax.lax.conv_general_dilated, **options))
    lowered = convolved.lower(x, w)
    text = re.sub(r"\b(\w+\.\d+)\b", r"%\1", lowered.compiler_ir("hlo").as_hlo_text())
    flops = hlo.work_of(text).flops
    assert flops == lowered.cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1},{2,3}}", 2),
        ("[2,4]<=[8]", 4),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_0'}", 4),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", 8),
        ("mesh['axis_0'=8] {'axis_0':(1)2}", 2),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_2'}", 2),
        ("{}", 8),
    ],
)
def test_groups_of_devices_are_read_however_they_are_written(groups, devices):
    text = f"""HloModule m, num_partitions=8

ENTRY %main (x: f32[16]) -> f32[16] {{
  %x = f32[16]{{0}} parameter(0)
  ROOT %r = f32[16]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add
}}

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}}
"""
    (found,) = hlo.work_of(text).exchanges()
    assert (found.kind, found.group, found.count, found.bytes) == ("all-reduce", devices, 1, 64)
    assert found.sent == pytest.approx(2 * 64 * (devices - 1) / devices)


@pytest.mark.parametrize("window", [None, 8])
def test_pairs_that_are_seen(window):
    windows = (window, None)
    distance = np.arange(20)[:, None] - np.arange(20)
    each = [(distance >= 0) & (distance < (w or 20)) for w in windows]
    assert flops.seen(windows, 20) == pytest.approx(np.mean(each))


def test_data_parallel_devices_exchange_gradients_only(place, here):
    result = looked(load(place), 4)
    reduced = max(result.work.collectives, key=lambda c: c.bytes)
    assert (reduced.kind, reduced.group) == ("all-reduce", 4)
    gradients = 2 * tree_bytes(result.job.trainable)  # of two micro-batches, each for itself
    assert gradients <= reduced.bytes <= 1.01 * gradients + 1024
    others = sum(c.bytes for c in result.work.collectives if c is not reduced)
    assert others < 0.1 * gradients
    assert reduced.sent == pytest.approx(2 * 3 / 4 * reduced.bytes)


def test_fsdp_gathers_every_layer_when_it_is_used(place, here):
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


def plan(place, capsys, *arguments, **sections):
    code = cli.main("plan", [str(place.write(**sections)), OFF, *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_says_what_it_found(place, here, capsys):
    code, out, _ = plan(place, capsys, "train.max_steps=-1", "train.num_train_epochs=2")
    assert code == 0
    assert "8 × cpu" in out and "fits: " in out and "ESTIMATED" not in out
    rows = batches.prepare_rows(load(place), open_tokenizer(load(place)), "train")
    steps = math.ceil(len(rows.packed) / (2 * 2 * 8))
    assert f"{2 * steps} ({steps} an epoch of {rows.tokens} tokens" in out.replace(",", "")


def test_json_holds_the_same(place, here, capsys):
    code, out, _ = plan(place, capsys, "--json")
    got = json.loads(out)
    assert code == 0 and got["fits"] and got["figures"] == "compiled" and got["devices"] == 8
    direct = looked(load(place), 8, Rows(got["batch"]["length"]))
    assert got["memory"]["peak"] == direct.memory.peak
    assert got["work"]["flops"] == direct.work.flops
    assert got["batch"]["rows_per_step"] == 2 * 2 * 8 and got["steps"] == 8
    assert got["checkpoint"] == {"bytes": direct.state_bytes, "kept": 3}


def test_no_weight_is_read(place, here, capsys):
    (place.folder / "bare").mkdir()
    text = (place.base / "config.json").read_text()
    (place.folder / "bare" / "config.json").write_text(text)
    code, out, _ = plan(place, capsys, "--json", model={"name_or_path": str(place.folder / "bare")})
    got = json.loads(out)
    assert code == 0 and got["steps"] == 8 and got["steps_per_epoch"] is None


@pytest.mark.slow
def test_what_does_not_fit_exits_2_with_remedies_that_hold(place, here, capsys, monkeypatch):
    """The effect of every change is what ``plan`` says of the changed settings."""
    sections = {"train": {"gradient_checkpointing": False, "per_device_train_batch_size": 4}}
    _, out, _ = plan(place, capsys, "--json", **sections)
    peak = json.loads(out)["memory"]["peak"]
    monkeypatch.setattr(target, "main_memory", lambda: 8 * (peak - 1))
    code, out, err = plan(place, capsys, "--json", **sections)
    got = json.loads(out)
    assert code == 2 and not got["fits"] and got["memory"]["peak"] == peak
    assert "does not fit" in err and "fix: one of these" in err
    named = [" ".join(one["settings"]) for one in got["remedies"]]
    order = [
        "train.gradient_checkpointing=true",
        "train.per_device_train_batch_size=1 train.gradient_accumulation_steps=8",
        "mesh.fsdp=-1 mesh.data=1",
        "train.optim=paged_adamw_32bit",
        "train.optim=adamw_8bit",
        "quantization.load_in_4bit=true",
    ]
    assert named == order
    for one in got["remedies"][1:2]:
        _, out, _ = plan(place, capsys, "--json", *one["settings"], **sections)
        again = json.loads(out)
        assert again["memory"]["peak"] == one["peak"] and again["fits"] == one["fits"]
    assert got["remedies"][1]["fits"]
    assert all(one["fits"] == (one["peak"] < peak) for one in got["remedies"])
    assert all(setting in err for one in named for setting in one.split())


def test_training_refuses_what_does_not_fit_unless_told(place, monkeypatch, here):
    place.settings_for_loss()
    peak = looked(load(place), 1, whole=False).memory.peak
    monkeypatch.setattr(target, "main_memory", lambda: peak - 1)
    with pytest.raises(ConfigError, match="does not fit") as caught:
        place.run()
    assert caught.value.exit_code == 2
    assert "train.check_memory=false" in caught.value.fix
    assert "quantization.load_in_4bit=true" in caught.value.fix
    assert not (place.output / "metrics.jsonl").exists()
    place.run(train={"check_memory": False, "max_steps": 1, "logging_steps": 1})
    assert len(place.losses()) == 1


def out_of_memory(*_, **__):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")


def test_weights_load_while_the_step_compiles(place, monkeypatch):
    """Neither ends before the other has begun."""
    place.settings_for_loss()
    loading, compiling = threading.Event(), threading.Event()
    compile_step, load = TrainStep.compile, train.open_job

    def compile_late(program):
        compiling.set()
        assert loading.wait(60)
        return compile_step(program)

    def load_late(*arguments, **more):
        loading.set()
        assert compiling.wait(60)
        return load(*arguments, **more)

    monkeypatch.setattr(TrainStep, "compile", compile_late)
    monkeypatch.setattr(train, "open_job", load_late)
    place.run(train={"max_steps": 1, "logging_steps": 1})
    assert len(place.losses()) == 1


@pytest.mark.parametrize("reports", [True, False], ids=["reading on", "memory full"])
def test_a_refusal_ends_the_loading(place, monkeypatch, here, reports):
    """Loading is cancelled between two tensors; what runs out of memory is told as the refusal."""
    place.settings_for_loss()
    peak = looked(load(place), 1, whole=False).memory.peak
    monkeypatch.setattr(target, "main_memory", lambda: peak - 1)

    def read(*_, cancel, **__):
        for _ in range(6000 if reports else 0):
            if cancel():
                raise LoadingCancelledError
            time.sleep(0.01)
        assert not reports, "nothing ended the loading"
        out_of_memory()

    monkeypatch.setattr(train, "open_job", read)
    with pytest.raises(ConfigError, match="does not fit"):
        place.run()


def test_a_fault_of_the_compiler_ends_the_loading_and_is_told(place, monkeypatch):
    place.settings_for_loss()

    def fail(_):
        raise jax.errors.JaxRuntimeError("INTERNAL: the compiler failed")

    def read(*_, cancel, **__):
        while not cancel():
            time.sleep(0.01)
        raise LoadingCancelledError

    monkeypatch.setattr(TrainStep, "compile", fail)
    monkeypatch.setattr(train, "open_job", read)
    with pytest.raises(jax.errors.JaxRuntimeError, match="the compiler failed"):
        place.run()


def test_a_fault_in_loading_is_told_as_what_it_is(place, monkeypatch):
    """Also when memory is full and the step itself would fit."""
    place.settings_for_loss()
    monkeypatch.setattr(train, "open_job", out_of_memory)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        place.run()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("h20x8", "did you mean 'h200'"),
        ("gpu", "one of rtx4090"),
        ("h200x16", "one node has up to 8"),
        ("v5e-3", "a slice has 1, 4, 8"),
    ],
)
def test_unknown_targets_are_refused(place, capsys, name, said):
    code, _, err = plan(place, capsys, "--target", name)
    assert code == 2 and said in err and f"--target {name}" in err


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [("h200", "h200", 1), ("a100-80x4", "a100-80", 4), ("a100-80", "a100-80", 1),
     ("v5e-16", "v5e", 16), ("rtx4090x1", "rtx4090", 1)],
)  # fmt: skip
def test_targets_are_read(name, kind, count):
    aim = target.parse(name)
    assert (aim.hardware.name, aim.count) == (kind, count)
    assert target.parse(aim.name) == aim
