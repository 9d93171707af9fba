"""Runs README's first command and holds it to its promise: exact match, time, files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

OUTPUT = Path("outputs/quickstart")
FILES = ("adapter_config.json", "adapter_model.safetensors", "config.yaml", "report.html")


def main() -> None:
    """Runs, measures, and exits with what is wrong, if anything."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "jlora.train", "configs/quickstart.yaml"], check=True)
    seconds = time.monotonic() - start
    lines = [json.loads(line) for line in (OUTPUT / "metrics.jsonl").read_text().splitlines()]
    scores = [line["eval_exact_match"] for line in lines if "eval_exact_match" in line]
    print(f"exact match {scores[0]:.2f} → {scores[-1]:.2f} in {seconds:.0f} s")
    missing = [name for name in FILES if not (OUTPUT / name).is_file()]
    limit = float(os.environ.get("JLORA_QUICKSTART_LIMIT", "180"))
    faults = [f"{name} is missing" for name in missing]
    faults += ["exact match before is not below 0.05"] * (scores[0] >= 0.05)
    faults += ["exact match after is not at least 0.9"] * (scores[-1] < 0.9)
    faults += [f"took longer than {limit:.0f} s"] * (seconds > limit)
    sys.exit("; ".join(faults) or 0)


if __name__ == "__main__":
    main()
