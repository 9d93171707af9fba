"""Makes the tables of ``docs/benchmarks.md`` from the JSON in ``benchmarks/results``.

    python benchmarks/tables.py [--check]

The text between ``<!-- table: NAME -->`` and ``<!-- end -->`` is generated from the results of that
name, or by the function of that name in ``TABLES``. ``--check`` changes nothing and fails when the
page differs. Where results are missing, the page says so.

In a table of ``paired.compare`` a figure is a contestant's time divided by jlora's: the ratio of
their medians and, in brackets, the smallest and the largest ratio within a round. Above 1, jlora is
faster. Where other processes used the machine, the ratio of processor time stands beside it.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "benchmarks.md"
TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
BUSY = 0.1
METHODS = ("lora", "qlora", "full")
GROUPS = {
    "base": "products with weights, and of full training's gradients",
    "head": "the head's products and the loss",
    "adapter": "the adapter's products",
    "attention": "attention",
    "unpack": "unpacking NF4",
    "kept": "stacks of what layers keep: zeroed, written, read",
    "update": "clipping and AdamW",
    "rest": "norms, rotations, activations, additions, casts",
    "between": "between operations",
}
"""The groups of operations of ``profile_step.py``, and their names in the table."""


def load(name: str, results: Path = RESULTS) -> dict[str, Any]:
    """The results of a benchmark."""
    return json.loads((results / f"{name}.json").read_text(encoding="utf-8"))


def made(page: str, results: Path = RESULTS) -> str:
    """The page with its tables regenerated."""

    def table(found: re.Match) -> str:
        start, name, end = found.groups()
        try:
            text = TABLES[name](results) if name in TABLES else paired(load(name, results))
        except FileNotFoundError as missing:
            text = f"Not measured yet: there is no `results/{Path(missing.filename).name}`."
        return f"{start}{text}\n{end}"

    return TABLE.sub(table, page)


def paired(result: Mapping[str, Any]) -> str:
    """The table of a result of ``paired.compare``, and the conditions of its run."""
    points = result["points"]
    jlora, *others = points[0]["results"]
    grows = result.get("grows", True)
    # Elapsed time depends on what others used of the machine; processor time much less.
    busy = (
        result["conditions"]["used_by_others"] > BUSY and "processor" in points[0]["results"][jlora]
    )
    head = [result["axis"], *(f"{name} / {jlora}" for name in others)]
    head += [f"{name} / {jlora}, processor" for name in others if busy]
    head += ["memory"] if result.get("memory", True) else []
    head += [f"growth of {jlora}", "of the fastest other"] if grows else []
    rows = []
    for point in points:
        medians = {name: one["median"] for name, one in point["results"].items()}
        peers = result.get("peers", others)
        fastest = min(peers, key=medians.__getitem__)
        row = [str(point["value"])]
        for kind in ("seconds", "processor")[: 1 + busy]:
            row += [ratio(point["results"][name], point["results"][jlora], kind) for name in others]
        if result.get("memory", True):
            memory = {name: one["peak_bytes"] for name, one in point["results"].items()}
            row.append(f"{memory[fastest] / memory[jlora]:.2f}")
        if grows:
            first = points[0]["results"]
            best = min(first[name]["median"] for name in peers)
            row.append(f"{medians[jlora] / first[jlora]['median']:.2f}")
            row.append(f"{medians[fastest] / best:.2f}")
        rows.append(row)
    return f"{markdown(head, rows)}\n\n{conditions(result['conditions'])}"


def ratio(peer: Mapping[str, Any], jlora: Mapping[str, Any], kind: str = "seconds") -> str:
    """The peer's median divided by jlora's, and the range of this ratio over the rounds.

    ``kind`` is ``seconds``, the elapsed time, or ``processor``.
    """
    rounds = [a / b for a, b in zip(peer[kind], jlora[kind], strict=True)]
    middle = peer["median"] / jlora["median"]
    if kind != "seconds":
        middle = statistics.median(peer[kind]) / statistics.median(jlora[kind])
    return f"{short(middle)} ({short(min(rounds))}–{short(max(rounds))})"


def short(value: float) -> str:
    """Two decimals, or three digits for larger and smaller values."""
    return f"{value:.2f}" if 0.1 <= value < 100 else f"{value:.3g}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def conditions(where: Mapping[str, Any]) -> str:
    """The conditions of a run in a few lines."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    settings = "".join(f", {name}={value}" for name, value in where["settings"].items())
    gpu = f", {where['gpu']}" if where["gpu"] else ""
    busy = where["used_by_others"]
    note = f" **Others used {busy:.0%} of the machine.**" if busy > BUSY else ""
    cores = f"{where['cores']} cores"
    if "vectors" in where:
        cores += f" ({', '.join(where['vectors'])})"
    return (
        f"`{where['command']}`, {where['repeats']} rounds, {where['date']}: {where['cpu']}, "
        f"{cores}{gpu}, Python {where['python']}, {versions}{settings}.{note}"
    )


