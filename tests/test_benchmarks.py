"""The benchmarks' harness, with trivial workers, and the tables made from results."""

import argparse
import gzip
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import statistics
import sys
import time
from pathlib import Path

import jax
import pytest

from jlora.models import Model

FOLDER = Path(__file__).parent.parent / "benchmarks"
TOYS = '''
import os, sys

def unit(log, who, factor):
    """Says who is asked, in a file; prints where an answer would stand; its time is made up."""
    print("a library says hello")
    count = 0
    def one():
        nonlocal count
        count += 1
        print("and again")
        with open(log, "a") as file:
            file.write(f"{who} {os.getpid()}\\n")
        return {"seconds": factor * count, "count": count}
    return one

def memory(megabytes):
    block = b"x" * (megabytes << 20)
    return lambda: {"size": len(block)}

def broken():
    return lambda: sys.exit(3)
'''


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


paired, tables = load("paired"), load("tables")


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Makes contestants from the module above."""
    (tmp_path / "toys.py").write_text(TOYS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(name, function, fresh=False, **arguments):
        return paired.Contestant(name, f"toys:{function}", arguments, fresh=fresh)

    return make


def pair(toy, log, **options):
    """Units of 2, 4, 6 … and of 3, 6, 9 … seconds."""
    return [toy(name, "unit", log=str(log), who=name, factor=factor, **options)
            for name, factor in (("a", 2.0), ("b", 3.0))]  # fmt: skip


def test_contestants_alternate_in_separate_processes(toy, tmp_path):
    log = tmp_path / "log"
    results = paired.measure(pair(toy, log), repeats=3)
    names, processes = zip(*(line.split() for line in log.read_text().splitlines()), strict=True)
    assert "".join(names) == "ab" + "ab" + "ba" + "ab"  # a warm-up, then every other one turned
    assert len(set(zip(names, processes, strict=True))) == 2
    assert str(os.getpid()) not in processes and len(set(processes)) == 2
    assert results["a"]["seconds"] == [4.0, 6.0, 8.0] and results["a"]["median"] == 6.0
    assert all(0 < used < 1 for used in results["a"]["processor"])
    assert results["b"]["seconds"] == [6.0, 9.0, 12.0]
    assert results["b"]["facts"] == {"count": 4}


def test_a_fresh_contestant_gets_a_new_process_for_each_unit(toy, tmp_path):
    log = tmp_path / "log"
    results = paired.measure(pair(toy, log, fresh=True), repeats=2)
    lines = log.read_text().splitlines()
    assert [line[0] for line in lines] == list("abba") and len(set(lines)) == 4
    assert results["b"]["seconds"] == [3.0, 3.0] and results["b"]["peak_bytes"] > 2**20


def test_memory_is_measured_per_process(toy):
    contestants = [toy("small", "memory", megabytes=1), toy("large", "memory", megabytes=101)]
    peak = {n: r["peak_bytes"] for n, r in paired.measure(contestants, repeats=1).items()}
    assert 90 * 2**20 < peak["large"] - peak["small"] < 110 * 2**20


def test_a_unit_interrupted_by_a_suspension_is_repeated(toy, tmp_path, monkeypatch):
    log, real, suspended = tmp_path / "log", paired.select.select, []

    def select(*arguments):
        if log.exists() and not suspended:
            suspended.append(time.sleep(0.5))
        return real(*arguments)

    monkeypatch.setattr(paired, "TICK", 0.02)
    monkeypatch.setattr(paired.select, "select", select)
    results = paired.measure(pair(toy, log), repeats=2, warmup=0)
    assert len(log.read_text().splitlines()) == 5
    assert all(len(result["seconds"]) == 2 for result in results.values())


def test_a_contestant_that_dies_is_named(toy):
    with pytest.raises(RuntimeError, match="fragile ended with exit code 3"):
        paired.measure([toy("fragile", "broken")], repeats=1)


def test_a_busy_machine_is_refused_or_marked(monkeypatch):
    busy = itertools.count(step=1000)  # all cores are always busy
    monkeypatch.setattr(paired, "_busy_seconds", lambda: next(busy))
    with pytest.raises(SystemExit) as stopped:
        paired._wait_for_quiet(False, tries=2, seconds=0.001)
    assert stopped.value.code == 75
    assert paired._wait_for_quiet(True, tries=2, seconds=0.001) > 0.9


@pytest.fixture
def result(toy, tmp_path, monkeypatch):
    """A comparison at two points, as written to its file."""
    monkeypatch.setattr(paired, "RESULTS", tmp_path)
    monkeypatch.setattr(paired, "HERE", tmp_path / "benchmarks")
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/toys.py", "--repeats", "3"])
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/paired.py").symlink_to(FOLDER / "paired.py")
    asked = argparse.Namespace(repeats=3, anyway=True)
    points = {1: pair(toy, tmp_path / "log"), 2: pair(toy, tmp_path / "log")}
    paired.compare("toys", "size", points, asked, unit="a nap")
    return json.loads((tmp_path / "toys.json").read_text())


def test_results_record_the_conditions(result):
    assert result["axis"] == "size" and result["unit"] == "a nap"
    assert [point["value"] for point in result["points"]] == [1, 2]
    where = result["conditions"]
    assert where["command"] == "python benchmarks/toys.py --repeats 3"
    assert where["repeats"] == 3 and where["cores"] == len(os.sched_getaffinity(0))
    assert where["versions"]["jax"] and where["python"] and where["cpu"]
    assert 0 <= where["used_by_others"] <= 1


def test_a_table_shows_ratios_growth_and_conditions(result):
    second = result["points"][1]["results"]
    for name, factor in (("a", 3), ("b", 2)):
        second[name]["seconds"] = [factor * s for s in second[name]["seconds"]]
        second[name]["median"] = statistics.median(second[name]["seconds"])
        for point in result["points"]:
            point["results"][name]["processor"] = [factor] * 3
    second["b"]["seconds"][0] *= 2  # b was slow in one round
    for point in result["points"]:
        point["results"]["a"]["peak_bytes"], point["results"]["b"]["peak_bytes"] = 200, 300
    result["conditions"] |= {"used_by_others": 0.25, "gpu": "H200"}
    head, _, *rows, blank, where = tables.paired(result).splitlines()
    assert (
        head == "| size | b / a | b / a, processor | memory | growth of a | of the fastest other |"
    )
    assert rows == [
        "| 1 | 1.50 (1.50–1.50) | 0.67 (0.67–0.67) | 1.50 | 1.00 | 1.00 |",
        "| 2 | 1.00 (1.00–2.00) | 0.67 (0.67–0.67) | 1.50 | 3.00 | 2.00 |",
    ]
    assert not blank and "`python benchmarks/toys.py --repeats 3`, 3 rounds" in where
    assert "H200" in where and "**Others used 25% of the machine.**" in where
    result["conditions"]["used_by_others"] = 0.05
    assert "processor" not in tables.paired(result)


def test_tables_of_the_page_are_regenerated(result, tmp_path):
    page = "before\n<!-- table: toys -->\nold\n<!-- end -->\nafter\n"
    new = tables.made(page, tmp_path)
    assert "old" not in new and "| size | b / a |" in new
    assert new.startswith("before\n<!-- table: toys -->\n")
    assert new.endswith("<!-- end -->\nafter\n")
    assert tables.made(new, tmp_path) == new


def test_linear_parameters_match_the_model():
    llama = load("llama")
    for hf in (llama.shape(), llama.shape(384, 2)):
        width, layers = hf["hidden_size"], hf["num_hidden_layers"]
        every = sum(leaf.size for leaf in jax.tree.leaves(Model.from_config(hf).shapes))
        rest = width * hf["vocab_size"] + (2 * layers + 1) * width  # embeddings and norms
        assert llama.linear_parameters(hf) + rest == every
    assert round((llama.linear_parameters(llama.shape()) + 768 * 8192) / 1e6) == 63


WHERE = {
    "command": "python benchmarks/x.py", "repeats": 1, "date": "2026-01-01", "cpu": "C", "gpu": "",
    "cores": 2, "python": "3.11", "versions": {}, "settings": {}, "used_by_others": 0.0,
}  # fmt: skip


@pytest.fixture
def written(tmp_path):
    """Writes results of one round: value on the axis → contestant → its seconds and facts."""

    def write(name, points, **more):
        rows = [
            {"value": value, "results": {who: {"median": s, "seconds": [s], "facts": facts}
                                         for who, (s, facts) in contestants.items()}}
            for value, contestants in points.items()
        ]  # fmt: skip
        result = {"axis": "x", "points": rows, "conditions": WHERE, "memory": False, **more}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
        return tmp_path

    return write


def test_floors_divide_work_by_the_best_rate(written):
    rate = {"jax": (2.0, {"flops": 8e9}), "torch": (4.0, {"flops": 8e9})}  # 4 and 2 GFLOP/s
    copy = {"jax": (2.0, {"bytes": 2e9}), "torch": (1.0, {"bytes": 2e9})}  # 1 and 2 GB/s
    written("limits", {"bfloat16": rate, "copy": copy})
    both = {"jlora": (3.0, {}), "peft, a": (6.0, {}), "peft, b": (5.0, {})}
    for method in tables.METHODS:
        written(f"training-step-{method}", {method: both}, flops={method: 8e9})
    for what in ("quantize", "dequantize"):
        written(f"nf4-{what}", {512: both, 4096: both}, weights=800_000_000)
    folder = written("generation", {1: both, 4: both}, new=10, bytes_per_token=1e8)
    assert tables.floors(folder).splitlines()[2:] == [
        *(f"| training step, {m} | 2e+03 ms | 1.50 | 2.50 |" for m in tables.METHODS),
        "| NF4 quantize, 800,000,000 weights | 1e+03 ms | 3.00 | 5.00 |",
        "| NF4 dequantize, 800,000,000 weights | 1e+03 ms | 3.00 | 5.00 |",
        "| generation, 10 tokens | 500 ms | 6.00 | 10.00 |",
    ]
    assert "| bfloat16 | 4 GFLOP/s | 2 GFLOP/s |" in tables.limits(folder)
    file = folder / "nf4-quantize.json"
    other = json.loads(file.read_text())
    other["conditions"]["vectors"] = ["avx2"]
    file.write_text(json.dumps(other))
    assert "NF4 quantize" not in tables.floors(folder)
    assert "NF4 dequantize" in tables.floors(folder)
    table = tables.training_step(folder)
    assert table.count("| 2.00 (2.00–2.00) | 1.67 (1.67–1.67) |") == 3
    assert table.count("`python benchmarks/x.py`") == 1  # the three runs have the same conditions


def test_commands_are_in_seconds_and_need_no_peer(written):
    points = {"import": {"jlora": (0.5, {}), "peft": (9.0, {})}, "--help": {"jlora": (0.25, {})}}
    rows = tables.commands(written("startup-commands", points)).splitlines()[2:4]
    assert rows == ["| import | 0.50 s | 9.00 s |", "| --help | 0.25 s |  |"]


def test_a_table_without_results_says_so(tmp_path):
    page = "<!-- table: naps -->\n<!-- end -->"
    assert "Not measured yet: there is no `results/naps.json`." in tables.made(page, tmp_path)


def test_every_benchmark_names_existing_contestants_and_has_a_table(tmp_path, monkeypatch):
    """Runs ``all.py``'s commands without measuring: arguments must fit their functions."""
    monkeypatch.syspath_prepend(str(FOLDER))
    setups = []

    def measure(contestants, repeats, warmup=1):
        for one in contestants:
            module, _, function = one.setup.partition(":")
            setup = getattr(importlib.import_module(module), function)
            inspect.signature(setup).bind(**json.loads(json.dumps(one.arguments)))
            setups.append(one.setup)
        one = {"median": 1.0, "seconds": [1.0] * repeats, "peak_bytes": 1}
        one |= {"wall": 1.0, "others": 0.0}
        facts = {"flops": 1e9}
        found = {
            "profile_step:profiled": {"groups": dict.fromkeys(tables.GROUPS, 1.0)},
            "predicted:steps": {"predicted": 1, "measured": 1},
        }
        return {c.name: one | {"facts": found.get(c.setup, facts)} for c in contestants}

    class Worker:
        def __init__(self, contestant):
            measure([contestant], 1)

        def end(self):
            pass

    monkeypatch.setattr(paired, "measure", measure)
    monkeypatch.setattr(paired, "Worker", Worker)
    monkeypatch.setattr(paired, "RESULTS", tmp_path / "benchmarks/results")
    monkeypatch.setattr(paired, "HERE", tmp_path / "benchmarks")
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    monkeypatch.setattr(paired, "_wait_for_quiet", lambda anyway: 0.0)
    commands = load("all").COMMANDS[:-1]
    for command in commands:
        script, *arguments = command.split()
        monkeypatch.setattr(sys, "argv", [script, *arguments, "--anyway"])
        load(script.removesuffix(".py")).main()
    scripts = {command.split(".py")[0] for command in commands}
    shared = {"adapters"}  # it uses another script's contestants
    assert {setup.partition(":")[0] for setup in setups} == scripts - shared
    for name in ("memory-*.json", "compiled-step.json"):  # these need the target's compiler
        for path in tables.RESULTS.glob(name):
            (paired.RESULTS / path.name).write_bytes(path.read_bytes())
    page = tables.PAGE.read_text(encoding="utf-8")
    assert "Not measured yet" not in tables.made(page, paired.RESULTS)
    shown = {found[2] for found in tables.TABLE.finditer(page)} | {
        f"training-step-{method}" for method in tables.METHODS
    }
    assert {path.stem for path in paired.RESULTS.glob("*.json")} <= shown


