"""``jlora plan``, its targets, and the memory check that training makes before its first step."""

import json
import math
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_plans import load, looked
from tiny_runs import OFF

from jlora import cli, train
from jlora.errors import ConfigError
from jlora.io.hf.read import LoadingCancelledError
from jlora.plan import check, target
from jlora.plan.check import compiled_beside
from jlora.plan.forecast import Rows
from jlora.run import batches
from jlora.run.open_tokenizer import open_tokenizer
from jlora.run.train_step import TrainStep


def plan(place, capsys, *arguments, **sections):
    code = cli.main("plan", [str(place.write(**sections)), OFF, *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_says_what_it_found(place, standard_promotion, capsys):
    code, out, _ = plan(place, capsys, "train.max_steps=-1", "train.num_train_epochs=2")
    assert code == 0
    assert "8 × cpu" in out and "fits: " in out and "ESTIMATED" not in out
    rows = batches.prepare_rows(load(place), open_tokenizer(load(place)), "train")
    steps = math.ceil(len(rows.packed) / (2 * 2 * 8))
    assert f"{2 * steps} ({steps} an epoch of {rows.tokens} tokens" in out.replace(",", "")


def test_json_holds_the_same(place, standard_promotion, capsys):
    code, out, _ = plan(place, capsys, "--json")
    got = json.loads(out)
    assert code == 0 and got["fits"] and got["figures"] == "compiled" and got["devices"] == 8
    direct = looked(load(place), 8, Rows(got["batch"]["length"]))
    assert got["memory"]["peak"] == direct.memory.peak
    assert got["work"]["flops"] == direct.work.flops
    assert got["batch"]["rows_per_step"] == 2 * 2 * 8 and got["steps"] == 8
    assert got["checkpoint"] == {"bytes": direct.state_bytes, "kept": 3}


def test_no_weight_is_read(place, standard_promotion, capsys):
    (place.folder / "bare").mkdir()
    text = (place.base / "config.json").read_text()
    (place.folder / "bare" / "config.json").write_text(text)
    code, out, _ = plan(place, capsys, "--json", model={"name_or_path": str(place.folder / "bare")})
    got = json.loads(out)
    assert code == 0 and got["steps"] == 8 and got["steps_per_epoch"] is None


@pytest.mark.slow
def test_what_does_not_fit_exits_2_with_remedies_that_hold(
    place, standard_promotion, capsys, monkeypatch
):
    """The effect of every change is what ``plan`` says of the changed settings."""
    sections = {"train": {"gradient_checkpointing": False, "per_device_train_batch_size": 4}}
    _, out, _ = plan(place, capsys, "--json", **sections)
    peak = json.loads(out)["memory"]["peak"]
    monkeypatch.setattr(target, "main_memory", lambda: 8 * (peak - 1))
    code, out, err = plan(place, capsys, "--json", **sections)
    got = json.loads(out)
    assert code == 2 and not got["fits"] and got["memory"]["peak"] == peak
    assert "does not fit" in err and "fix: one or more of these" in err
    named = [" ".join(one["settings"]) for one in got["remedies"]]
    order = [
        "train.gradient_checkpointing=true",
        "train.per_device_train_batch_size=1 train.gradient_accumulation_steps=8",
        "mesh.fsdp=-1 mesh.data=1",
        "train.optim=paged_adamw_32bit",
        "train.optim=adamw_8bit",
        "quantization.load_in_4bit=true",
    ]
    assert named == order
    for one in got["remedies"][1:2]:
        _, out, _ = plan(place, capsys, "--json", *one["settings"], **sections)
        again = json.loads(out)
        assert again["memory"]["peak"] == one["peak"] and again["fits"] == one["fits"]
    assert got["remedies"][1]["fits"]
    assert all(one["fits"] == (one["peak"] < peak) for one in got["remedies"])
    assert all(setting in err for one in named for setting in one.split())


@pytest.mark.slow
def test_training_refuses_what_does_not_fit_unless_told(place, monkeypatch, standard_promotion):
    place.settings_for_loss()
    place.defaults["train"] = {"optim": "sgd"}  # two remedies, each compiles the step once more
    peak = looked(load(place), 1, count_work=False).memory.peak
    monkeypatch.setattr(target, "main_memory", lambda: peak - 1)
    with pytest.raises(ConfigError, match="does not fit") as caught:
        place.run()
    assert caught.value.exit_code == 2
    assert "train.check_memory=false" in caught.value.fix
    assert "quantization.load_in_4bit=true" in caught.value.fix
    assert not (place.output / "metrics.jsonl").exists()
    place.run(train={"check_memory": False, "max_steps": 1, "logging_steps": 1})
    assert len(place.losses()) == 1


def out_of_memory(*_, **__):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")


def test_weights_load_while_the_step_compiles(place, monkeypatch):
    """Neither ends before the other has begun."""
    place.settings_for_loss()
    loading, compiling = threading.Event(), threading.Event()
    compile_step, load = TrainStep.compile, train.open_job

    def compile_late(program):
        compiling.set()
        assert loading.wait(60)
        return compile_step(program)

    def load_late(*arguments, **more):
        loading.set()
        assert compiling.wait(60)
        return load(*arguments, **more)

    monkeypatch.setattr(TrainStep, "compile", compile_late)
    monkeypatch.setattr(train, "open_job", load_late)
    place.run(train={"max_steps": 1, "logging_steps": 1})
    assert len(place.losses()) == 1


def program_on(platform, compile):
    """A stub of a TrainStep that is compiled for a device of this platform."""
    memory = {"process_index": 0, "memory_stats": lambda: {"bytes_limit": 1}}
    device = SimpleNamespace(platform=platform, device_kind="stub", **memory)
    settings = SimpleNamespace(train=SimpleNamespace(check_memory=False))
    job = SimpleNamespace(config=settings, mesh=SimpleNamespace(devices=np.array([device])))
    return SimpleNamespace(job=job, compile=compile)


@pytest.mark.parametrize("platform", ["gpu", "cpu", "tpu"])
def test_nothing_loads_while_kernels_are_timed(platform):
    """On GPUs the block starts when the step is compiled; elsewhere the compiler waits for it."""
    block_began = threading.Event()

    def compile():
        # On a GPU the block must not begin: its absence can only be waited for.
        return block_began.wait(0.5 if platform == "gpu" else 60)

    with compiled_beside([program_on(platform, compile)], rows=None) as compilation:
        assert compilation.is_done == (platform == "gpu")
        block_began.set()
        assert compilation.result()[1] == (platform != "gpu")


def test_without_a_step_nothing_is_loaded_where_kernels_are_timed():
    def fail():
        raise jax.errors.JaxRuntimeError("INTERNAL: the compiler failed")

    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="the compiler failed"),
        compiled_beside([program_on("gpu", fail)], rows=None),
    ):
        pytest.fail("loading began")


