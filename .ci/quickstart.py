"""Runs README's commands, and holds the first to its promise: exact match and files.

Its time is printed, not held: a busy machine is no fault of the change.
"""

from __future__ import annotations

import json
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

QUICKSTART = "python -m jlora.train configs/quickstart.yaml"
OUTPUT = Path("outputs/quickstart")
FILES = ("adapter_config.json", "adapter_model.safetensors", "config.yaml", "report.html")
SECONDS = 180


def readme_commands() -> list[str]:
    """The ``python …`` lines of README's shell blocks, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("python ")]


def run(command: str) -> float:
    """Seconds by the clock that a command took; fails when it fails.

    Processor time is printed too: it tells a slow program from a busy machine.
    """
    print(f"\n$ {command}", flush=True)
    start, used = time.monotonic(), processor_seconds()
    program, *arguments = shlex.split(command)
    subprocess.run([sys.executable if program == "python" else program, *arguments], check=True)
    clock, processor = time.monotonic() - start, processor_seconds() - used
    print(f"{clock:.0f} s by the clock, {processor:.0f} s of processor time", flush=True)
    return clock


def processor_seconds() -> float:
    """Processor time of all finished child processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def faults(seconds: float) -> list[str]:
    """What the quickstart's run did not keep of its promise."""
    lines = [json.loads(line) for line in (OUTPUT / "metrics.jsonl").read_text().splitlines()]
    scores = [line["eval_exact_match"] for line in lines if "eval_exact_match" in line]
    slow = f", more than the {SECONDS} s that README promises" if seconds > SECONDS else ""
    print(f"exact match {scores[0]:.2f} → {scores[-1]:.2f} in {seconds:.0f} s{slow}", flush=True)
    found = [f"{name} is missing" for name in FILES if not (OUTPUT / name).is_file()]
    found += ["exact match before is not below 0.05"] * (scores[0] >= 0.05)
    found += ["exact match after is not at least 0.9"] * (scores[-1] < 0.9)
    return found


def main() -> None:
    """Exits with what is wrong, if anything."""
    shutil.rmtree("outputs", ignore_errors=True)
    wrong = faults(run(QUICKSTART))
    commands = readme_commands()
    assert QUICKSTART in commands, "README no longer shows the quickstart"
    for command in commands:
        if command != QUICKSTART:
            # That README's other trainings start and end is enough.
            run(f"{command} train.max_steps=8" if "jlora.train configs" in command else command)
    sys.exit("; ".join(wrong) or 0)


if __name__ == "__main__":
    main()
