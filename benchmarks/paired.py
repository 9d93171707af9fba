"""The harness of all benchmarks: contestants take turns, each in its own process.

torch and jax in one process would share threads, allocator and peak memory; contestants that run
one after the other would see different loads of the machine. So each contestant is a worker process
that does one unit of work at a time, in alternating order; a figure is a ratio of medians.

A worker is started as ``python paired.py MODULE:FUNCTION JSON``. The function, called with
the JSON's arguments, does the setup and returns the unit, a function without arguments; the worker
runs the unit on request. A unit may return a dict: its ``seconds`` replaces the measured time, the
other entries are facts (a loss, a size) for the results. The protocol is lines of JSON over stdin
and stdout; what libraries print goes to stderr.

Results are ``benchmarks/results/NAME.json``; ``tables.py`` makes the tables of the docs from them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import select
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PACKAGES = ("jax", "flax", "torch", "transformers", "peft", "bitsandbytes", "trl", "datasets")
SETTINGS = ("JAX_PLATFORMS", "XLA_FLAGS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_AFFINITY")
VECTORS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""Vector extensions that decide how fast a bfloat16 product is, as /proc/cpuinfo names them.

Without the third torch's takes a hundred times as long.
"""

QUIET = 0.1
"""The share of the machine that other processes may use before a run is refused or marked."""


TICK = 0.1
"""Seconds between two readings of the clock while a worker is busy."""


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One side of a comparison."""

    name: str
    setup: str
    """``module:function``, found in this folder or on the Python path."""
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fresh: bool = False
    """A new process for every unit, without warm-up: for work that happens once per process."""


class Worker:
    """A contestant's process.

    Raises RuntimeError with the contestant's name when the process ends without answering.
    """

    def __init__(self, contestant: Contestant):
        self.contestant = contestant
        path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
        arguments = json.dumps(dict(contestant.arguments))
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "paired.py"), contestant.setup, arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, **contestant.environment},
            text=True,
        )
        self._hear()  # it is ready

    def unit(self) -> dict[str, Any] | None:
        """Runs one unit; returns ``seconds`` and the unit's facts, or None if it does not count:
        this process was suspended meanwhile, and the worker probably too.
        """
        wall, busy, used = time.monotonic(), _busy_seconds(), _processor_seconds(self._process.pid)
        answer = self._ask("unit")
        if self._suspended:
            return None
        used = _processor_seconds(self._process.pid) - used
        others = _busy_seconds() - busy - used  # of single units within ticks of 10 ms
        return answer | {"wall": time.monotonic() - wall, "others": others}

    def end(self) -> dict[str, Any]:
        """Ends the process; returns ``peak_bytes``, the peak of its resident memory."""
        last = self._ask("end")
        self._process.communicate()
        return last

    def kill(self) -> None:
        """Kills the process if it is still running."""
        assert self._process.stdout is not None
        if not self._process.stdout.closed:
            self._process.kill()
            self._process.communicate()

    def _ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(what + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer will be missing
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        self._suspended, before, ready = False, time.monotonic(), []
        while not ready:
            ready, _, _ = select.select([self._process.stdout], [], [], TICK)
            before, gap = time.monotonic(), time.monotonic() - before
            self._suspended |= gap > 10 * TICK
        if line := self._process.stdout.readline():
            return json.loads(line)
        code = self._process.wait()
        self.kill()
        raise RuntimeError(f"{self.contestant.name} ended with exit code {code}: see its output")


def work(setup: str, arguments: str) -> None:
    """The worker process; see the module's docstring."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    module, _, function = setup.partition(":")
    unit = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    answer(ready=True)
    for line in sys.stdin:
        if line.strip() != "unit":
            break
        start, used = time.perf_counter(), _used()
        facts = unit()
        seconds, used = time.perf_counter() - start, _used() - used
        answer(**{"seconds": seconds, "processor": used, **(facts or {})})
    answer(peak_bytes=_peak_bytes())