def test_the_compiled_steps_table_shows_what_changed(tmp_path):
    old = {"flops": 2e12, "bytes": 3 * 2**30, "sent": 0, "peak": 2**30, "tokens": 100, "jax": "1"}
    old["seconds"] = {"compute": 0.1, "memory": 0.25}
    new = old | {"bytes": 2 * 2**30, "seconds": {"compute": 0.1, "memory": 0.05}}
    results = {"before": old, "after": new}
    document = {k: {"cases": {"LoRA": v}, "date": "2026-01-01"} for k, v in results.items()}
    (tmp_path / "compiled-step.json").write_text(json.dumps(document))
    lines = tables.compiled_step(tmp_path).splitlines()
    assert lines[2] == "| LoRA | 2 | 3 → 2 | 0.0 | 1.00 | 100 | 250 → 50 | 0 | 400 → 1,000 |"
    assert lines[-1] == "On each device; jax 1, 2026-01-01."


def test_the_memory_table_has_a_row_per_model_and_the_papers_figures(tmp_path):
    row = {"peak": 7_123_000_000, "host": 0}
    results = {
        "7B": {"LoRA r 16, adamw": row, "QLoRA r 16, paged": {**row, "host": 250_000_000}},
        "8B": {"LoRA r 16, adamw": {"refused": "too large"}},
    }
    document = {"results": results, "jax": "1", "date": "2026-01-01", "batch": [1, 512]}
    file = tmp_path / "memory-x.json"
    file.write_text(json.dumps({**document, "paper": {"7B": 6.9, "65B": 45.0}}))
    lines = tables.memory("x", tmp_path).splitlines()
    assert lines[0] == "| model | LoRA r 16, adamw | QLoRA r 16, paged | QLoRA's paper |"
    assert lines[2] == "| 7B | 7.12 | 7.12 (0.25) | 6.9 |"
    assert lines[3] == "| 8B | does not compile |  |  |"
    assert lines[-1] == "Compiled for x with jax 1, 1 × 512, 2026-01-01."
    file.write_text(json.dumps({**document, "paper": {"65B": 45.0}}))
    assert "paper" not in tables.memory("x", tmp_path)


