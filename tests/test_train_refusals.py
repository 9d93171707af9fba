"""What training refuses, with its exit code, its place and its remedy; what it never runs."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
from tiny_runs import QUANTIZED, chat, write_rows

from jlora.errors import DivergedError

STOP_THERE = {"target_modules": ["nothing"]}
"""Ends a run after the model is loaded and before anything is compiled."""


def test_divergence_exits_70_and_leaves_the_adapter_of_before(place, capfd):
    place.settings_for_loss()
    place.run(train={"max_steps": 1})
    before = place.adapter()
    fast = {"learning_rate": 1e30, "max_grad_norm": None, "resume": "never", "save_steps": 1}
    with pytest.raises(DivergedError) as caught:
        place.run(train=fast)
    assert caught.value.exit_code == 70
    assert "train.learning_rate" in str(caught.value) and "step" in caught.value.where
    assert place.adapter() == before
    assert all("loss" not in line or line["loss"] is not None for line in place.log())


def test_weights_that_overflow_are_not_saved(place, monkeypatch, capsys):
    """And a run on a CPU beside GPUs says so: jax without CUDA falls back without a word."""
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    place.settings_for_loss()
    settings = {"learning_rate": 1e30, "optim": "sgd", "weight_decay": 1e30, "max_steps": 1}
    settings["warmup_ratio"] = 0.0
    with pytest.raises(DivergedError, match="weights that are not finite"):
        place.run(train=settings)
    assert not place.checkpoints() and not (place.output / "adapter_model.safetensors").exists()
    assert "this process uses 0 of 2 GPUs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"optim": "adamw_8bits"}, "did you mean 'adamw_8bit'"),
        ({"optim": "adabelief"}, "or optax.NAME"),
        ({"optim": "adamw", "optim_args": {"b1": 0.8}}, "adamw accepts none"),
        ({"optim": "optax.adabeleif"}, "did you mean 'optax.adabelief'?"),
        ({"optim": "optax.adam", "optim_args": {"beta1": 0.8}}, "has no argument 'beta1'"),
    ],
)
def test_an_unknown_optimizer_exits_2_before_anything_is_read(place, capsys, train, said):
    assert place.main(train=train, model={"name_or_path": str(place.folder)}) == 2
    assert said in capsys.readouterr().err and not place.output.exists()


WITHOUT_WAITING = """
import sys, threading, time
from jlora import cli, errors, train
from jlora.run import train_step
begun = threading.Event()

def compile(self):
    begun.set()
    time.sleep(3600)

def read(*_, **__):
    assert begun.wait(60)
    raise errors.DataError("damaged")

train_step.TrainStep.compile, train.open_job = compile, read
cli.leave(cli.main("train", sys.argv[1:]))
"""


def test_a_fault_in_loading_ends_the_run_while_the_step_compiles(place):
    command = [sys.executable, "-c", WITHOUT_WAITING, str(place.write())]
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(place.cache)}
    run = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=200)
    assert run.returncode == 65 and "damaged" in run.stderr


TOO_LARGE = """
import sys
from jlora import cli
from jlora.distributed import processes
from jlora.plan import target
target.main_memory, processes.FAILURE_BARRIER_SECONDS = lambda: 1000, 120
cli.leave(cli.main("train", sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_refuse_what_does_not_fit(place, two_processes):
    """Both end by themselves; the first one says why."""
    # Settings with a single remedy: each one compiles the step once more, in both processes.
    train = {"per_device_train_batch_size": 1, "optim": "sgd"}
    file = place.write(train=train, quantization=QUANTIZED)
    runs = two_processes(TOO_LARGE, file, XDG_CACHE_HOME=str(place.cache))
    said = [run.communicate(timeout=400)[1] for run in runs]
    assert [run.returncode for run in runs] == [2, 2]
    assert "does not fit" in said[0] and "train.check_memory=false" in said[0]
    assert not (place.output / "metrics.jsonl").exists()


def test_bad_rows_exit_65_naming_file_and_line(place):
    rows = place.folder / "rows.jsonl"
    good = json.dumps(chat("hi", "there"))
    rows.write_text(f'{good}\n{{"messages": [{{"role": "assistent", "content": ""}}]}}\n{{"mess\n')
    source = [{"path": str(rows), "format": "messages"}]
    run = place.command(place.write(data={"train": source}))
    assert run.code == 65 and run.out == "reading and tokenizing the data …\n"
    assert f"error: {rows}:2: messages[0] has the role 'assistent'" in run.err
    assert f"{rows}:3: " in run.err and "did you mean 'assistant'?" in run.err


def test_nothing_to_learn_is_an_error(place, capsys):
    rows = write_rows(place.folder / "rows.jsonl", [chat("a prompt of some length", "reply")] * 3)
    source = [{"path": str(rows), "format": "messages"}]
    assert place.main(data={"train": source, "max_length": 8}) == 65
    said = capsys.readouterr().err
    assert "no token is to be learned" in said and "data.max_length" in said


def test_a_pattern_that_matches_nothing_exits_2_with_near_names(place, capsys):
    assert place.main(lora={"target_modules": ["q_porj", "v_proj"]}) == 2
    said = capsys.readouterr().err
    assert "q_porj" in said and "q_proj" in said.replace("q_porj", "")


def test_a_model_is_not_trained_into_the_folder_of_an_adapter(place, capsys):
    place.output.mkdir()
    (place.output / "adapter_config.json").write_text("{}")
    assert place.main(lora=None) == 2
    assert "train.output_dir: " in (said := capsys.readouterr().err) and "holds an adapter" in said


def test_an_output_folder_that_cannot_be_one_exits_74(place, capsys):
    place.output.write_text("a file")
    assert place.main() == 74
    assert str(place.output) in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB: room for settings and log, not for a checkpoint."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_exits_74_and_says_so(place, small_disk):
    place.output = small_disk / "out"
    place.settings_for_loss()
    run = place.command(place.write(train={"save_steps": 1}))
    assert run.code == 74, run.err
    assert "error: " in run.err and "the disk is full" in run.err
    assert place.checkpoints() == []


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.fixture
def base(place):
    """The place's own copy of its model folder, to spoil."""
    place.base = shutil.copytree(place.base, place.folder / "base")
    return place.base


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_nothing_is_unpickled(place, base, name, capsys):
    marker = place.folder / "marker"
    (base / "model.safetensors").unlink()
    (base / name).write_bytes(pickle.dumps(Bomb(str(marker))))
    assert place.main() in (2, 65)
    said = capsys.readouterr().err
    assert not marker.exists() and "safetensors" in said and "Traceback" not in said


def test_code_in_a_model_folder_does_not_run(place, base, capsys):
    marker = place.folder / "marker"
    (base / "evil.py").write_text(
        f"open({str(marker)!r}, 'w')\nclass Config: pass\nclass Tokenizer: pass\n"
    )
    for name, classes in (
        ("config.json", {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}),
    ):
        settings = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**settings, "auto_map": classes}))
    assert place.main(lora=STOP_THERE) == 2
    assert "nothing" in capsys.readouterr().err, "the model was loaded"
    assert not marker.exists()


def test_a_model_that_only_its_own_code_can_load_is_refused(place, base, capsys):
    marker = place.folder / "marker"
    (base / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\n")
    settings = json.loads((base / "config.json").read_text())
    settings |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (base / "config.json").write_text(json.dumps(settings))
    assert place.main() in (2, 65)
    said = capsys.readouterr().err
    assert "fix: " in said and "Traceback" not in said and not marker.exists()
