"""Formats a forecast as text for the console and as JSON."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from jlora import data
from jlora.config import Config
from jlora.plan.forecast import Forecast, Rows
from jlora.plan.remedies import Remedy
from jlora.run.batches import steps_per_epoch
from jlora.run.header import checkpointing_text, count_parameters, size_text, sizes
from jlora.ui.console import HeaderTable, Section, duration

UPPER_BOUND = "at most: all of the device's peak rate, nothing waiting for anything"


def rows_of(config: Config, prepared: data.Prepared) -> Rows:
    """Length and number of prepared rows."""
    steps = functools.partial(steps_per_epoch, config, prepared)
    return Rows(
        prepared.length,
        steps,
        prepared.tokens,
        prepared.fill,
        documents=prepared.packed.documents,
    )


def verdict(result: Forecast) -> str:
    """One sentence that says whether the run fits."""
    limit = f"{size_text(result.limit.limit)} ({result.limit.source})"
    if result.memory is None:
        return f"does not fit into {limit}: {result.refused}"
    peak, how = result.memory.peak, "" if result.compiled else "an estimated "
    if result.fits:
        return f"fits: {how}{size_text(peak)} of {limit}"
    return f"does not fit: {how}{size_text(peak)} on each device, where there are {limit}"


def as_sections(result: Forecast) -> dict[str, Section]:
    """Sections for ``Console.header``."""
    sections: dict[str, Section] = {"run": _run(result), "memory": _memory(result)}
    if result.work is not None:
        sections["step"] = _step(result)
        if result.work.collectives:
            sections["exchanges"] = _exchanges(result)
    sections["time"], sections["disk"] = _time(result), _disk(result)
    return sections


def _run(result: Forecast) -> dict[str, Any]:
    config, plan, mesh = result.config, result.plan, result.job.mesh
    device = mesh.devices.flat[0].device_kind if result.hardware is None else result.hardware.title
    size_rows = sizes(config, result.job.base, result.job.trainable, result.job.initial)
    method = size_rows["method"]
    rows = {
        "base": config.model.name_or_path,
        "method": f"{method}: {size_rows['trainable']}",
        "devices": f"{mesh.size} × {device}{'' if result.target.hardware is None else ', absent'}",
        "mesh": " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
        "batch": f"{plan.rows_per_step} rows of {result.rows.length} tokens a step "
        f"({config.train.per_device_train_batch_size} a device, {plan.accumulation} accumulated)",
        "gradient checkpointing": checkpointing_text(config.train),
    }
    if result.compiled:
        rows["figures"] = f"of the compiled step, {result.compile_seconds:.1f} s to compile"
    else:
        rows["figures"] = "ESTIMATED: JAX's plugin for the device is not installed ("
        rows["figures"] += f"pip install jlora[plan-{_extra(result)}])"
    return rows


def _extra(result: Forecast) -> str:
    return "tpu" if result.hardware and result.hardware.platform == "tpu" else "gpu"


def _memory(result: Forecast) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    if result.memory is not None:
        rows["peak"] = f"{size_text(result.memory.peak)} on each device"
        for name, size in dataclasses.asdict(result.memory).items():
            if size and name != "host":
                rows[f"  {name}"] = size_text(size)
        if result.memory.host:
            rows["on the host"] = f"{size_text(result.memory.host)} for each device"
    rows["verdict"] = verdict(result)
    return rows


def _step(result: Forecast) -> dict[str, Any]:
    work = result.work
    assert work is not None
    trained = count_parameters(result.job.trainable) + count_parameters(result.job.base)
    tokens = result.tokens_per_step
    rows = {
        "FLOPs": f"{work.flops:.4g} on all devices: "
        f"{work.flops / tokens / trained:.2f} for a token and parameter, "
        f"{work.flops_attention / work.flops:.1%} of them in attention"
    }
    if work.bytes_moved is not None:
        rows["bytes moved"] = f"{size_text(round(work.bytes_moved))} on each device"
    if work.kernels:
        rows["kernels"] = ", ".join(work.kernels)
    return rows


def _exchanges(result: Forecast) -> HeaderTable:
    assert result.work is not None
    rows = [
        (c.kind, c.count, c.group, size_text(c.bytes), size_text(round(c.sent)))
        for c in result.work.collectives or ()
    ]
    return HeaderTable(("kind", "times a step", "devices", "operands", "sent by each"), rows)


def _time(result: Forecast) -> dict[str, Any]:
    bounds, plan = result.seconds(), result.plan
    rows: dict[str, Any] = {}
    if bounds:
        most = max(bounds, key=lambda name: bounds[name])
        seconds = bounds[most]
        all_bounds = ", ".join(f"{name} {value:.3g} s" for name, value in bounds.items())
        rows["a step"] = f"at least {seconds:.3g} s, bound by {most} ({all_bounds})"
        rows["tokens/s"] = f"{result.tokens_per_step / seconds:,.0f} {UPPER_BOUND}"
    else:
        rows["a step"] = "unknown: this device's rates are not in the table"
    if not result.counted:
        rows["steps"] = f"unknown; rows {result.rows.note}".replace("\n", " ")
        return rows
    rows["steps"] = f"{plan.total_steps:,}"
    if result.rows.steps_per_epoch:
        rows["steps"] += f" ({round(plan.steps_per_epoch, 2):,} an epoch of "
        rows["steps"] += f"{result.rows.tokens:,} tokens"
        rows["steps"] += f", rows {result.rows.fill:.0%} full)"
    if bounds:
        rows["the run"] = f"at least {duration(max(bounds.values()) * plan.total_steps)}"
    return rows


def _disk(result: Forecast) -> dict[str, Any]:
    size, count = result.checkpoints
    return {"checkpoints": f"{size_text(size * count)}: {count} of {size_text(size)} at a time"}


def as_json(result: Forecast, remedies: Sequence[Remedy]) -> dict[str, Any]:
    """The output of ``jlora plan --json``, in bytes, seconds and FLOPs."""
    bounds, plan, work = result.seconds(), result.plan, result.work
    slowest = max(bounds.values()) if bounds else None
    size, count = result.checkpoints
    memory = None
    if result.memory is not None:
        memory = {"peak": result.memory.peak, **dataclasses.asdict(result.memory)}
    known = result.rows.steps_per_epoch is not None
    return {
        "target": result.target.name,
        "device": result.job.mesh.devices.flat[0].device_kind
        if result.hardware is None
        else result.hardware.title,
        "devices": result.job.mesh.size,
        "mesh": dict(result.job.mesh.shape),
        "figures": "compiled" if result.compiled else "estimated",
        "compile_seconds": result.compile_seconds,
        "fits": result.fits,
        "refused": result.refused or None,
        "limit": {"bytes": result.limit.limit, "source": result.limit.source},
        "memory": memory,
        "work": None if work is None else dataclasses.asdict(work),
        "batch": {
            "rows_per_step": plan.rows_per_step,
            "accumulation": plan.accumulation,
            "length": result.rows.length,
            "tokens_per_step": result.tokens_per_step,
        },
        "seconds": {**bounds, "step_at_least": slowest},
        "tokens_per_second_at_most": slowest and result.tokens_per_step / slowest,
        "steps": plan.total_steps if result.counted else None,
        "steps_per_epoch": plan.steps_per_epoch if known else None,
        "tokens": result.rows.tokens if known else None,
        "hours_at_least": (slowest and result.counted and slowest * plan.total_steps / 3600)
        or None,
        "checkpoint": {"bytes": size, "kept": count},
        "remedies": [dataclasses.asdict(remedy) for remedy in remedies],
    }
