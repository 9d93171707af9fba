"""The longest rows that fit: LoRA and QLoRA of Llamas on single devices, as the compiler reports.

    python benchmarks/fits.py --platform cuda [--models 1B,8B,70B] [--devices rtx4090,h100]
    python benchmarks/fits.py --platform tpu

Batch 1, r 16 on every linear layer, AdamW in float32, every layer recomputed in the backward pass;
bfloat16, NF4 with double quantization. Each cell is the longest length whose step, compiled for the
device, fits, in steps of ``STEP`` tokens up to the models' 131,072; 95 % of a GPU's memory is used
(``XLA_PYTHON_CLIENT_MEM_FRACTION=0.95``). The peak is nearly linear in the length: two compilations
estimate the line, the next ones confirm it; the search starts from an earlier result. Results are
merged into ``benchmarks/results/fits.json``; the table is written into ``docs/plan.md``.
"""

import argparse
import json
import os
from collections.abc import Callable
from datetime import date
from typing import Any

from memory import HERE, MODELS, Row, measure

DEVICES = {"cuda": ("rtx4090", "a100-80", "h100", "h200"), "tpu": ("v5e",)}
STEP, LONGEST = 1024, 131_072
FIRST = (2048, 8192)
REFUSED = 2**62
"""Stands for the peak of a step that the compiler refuses without reporting its size."""
RESULTS, PAGE = HERE / "results" / "fits.json", HERE.parent / "docs" / "plan.md"
BEGIN, END = "<!-- fits: begin -->", "<!-- fits: end -->"
NAMES = ("1B", "8B", "70B")
METHODS = ("LoRA", "QLoRA", "QLoRA, offloading")
"""``offloading`` is ``train.activation_offloading``."""


def longest(model: str, method: str, device: str, limit: int, guess: int) -> dict[str, Any]:
    """The longest row whose step fits, its peak, and the peaks of all compiled lengths."""
    import jax

    row = Row(16, quantized="QLoRA" in method, offloading="offloading" in method)

    def peak(length: int) -> int:
        jax.clear_caches()
        hf = {**MODELS[model], "max_position_embeddings": LONGEST}
        got = measure(hf, row, 1, length, device, limit)
        size_text = got.get("refused") or f"{got['peak'] / 1e9:.2f} GB"
        print(f"{model} {row} {device} {length}: {size_text}", flush=True)
        return got.get("peak", REFUSED)

    low, seen = search(peak, limit, guess)
    return {"length": low, "peak": seen.get(low), "limit": limit, "compiled": seen}


def search(peak: Callable[[int], int], limit: int, guess: int) -> tuple[int, dict[int, int]]:
    """The longest length, in steps of STEP, whose peak is within the limit (0 if none is), and all
    peaks that were computed.
    """
    seen: dict[int, int] = {}
    low, high = 0, LONGEST + STEP  # the longest known to fit, the shortest known not to
    while high - low > STEP:
        seen[guess] = peak(guess)
        if seen[guess] <= limit:
            low = guess
        else:
            high = guess
        guess = _next(seen, low, high, limit)
    return low, seen


def _next(seen: dict[int, int], low: int, high: int, limit: int) -> int:
    """Where the line through the two nearest peaks reaches the limit, if between the bounds.

    Otherwise halfway between them: a compiler may refuse a step without reporting its size.
    """
    known = sorted(n for n in seen if seen[n] < REFUSED)
    halfway = middle = (low + high) // 2
    if known == [FIRST[0]] and low:
        middle = FIRST[1]
    elif len(known) == 1:
        middle = low + STEP if low else high - STEP
    elif len(known) >= 2:
        a, b = sorted(sorted(known, key=lambda n: abs(seen[n] - limit))[:2])
        slope = max(1.0, (seen[b] - seen[a]) / (b - a))
        middle = int(b + (limit - seen[b]) / slope)
    if not low < middle < high:
        middle = halfway
    return min(max(middle // STEP * STEP, low + STEP), high - STEP)


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each model and method, a column for each device."""
    devices = [d for d in (*DEVICES["cuda"], *DEVICES["tpu"]) if d in results]
    titles = {d: f"{d}, {results[d]['limit'] / 1e9:.1f} GB" for d in devices}
    lines = ["| model | " + " | ".join(titles.values()) + " |", "|---" * (len(devices) + 1) + "|"]
    for model in NAMES:
        for method in METHODS:
            cells = [_cell(results[d]["cells"].get(f"{model} {method}")) for d in devices]
            lines.append(f"| {model} {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(got: dict[str, Any] | None) -> str:
    if got is None:
        return "not compiled"
    if not got["length"]:
        return "–"
    more = " or more" if got["length"] == LONGEST else ""
    return f"{got['length']:,}{more} ({got['peak'] / 1e9:.1f} GB)"


def main() -> None:
    """Computes the requested cells, and writes the results and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", choices=list(DEVICES), required=True)
    parser.add_argument("--models", default=",".join(NAMES))
    parser.add_argument("--devices")
    parser.add_argument("--methods", default=";".join(METHODS))
    args = parser.parse_args()
    devices = args.devices.split(",") if args.devices else DEVICES[args.platform]
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.95"
    from jlora.plan import target

    target.set_environment(target.parse_target(devices[0]))
    import jax

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for device in devices:
        limit = target.memory_limit(target.parse_target(device), None).limit
        entry = results.setdefault(device, {"limit": limit, "cells": {}})
        entry |= {"limit": limit, "jax": jax.__version__, "date": date.today().isoformat()}
        for model in args.models.split(","):
            for method in args.methods.split(";"):
                cell = f"{model} {method}"
                before = entry["cells"].get(cell, {}).get("length") or FIRST[0]
                entry["cells"][cell] = longest(model, method, device, limit, before)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
