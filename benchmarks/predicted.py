"""The memory that ``jlora plan`` predicts, compared with the memory measured during the step.

    python benchmarks/predicted.py

The steps are those of the headline of ``training_step.py``, and LoRA's with rows of 1024 tokens,
each in its own process, as ``jlora train`` runs them, on zeros. The measurement is the allocator's
peak on an accelerator. On a CPU it is the largest resident set during the steps minus the resident
set without their arrays, after the same steps have run once; the smallest of three measurements is
taken, since other allocations of the process can only add to it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import llama
import paired
from training_step import HEADLINE, run_config

STEPS = 3
CASES = {
    **{llama.METHODS[method]: (method, HEADLINE["length"]) for method in llama.METHODS},
    "LoRA, rows of 1024": ("lora", 1024),
}


def steps(method: str, length: int) -> Any:
    """A unit that plans, compiles and runs a step: returns its predicted and measured bytes."""

    def unit() -> dict[str, int]:
        import jax

        from jlora.plan import target
        from jlora.plan.forecast import Rows, forecast
        from jlora.run.train_step import TrainStep

        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(llama.shape()))
            config = run_config(method, {**HEADLINE, "length": length}, base=folder)
            devices = jax.devices()[:1]
            plan = forecast(
                config, None, Rows(length), target.CompileTarget(), devices, count_work=False
            )
        assert plan.memory is not None
        program = TrainStep.of(plan.job, plan.plan, length, documents=1)
        step = program.compile()
        described = program.state, program.job.frozen, program.batch

        def run() -> None:
            state, frozen, batch = jax.block_until_ready(jax.tree.map(_zeros, described))
            for _ in range(STEPS):
                state, _ = jax.block_until_ready(step(state, frozen, batch))

        run()  # what only a first step allocates: code, threads
        seen = []
        for _ in range(3):
            before = _resident()
            _reset_peak()
            run()
            seen.append(_status("VmHWM") - before)
        stats = devices[0].memory_stats() or {}
        peak = stats.get("peak_bytes_in_use") or min(seen)
        return {"predicted": plan.memory.peak, "measured": peak}

    return unit


def _zeros(leaf: Any) -> Any:
    import jax.numpy as jnp

    return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)


def _resident() -> int:
    """The resident set, after freed memory has been returned to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _reset_peak() -> None:
    """Resets ``VmHWM`` to the current resident set."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def main() -> None:
    """Measures every case in its own process."""
    args = paired.arguments(__doc__, repeats=1).parse_args()
    points = {
        case: [
            paired.Contestant(
                "jlora", "predicted:steps", {"method": method, "length": length}, fresh=True
            )
        ]
        for case, (method, length) in CASES.items()
    }
    paired.compare("predicted", "step", points, args, grows=False, memory=False)


if __name__ == "__main__":
    main()