@pytest.mark.slow
def test_what_cannot_fit_is_not_compiled(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    memory = load("memory")
    small = memory.llama(64, 128, 2, 1, vocab_size=256)
    got = memory.measure(small, memory.Row(4), 1, 64, None, limit=1e4)
    assert re.fullmatch(r"weights, adapter and moments take [\d,]+ bytes", got["refused"])
    with jax.numpy_dtype_promotion("standard"):  # optax does not promote strictly
        assert memory.measure(small, memory.Row(4), 1, 64, None, limit=1e9)["peak"] < 1e9


def test_floors_of_quantized_products_need_no_device(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", ["nf4_matmul.py", "--floor"])
    load("nf4_matmul").main()
    one_row = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("| 1 |"))
    size, bandwidth, lanes = 4096 * 14_336, 4.8e12, 132 * 128 * 1.98e9
    # Decoding dominates, with 43 and 13 operations a value; the first method rereads the matrix.
    seconds = 43 * size / lanes + 2 * size / bandwidth, 13 * size / lanes
    printed = [float(cell) for cell in one_row.split("|")[2:4]]
    assert printed == pytest.approx([1e6 * s for s in seconds], abs=0.5)


def test_the_plan_page_matches_its_results(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    fits = load("fits")
    page = fits.PAGE.read_text(encoding="utf-8")
    shown = page.split(fits.BEGIN)[1].split(fits.END)[0]
    assert shown.strip() == fits.table(json.loads(fits.RESULTS.read_text()))


HLO = """
%fused_dot (a: bf16[64,32], b: bf16[32,48]) -> f32[64,48] {
  %a = bf16[64,32]{1,0} parameter(0)
  ROOT %dot.1 = f32[64,48]{1,0} dot(%a, %b), lhs_contracting_dims={1}
}
%fused_ids (i: s32[64]) -> s32[64] {
  ROOT %add.1 = s32[64]{0} add(%i, %i)
}
ENTRY %main (x: bf16[64,32]) -> f32[64,48] {
  %x = bf16[64,32]{1,0} parameter(0)
  %w = bf16[32,48]{1,0} parameter(1)
  %inner = bf16[64,16]{1,0} parameter(2)
  %up = bf16[16,48]{1,0} parameter(3)
  %codes = u8[32,24]{1,0} parameter(4)
  %base = f32[64,48]{1,0} fusion(%x, %w), calls=%fused_dot, metadata={op_name="jit(features)/dot"}
  %delta = f32[64,48]{1,0} fusion(%inner, %up), calls=%fused_dot, metadata={op_name="jit(features)"}
  %scores = f32[64,64]{1,0} dot(%x, %x), metadata={op_name="jit(features)/bhqd,bhkd->bhqk/dot"}
  %logits = f32[64,99]{1,0} dot(%x, %w), metadata={op_name="jit(head)/dot_general"}
  %dense = bf16[32,48]{1,0} fusion(%codes), calls=%fused_ids, metadata={op_name="jit(features)"}
  %chosen = f32[64,48]{1,0} dot(%x, %w), metadata={op_name="jit(features)/cond/branch_0_fun/dot"}
  %softmax = f32[64]{0} fusion(%x), metadata={op_name="jit(features)/cond/branch_0_fun/while/exp"}
  %dynamic-update-slice.3 = bf16[8,64]{1,0} fusion(%x), calls=%fused_ids
  %norm = f32[64]{0} fusion(%x), calls=%fused_ids, metadata={op_name="jit(features)/rsqrt"}
  %moment = f32[64]{0} fusion(%x), calls=%fused_ids, metadata={op_name="jit(train_step)/adam"}
}
"""


@pytest.mark.parametrize("share", [9.0, 1.0, 0.9], ids=["always", "what fits", "less than that"])
def test_the_longest_row_is_found_in_few_compilations(monkeypatch, share):
    """Above a share of the limit the compiler refuses without reporting a size."""
    monkeypatch.syspath_prepend(str(FOLDER))
    fits = load("fits")
    lengths, compilations = range(0, fits.LONGEST + 1, fits.STEP), []
    for start, slope, bend in itertools.product((1, 7, 20), (0.02, 0.2, 2.0), (0.0, 0.3)):

        def peak(n, start=start, slope=slope, bend=bend):
            size = int(start * 1e9 + slope * 1e6 * n * (1 + bend * n / fits.LONGEST))
            return size if size < share * 17e9 else fits.REFUSED

        low, seen = fits.search(peak, 17e9, fits.FIRST[0])
        assert low == max(n for n in lengths if not n or peak(n) <= 17e9)
        compilations.append(len(seen))
    assert max(compilations) <= 12


def test_operations_are_grouped_by_purpose(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    profile = load("profile_step")
    ops = profile.operations(HLO)
    expected = {
        "base": "base",
        "delta": "adapter",
        "scores": "attention",
        "chosen": "base",
        "softmax": "attention",
        "logits": "head",
        "dense": "unpack",
        "dynamic-update-slice.3": "kept",
        "norm": "rest",
        "moment": "update",
    }
    assert {name: profile.group_of(name, ops[name], 16) for name in expected} == expected
    assert profile.group_of("delta", ops["delta"], None) == "base"


def test_concurrent_operations_share_the_elapsed_time(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    profile = load("profile_step")
    events = [("while.1", 0, 100), ("dot.1", 10, 30), ("dot.2", 20, 40), ("dot.1", 70, 6)]
    trace = [{"args": {"hlo_op": name}, "ts": at, "dur": dur} for name, at, dur in events]
    with gzip.open(tmp_path / "x.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": [{"ph": "M"}, *trace]}, file)
    seconds = profile._seconds(str(tmp_path))
    per_step = 1e-6 / profile.STEPS
    assert seconds == pytest.approx({"dot.1": 26 * per_step, "dot.2": 30 * per_step})


def test_the_page_matches_the_results():
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.made(page) == page, "run python benchmarks/tables.py"


def test_results_contain_no_temporary_paths():
    for path in tables.RESULTS.glob("*.json"):
        assert "/tmp" not in path.read_text(encoding="utf-8"), path.name