def training_step(results: Path) -> str:
    """The three methods in one table; each was measured in a separate run."""
    every = [load(f"training-step-{method}", results) for method in METHODS]
    joined = {**every[0], "points": [point for one in every for point in one["points"]]}
    table = paired(joined).split("\n\n")[0]
    where = dict.fromkeys(conditions(one["conditions"]) for one in every)  # without repeated lines
    return "\n\n".join([table, *where])


def commands(results: Path) -> str:
    """Seconds from a process's start to its end, and Python's share of it."""
    result = load("startup-commands", results)
    rows = []
    for point in result["points"]:
        cells = [
            f"{one['median']:.2f} s" if (one := point["results"].get(name)) else ""
            for name in ("jlora", "peft")
        ]
        rows.append([point["value"], *cells])
    return f"{markdown(['command', 'jlora', 'peft'], rows)}\n\n{conditions(result['conditions'])}"


def rates(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The results of ``limits.py``: case → framework → FLOPs, or bytes, per second."""
    return {
        point["value"]: {
            name: sum(one["facts"].values()) / one["median"]
            for name, one in point["results"].items()
        }
        for point in result["points"]
    }


def limits(results: Path) -> str:
    """The machine's rates by framework."""
    result = load("limits", results)
    units = {"copy": "GB/s"}
    rows = [
        [
            case,
            *(f"{rate / 1e9:.0f} {units.get(case, 'GFLOP/s')}" for rate in by_framework.values()),
        ]
        for case, by_framework in rates(result).items()
    ]
    names = list(result["points"][0]["results"])
    return f"{markdown(['case', *names], rows)}\n\n{conditions(result['conditions'])}"


def floors(results: Path) -> str:
    """The headline figures, compared with the least time that they can take on the machine."""
    measured = load("limits", results)
    best = {case: max(by_framework.values()) for case, by_framework in rates(measured).items()}
    rows = []

    def row(what: str, floor: float, name: str, value: Any) -> None:
        result = load(name, results)
        # Another machine has other limits.
        if result["conditions"].get("vectors") != measured["conditions"].get("vectors"):
            return
        points = result["points"]
        found = next(p["results"] for p in points if p["value"] == value)
        jlora, *others = [one["median"] for one in found.values()]
        cells = [f"{1e3 * floor:.3g} ms", *(f"{s / floor:.2f}" for s in (jlora, min(others)))]
        rows.append([what, *cells])

    for name in (f"training-step-{method}" for method in METHODS):
        for what, flops in load(name, results)["flops"].items():
            row(f"training step, {what}", flops / best["bfloat16"], name, what)
    weights = load("nf4-dequantize", results)["weights"]
    for what in ("quantize", "dequantize"):  # half a byte quantized, two bytes dense
        row(f"NF4 {what}, {weights:,} weights", 2.5 * weights / best["copy"], f"nf4-{what}", 4096)
    new, size = (load("generation", results)[key] for key in ("new", "bytes_per_token"))
    row(f"generation, {new} tokens", new * size / best["copy"], "generation", 1)
    return markdown(["figure", "floor", "jlora / floor", "peer / floor"], rows)


def profile(results: Path) -> str:
    """The seconds and the share of each part of jlora's step."""
    result = load("profile-step", results)
    methods = [point["value"] for point in result["points"]]
    found = [point["results"]["jlora"]["facts"]["groups"] for point in result["points"]]

    def cell(seconds: Mapping[str, float], group: str) -> str:
        return f"{seconds[group]:.2f} s, {seconds[group] / sum(seconds.values()):.0%}"

    rows = [[GROUPS[group], *(cell(seconds, group) for seconds in found)] for group in GROUPS]
    return f"{markdown(['part', *methods], rows)}\n\n{conditions(result['conditions'])}"


def predicted(results: Path) -> str:
    """A step's memory as ``jlora plan`` predicts it, and as measured."""
    result = load("predicted", results)
    rows = []
    for point in result["points"]:
        facts = point["results"]["jlora"]["facts"]
        predicted_bytes, measured_bytes = facts["predicted"], facts["measured"]
        rows.append(
            [
                point["value"],
                f"{predicted_bytes / 1e6:.0f}",
                f"{measured_bytes / 1e6:.0f}",
                short(measured_bytes / predicted_bytes),
            ]
        )
    head = ["step", "predicted, MB", "measured, MB", "measured / predicted"]
    return f"{markdown(head, rows)}\n\n{conditions(result['conditions'])}"


def memory(target: str, results: Path) -> str:
    """The results of ``memory.py``: peaks by model and method in GB; the host's in brackets."""
    result = load(f"memory-{target}", results)
    models, paper = result["results"], result["paper"]
    ways = list(dict.fromkeys(way for peaks in models.values() for way in peaks))
    compared = any(model in paper for model in models)

    def cell(got: Mapping[str, Any] | None) -> str:
        if got is None:
            return ""
        if "refused" in got:
            return "does not compile"
        host = f" ({got['host'] / 1e9:.2f})" if got["host"] else ""
        return f"{got['peak'] / 1e9:.2f}{host}"

    rows = [
        [model, *(cell(peaks.get(way)) for way in ways), *[str(paper.get(model, ""))] * compared]
        for model, peaks in models.items()
    ]
    batch, length = result["batch"]
    where = f"Compiled for {target} with jax {result['jax']}, {batch} × {length}, {result['date']}."
    head = ["model", *ways, *["QLoRA's paper"] * compared]
    return f"{markdown(head, rows)}\n\n{where}"


def compiled_step(results: Path) -> str:
    """The results of ``compiled_step.py``: figures of each case before and after."""
    result = load("compiled-step", results)
    before, after = (result[label]["cases"] for label in ("before", "after"))

    def both(name: str, show: Callable[[Mapping[str, Any]], str]) -> str:
        old, new = show(before[name]), show(after[name])
        return new if old == new else f"{old} → {new}"

    def seconds(got: Mapping[str, Any], of: str) -> float:
        return 1000 * got["seconds"].get(of, 0.0)

    rows = [
        [
            name,
            both(name, lambda got: f"{got['flops'] / 1e12:.0f}"),
            both(name, lambda got: f"{got['bytes'] / 2**30:.0f}"),
            both(name, lambda got: f"{got['sent'] / 2**30:.1f}"),
            both(name, lambda got: f"{got['peak'] / 2**30:.2f}"),
            both(name, lambda got: f"{seconds(got, 'compute'):.0f}"),
            both(name, lambda got: f"{seconds(got, 'memory'):.0f}"),
            both(name, lambda got: f"{seconds(got, 'links'):.0f}"),
            both(name, lambda got: f"{got['tokens'] / max(got['seconds'].values()):,.0f}"),
        ]
        for name in after
    ]
    head = ["step", "TFLOP", "GiB moved", "GiB sent", "peak, GiB", "compute, ms", "memory, ms"]
    versions = {got["jax"] for got in after.values()}
    where = f"On each device; jax {', '.join(versions)}, {result['after']['date']}."
    head += ["links, ms", "tokens/s at most"]
    return f"{markdown(head, rows)}\n\n{where}"


TABLES: dict[str, Callable[[Path], str]] = {
    "training-step": training_step,
    "startup-commands": commands,
    "limits": limits,
    "floors": floors,
    "profile-step": profile,
    "predicted": predicted,
    "compiled-step": compiled_step,
    "memory-h200": functools.partial(memory, "h200"),
    "memory-v5e": functools.partial(memory, "v5e"),
}
"""Tables that are not of one ``paired.compare``: name → function of the folder of results."""


def main() -> None:
    """Writes the page, or checks it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail when the page differs")
    args = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    new = made(page)
    if args.check and new != page:
        sys.exit("docs/benchmarks.md differs from its results: run python benchmarks/tables.py")
    if new != page:
        PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
