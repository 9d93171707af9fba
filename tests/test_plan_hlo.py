"""FLOPs, bytes and exchanges read from a compiled program's text."""

import functools
import re

import jax
import numpy as np
import pytest

from jlora.plan import hlo


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
