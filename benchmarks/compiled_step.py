"""The training step of Llama-3.1-8B as the compiler makes it for devices that are absent.

    python benchmarks/compiled_step.py [--label after] [--cases "LoRA;QLoRA"]

r 16 on every linear layer, dropout 0.05, bfloat16, AdamW. GPUs need ``jax[cuda13]``, no device.
FLOPs, traffic and collectives are counted in the optimized HLO (``jlora/plan/hlo.py``), so they are
of XLA's default tilings: where there is a device, it times kernels and may choose others. Results
are merged into ``benchmarks/results/compiled-step.json`` under the label; ``tables.py`` makes the
page's table.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from memory import HERE, MODELS

RESULTS = HERE / "results" / "compiled-step.json"
QUANTIZED = {"quantization": {"load_in_4bit": True}}
CASES: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "LoRA": ("h200", 1, 4096, {}),
    "LoRA, fsdp": ("h200x8", 2, 2048, {"mesh": {"data": 1, "fsdp": 8}}),
    "QLoRA": ("h200", 1, 2048, QUANTIZED),
    "QLoRA, 4096": ("h200", 1, 4096, QUANTIZED),
    "QLoRA, RTX 4090": ("rtx4090", 1, 2048, QUANTIZED),
}
"""Name → target, rows on a device, tokens of a row, and settings."""


def settings_of(folder: str, name: str) -> dict[str, Any]:
    """The run's settings, for a base whose ``config.json`` is in ``folder``."""
    _, rows, length, more = CASES[name]
    train = {"output_dir": "unused", "max_steps": 1000, "per_device_train_batch_size": rows}
    return {
        "model": {"name_or_path": folder},
        "lora": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"},
        "data": {"train": [{"path": "unused", "format": "text"}], "max_length": length},
        "train": train | {"gradient_accumulation_steps": 1},
        **more,
    }


def forecast_of(name: str) -> dict[str, Any]:
    """The figures of one case; the target decides the environment, hence a process for each."""
    from jlora.plan.target import devices, parse_target, set_environment

    target = parse_target(CASES[name][0])
    set_environment(target)
    import jax

    from jlora import config
    from jlora.plan import forecast

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS["8B"]))
        file = Path(folder) / "run.json"
        file.write_text(json.dumps(settings_of(folder, name)))
        run, rows = config.load(str(file), []), forecast.Rows(CASES[name][2])
        result = forecast.forecast(run, None, rows, target, devices(target))
    assert result.work is not None and result.memory is not None
    sent = sum(collective.sent for collective in result.work.collectives or ())
    return {
        "flops": result.work.flops / result.job.mesh.size,
        "bytes": result.work.bytes_moved,
        "sent": sent,
        "peak": result.memory.peak,
        "seconds": result.seconds(),
        "tokens": result.tokens_per_step / result.job.mesh.size,
        "jax": jax.__version__,
    }


def main() -> None:
    """Compiles the cases, each in a process of its own, and updates the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--label", default="after")
    parser.add_argument("--cases", default=";".join(CASES))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(forecast_of(args.one)))
        return
    for name in args.cases.split(";"):
        command = [sys.executable, __file__, "--one", name]
        run = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        if run.returncode:
            sys.exit(run.stderr[-3000:])
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        entry = results.setdefault(args.label, {"cases": {}})
        entry["date"] = date.today().isoformat()
        entry["cases"][name] = json.loads(run.stdout)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(name, json.dumps(entry["cases"][name]), flush=True)


if __name__ == "__main__":
    main()