@pytest.fixture
def kernels_are_timed(monkeypatch):
    """The devices of a run are treated as GPUs where loading and compiling are ordered."""
    for module in (check, train):
        monkeypatch.setattr(module, "times_kernels", lambda mesh: True)


def test_a_run_says_that_it_compiles_before_it_loads(place, kernels_are_timed, capsys):
    place.settings_for_loss()
    place.run(train={"max_steps": 1, "logging_steps": 1})
    notes = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" …")]
    assert notes[-2:] == ["compiling …", f"loading {place.base} …"]
    assert len(place.losses()) == 1


def test_a_refusal_comes_before_loading_where_kernels_are_timed(
    place, kernels_are_timed, monkeypatch, standard_promotion
):
    place.settings_for_loss()
    place.defaults["train"] = {"optim": "sgd"}  # two remedies, each compiles the step once more
    peak = looked(load(place), 1, count_work=False).memory.peak
    monkeypatch.setattr(target, "main_memory", lambda: peak - 1)
    monkeypatch.setattr(train, "open_job", lambda *_, **__: pytest.fail("loading began"))
    with pytest.raises(ConfigError, match="does not fit"):
        place.run()


@pytest.mark.parametrize("reports", [True, False], ids=["reading on", "memory full"])
def test_a_refusal_ends_the_loading(place, monkeypatch, standard_promotion, reports):
    """Loading is cancelled between two tensors; what runs out of memory is told as the refusal."""
    place.settings_for_loss()
    place.defaults["train"] = {"optim": "sgd"}  # two remedies, each compiles the step once more
    peak = looked(load(place), 1, count_work=False).memory.peak
    monkeypatch.setattr(target, "main_memory", lambda: peak - 1)

    def read(*_, cancel, **__):
        for _ in range(6000 if reports else 0):
            if cancel():
                raise LoadingCancelledError
            time.sleep(0.01)
        assert not reports, "nothing ended the loading"
        out_of_memory()

    monkeypatch.setattr(train, "open_job", read)
    with pytest.raises(ConfigError, match="does not fit"):
        place.run()


def test_a_fault_of_the_compiler_ends_the_loading_and_is_told(place, monkeypatch):
    place.settings_for_loss()

    def fail(_):
        raise jax.errors.JaxRuntimeError("INTERNAL: the compiler failed")

    def read(*_, cancel, **__):
        for _ in range(6000):
            if cancel():
                raise LoadingCancelledError
            time.sleep(0.01)
        raise AssertionError("nothing ended the loading")

    monkeypatch.setattr(TrainStep, "compile", fail)
    monkeypatch.setattr(train, "open_job", read)
    with pytest.raises(jax.errors.JaxRuntimeError, match="the compiler failed"):
        place.run()


def test_a_fault_in_loading_is_told_as_what_it_is(place, monkeypatch):
    """Also when memory is full and the step itself would fit."""
    place.settings_for_loss()
    monkeypatch.setattr(train, "open_job", out_of_memory)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        place.run()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("h20x8", "did you mean 'h200'"),
        ("gpu", "one of rtx4090"),
        ("h200x16", "one node has up to 8"),
        ("v5e-3", "a slice has 1, 4, 8"),
    ],
)
def test_unknown_targets_are_refused(place, capsys, name, said):
    code, _, err = plan(place, capsys, "--target", name)
    assert code == 2 and said in err and f"--target {name}" in err


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [("h200", "h200", 1), ("a100-80x4", "a100-80", 4), ("a100-80", "a100-80", 1),
     ("v5e-16", "v5e", 16), ("rtx4090x1", "rtx4090", 1)],
)  # fmt: skip
def test_targets_are_read(name, kind, count):
    aim = target.parse_target(name)
    assert (aim.hardware.name, aim.count) == (kind, count)
    assert target.parse_target(aim.name) == aim
