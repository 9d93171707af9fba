"""Runs every comparison with a peer, then makes the page's tables: about half an hour.

    python benchmarks/all.py [--only nf4,dot] [--anyway]

The machine must be idle unless ``--anyway`` is given; see ``paired.py``. A benchmark that fails is
named at the end; the others still run. Needs the extra ``parity``, and ``pip install trl`` for TRL.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
COMMANDS = (
    "limits.py",
    "training_step.py",
    "training_step.py --sweep all",
    "profile_step.py",
    "predicted.py",
    "nf4.py",
    "dot.py",
    "data.py",
    "loading.py",
    "startup.py commands",
    "startup.py first-step",
    "checkpoint.py",
    "generation.py",
    "adapters.py",
    "many_adapters.py",
    "compile_time.py",
    "tables.py",
)


def main() -> None:
    """Runs the commands; exits with 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="scripts, such as nf4,dot; the tables are always made")
    parser.add_argument("--anyway", action="store_true", help="also while the machine is in use")
    args = parser.parse_args()
    only = set((args.only or "").split(",")) - {""}
    failed = []
    for command in COMMANDS:
        script, *arguments = command.split()
        name = script.removesuffix(".py")
        if only and name not in only | {"tables"}:
            continue
        arguments += ["--anyway"] if args.anyway and name != "tables" else []
        if subprocess.run([sys.executable, str(HERE / script), *arguments], check=False).returncode:
            failed.append(command)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
