"""Where jlora's training step spends its time on a CPU, by JAX's profiler.

    python benchmarks/profile_step.py [--method lora,qlora,full]

The steps are those of the headline of ``training_step.py``. The profiler's seconds of every
operation are summed by purpose, which is read from the compiled program's text: the operation's
name in the traced code, its shapes, and what is fused into it. Operations that run at the same time
share the elapsed time. The results also list the longest operations.
"""

from __future__ import annotations

import collections
import glob
import gzip
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import llama
import paired
from tables import GROUPS
from training_step import HEADLINE, flops, jlora_step

STEPS, LONGEST = 3, 40


class Op(NamedTuple):
    """An instruction of a compiled program."""

    text: str
    """Its line in the program, with its shape and its name in the traced code."""
    body: str
    """The operations that are fused into it."""
    inputs: tuple[str, ...]
    """The shapes that it reads."""


def operations(hlo: str) -> dict[str, Op]:
    """The instructions of a compiled program by name."""
    bodies: dict[str, list[str]] = {}
    lines: list[tuple[str, str]] = []
    current: list[str] = []
    for line in hlo.splitlines():
        if opening := re.match(r"(?:ENTRY )?%?([\w.-]+) .*{$", line):
            current = bodies.setdefault(opening[1], [])
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line):
            current.append(line)
            lines.append((found[1], line))
    shapes = {name: shape[1] for name, line in lines if (shape := re.search(r"= (\S+)", line))}
    ops = {}
    for name, line in lines:
        called = re.search(r"calls=%?([\w.-]+)", line)
        inside = "\n".join(bodies.get(called[1], [])) if called else ""
        arguments = re.findall(r"%([\w.-]+)", line.partition("(")[2].partition(")")[0])
        ops[name] = Op(line, inside, tuple(shapes.get(a, "") for a in arguments))
    return ops


def group_of(name: str, op: Op, rank: int | None) -> str:
    """The purpose of an operation: a key of GROUPS."""
    traced = found[1] if (found := re.search(r'op_name="([^"]*)"', op.text)) else ""
    where = traced + op.body
    product = " dot(" in op.text + op.body
    if "jit(head)" in where or f"{llama.VOCAB}]" in op.text:
        return "head"
    if "bhqd" in where or "branch_0_fun/while" in where:  # chunked attention's loops
        return "attention"
    if product:
        ends = [op.text.partition("(")[0], *op.inputs]
        has_rank = rank and any(re.search(rf"[\[,]{rank}[,\]]", shape) for shape in ends)
        return "adapter" if has_rank else "base"
    if "jit(dequantize" in where or "u8[" in op.body or any("u8[" in s for s in op.inputs):
        return "unpack"
    if re.match(r"wrapped_broadcast|copy|.*dynamic-update-slice|dynamic-slice", name):
        return "kept"
    if traced and "features" not in where:
        return "update"
    return "rest"


def profiled(method: str) -> Any:
    """A unit that profiles a few steps: their mean elapsed time, and the seconds by group."""

    def unit() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            dump = f"--xla_dump_to={folder}/hlo --xla_dump_hlo_module_re=train_step"
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {dump}"
            clock = _trace(jlora_step(method, HEADLINE), folder)
            (text,) = glob.glob(f"{folder}/hlo/*train_step*cpu_after_optimizations.txt")
            ops = operations(Path(text).read_text())
            seconds = {name: duration for name, duration in _seconds(folder).items() if name in ops}
        groups: dict[str, float] = dict.fromkeys(GROUPS, 0.0)
        rank = None if method == "full" else HEADLINE["rank"]
        for name, duration in seconds.items():
            groups[group_of(name, ops[name], rank)] += duration
        groups["between"] = clock - sum(groups.values())
        longest = sorted(seconds, key=seconds.__getitem__, reverse=True)[:LONGEST]
        texts = [(seconds[name], ops[name].text.strip()[:300]) for name in longest]
        return {"seconds": clock, "groups": groups, "longest": texts}

    return unit


def _trace(step: Any, folder: str) -> float:
    """Writes the profile of STEPS steps; returns their mean elapsed seconds."""
    import jax

    for _ in range(3):
        step()
    with jax.profiler.trace(folder):
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        return (time.perf_counter() - start) / STEPS


def _seconds(folder: str) -> dict[str, float]:
    """Seconds of every operation per step, from the trace; concurrent ones share the time."""
    (trace,) = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
    with gzip.open(trace) as file:
        events = [e for e in json.load(file)["traceEvents"] if "hlo_op" in e.get("args", {})]
    marks = []  # (time, whether it begins, event's index, operation)
    for which, event in enumerate(events):
        name = event["args"]["hlo_op"]
        if not re.match(r"while|call|conditional", name):  # these contain other operations
            marks.append((event["ts"], True, which, name))
            marks.append((event["ts"] + event["dur"], False, which, name))
    seconds: collections.Counter[str] = collections.Counter()
    running: dict[int, str] = {}
    before = 0.0
    for when, begins, which, name in sorted(marks):
        for operation in running.values():
            seconds[operation] += (when - before) / len(running) / 1e6 / STEPS
        before = when
        if begins:
            running[which] = name
        else:
            running.pop(which)
    return seconds


def main() -> None:
    """Profiles each method in its own process."""
    parser = paired.arguments(__doc__, repeats=1)
    parser.add_argument("--method", default="lora,qlora,full", help="or some of them")
    args = parser.parse_args()
    methods = args.method.split(",")
    points = {
        llama.METHODS[method]: [
            paired.Contestant("jlora", "profile_step:profiled", {"method": method}, fresh=True)
        ]
        for method in methods
    }
    facts = {"flops": {llama.METHODS[method]: flops(method, HEADLINE) for method in methods}}
    paired.compare("profile-step", "method", points, args, grows=False, **facts)


if __name__ == "__main__":
    main()