def _used() -> float:
    """Processor seconds of all threads of this process, and of its children that have ended."""
    return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def _peak_bytes() -> int:
    """The largest resident set of this process, or of its largest child."""
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])
    return 1024 * max(peak, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def measure(
    contestants: Sequence[Contestant], repeats: int, warmup: int = 1
) -> dict[str, dict[str, Any]]:
    """Runs the contestants in turn; every second round in reverse order.

    A unit during which this process was suspended is repeated.

    Returns, for each name: ``seconds`` of every unit in the rounds' order, their ``median``, the
    ``processor`` seconds of every unit, ``peak_bytes`` of its process, the ``facts`` of the last
    unit; and summed over all units the elapsed seconds (``wall``) and the processor seconds of
    other processes (``others``).
    """
    results: dict[str, dict[str, Any]] = {
        c.name: {"seconds": [], "processor": []} for c in contestants
    }

    def count(contestant: Contestant, answer: dict[str, Any]) -> None:
        result = results[contestant.name]
        for name in ("wall", "others"):
            result[name] = result.get(name, 0.0) + answer.pop(name)
        result["seconds"].append(seconds := answer.pop("seconds"))
        result["processor"].append(answer.pop("processor"))
        result["facts"] = answer
        say(f"  {contestant.name}: {seconds:.4g} s {answer or ''}")

    def ended(contestant: Contestant, last: dict[str, Any]) -> None:
        result = results[contestant.name]
        result["peak_bytes"] = max(last["peak_bytes"], result.get("peak_bytes", 0))

    def unit(contestant: Contestant) -> dict[str, Any]:
        """Runs a unit in the contestant's worker, or in a new one; again if it did not count."""
        while True:
            worker = workers.get(contestant.name) or start(contestant)
            answer = worker.unit()
            if contestant.fresh:
                ended(contestant, worker.end())
            if answer is not None:
                return answer
            say(f"  {contestant.name}: suspended, once more")

    def start(contestant: Contestant) -> Worker:
        worker = Worker(contestant)
        stack.callback(worker.kill)
        return worker

    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for contestant in contestants:
            if not contestant.fresh:
                say(f"  {contestant.name}: starting")
                worker = workers[contestant.name] = start(contestant)
                for _ in range(warmup):
                    worker.unit()
        for number in range(repeats):
            for contestant in contestants[:: -1 if number % 2 else 1]:
                count(contestant, unit(contestant))
        for contestant in contestants:
            if not contestant.fresh:
                ended(contestant, workers[contestant.name].end())
    for result in results.values():
        result["median"] = statistics.median(result["seconds"])
    return results


def compare(
    name: str,
    axis: str,
    points: Mapping[Any, Sequence[Contestant]],
    args: argparse.Namespace,
    *,
    warmup: int = 1,
    **facts: Any,
) -> dict[str, Any]:
    """Measures every point of an axis and writes ``results/NAME.json``.

    Args:
      name: the name of the results, and of the table in the docs.
      axis: the quantity that grows from point to point.
      points: the contestants at each value of the axis, jlora's first.
      args: the options, parsed by the parser that ``arguments`` returns.
      warmup: the number of units of each worker that are not counted.
      facts: entries of the results, stored unchanged.

    Exits with 75 (a temporary failure) when the machine is in use, unless ``--anyway`` is given.
    """
    conditions = {**describe(), "repeats": args.repeats}
    conditions["busy_before"] = _wait_for_quiet(args.anyway)
    measured: list[dict[str, Any]] = []
    for value, contestants in points.items():
        say(f"{name}, {axis} {value}")
        measured.append({"value": value, "results": measure(contestants, args.repeats, warmup)})
    every = [one for point in measured for one in point["results"].values()]
    others = sum(one["others"] for one in every) / sum(one["wall"] for one in every)
    conditions["used_by_others"] = others = min(1.0, max(0.0, others / (os.cpu_count() or 1)))
    if others > QUIET:
        say(f"others used {others:.0%} of the machine: the results say so")
    result = {"axis": axis, **facts, "conditions": conditions, "points": measured}
    write(name, result)
    return result


def write(name: str, result: Mapping[str, Any]) -> None:
    """Writes ``results/NAME.json``."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(_rounded(result), indent=1) + "\n", encoding="utf-8")
    say(f"wrote {path.relative_to(HERE.parent)}")


def _rounded(value: Any) -> Any:
    """Rounds floats to six digits; the clock is not more precise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value


def arguments(doc: str | None, repeats: int = 5) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share; ``doc`` is its help."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds that are counted")
    parser.add_argument("--anyway", action="store_true", help="also while the machine is in use")
    return parser


def describe() -> dict[str, Any]:
    """The conditions of a run: date, machine, versions, thread settings, command."""
    cpus = Path("/proc/cpuinfo").read_text()
    found = re.search(r"model name\s*:\s*(.+)", cpus)
    vectors = [name for name in VECTORS if re.search(rf"\b{name}\b", cpus)]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": str(date.today()),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": _output("git", "-C", str(HERE), "rev-parse", "--short", "HEAD"),
        "cpu": found[1].strip() if found else platform.machine(),
        "vectors": vectors,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "gpu": _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "load_average": os.getloadavg()[0],
    }


def _output(*command: str) -> str | None:
    """The output of a program; None if it does not exist or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _busy_seconds() -> float:
    """Processor seconds that the machine has spent since it was started."""
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split(None, 9)[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _processor_seconds(pid: int) -> float:
    """Processor seconds of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _wait_for_quiet(anyway: bool, tries: int = 10, seconds: float = 1.0) -> float:
    """Waits until the machine is idle, and exits if it never is; returns the share in use."""
    busy = 0.0
    for _ in range(tries):
        start, before = time.monotonic(), _busy_seconds()
        time.sleep(seconds)
        wall = (time.monotonic() - start) * (os.cpu_count() or 1)
        busy = (_busy_seconds() - before) / wall
        if busy <= QUIET or anyway:
            return busy
    say(f"others use {busy:.0%} of the machine; --anyway measures all the same and says so")
    sys.exit(75)


def say(text: str) -> None:
    """Prints a line of progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    if {"-h", "--help"} & {*sys.argv[1:]} or len(sys.argv) < 3:
        print(__doc__)
    else:
        work(*sys.argv[1:])
