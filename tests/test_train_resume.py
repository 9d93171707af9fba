"""However a run is interrupted, the same command ends in what the uninterrupted run gives."""

import json
import random
import shutil
import signal
import time

import pytest
from tiny_runs import QUANTIZED, RANDOM_AND_TIMED, Place

from jlora import train
from jlora.distributed.lock import RunLock
from jlora.errors import ConfigError, OutputInUseError
from jlora.io.checkpoint import store
from jlora.run.checkpoints import Checkpoints
from jlora.ui import metrics_log

STEPS = 40
LONG = {
    **RANDOM_AND_TIMED["train"],
    "max_steps": STEPS,
    "logging_steps": 1,
    "eval_steps": 9,
    "save_steps": 4,
    "save_total_limit": 2,
}
LONG_RUN = RANDOM_AND_TIMED | {"train": LONG}
KILLS = ["start"] * 3 + ["step"] * 3 + ["save"] * 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_base, tiny_cache):
    """The uninterrupted run; it fills the cache that makes the others' starts quick."""
    place = Place(tmp_path_factory.mktemp("whole"), tiny_base, tiny_cache)
    run = place.command(place.write(**LONG_RUN))
    assert run.code == 0, run.err
    lines = place.log()
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, STEPS + 1)]
    assert [line["step"] for line in lines if "eval_loss" in line] == [9, 18, 27, 36, 40]
    return place


def last_step(place):
    """The step of the last line; 0 before there is one."""
    path = place.output / "metrics.jsonl"
    lines = metrics_log.read_metrics(path) if path.exists() else []
    return lines[-1]["step"] if lines else 0


def saving(place, after):
    """Whether a checkpoint later than ``after`` is being written."""
    folders = (place.output / "checkpoints").glob("*")
    late = [f for f in folders if f.name.isdigit() and int(f.name) > after]
    return any(not (f / "manifest.json").exists() for f in late)


def wait(process, condition, poll_seconds=0.02):
    """Returns as soon as the condition holds or the process has ended."""
    while process.poll() is None and not condition():
        time.sleep(poll_seconds)


def kill_run(place, config, kind, target, rng):
    """Starts the run and kills it after step ``target``; gives the process's exit code.

    ``start``: at a random time of its first seconds; ``step``: once the step is in the log;
    ``save``: while a later checkpoint is being written.
    """
    pause = rng.uniform(0, 3) if kind == "start" else rng.uniform(0, 0.02)
    began = time.monotonic()

    def now():
        step = last_step(place)
        if kind == "start":
            return time.monotonic() - began > pause or step > target + 3
        return step > target + 3 or (saving(place, target) if kind == "save" else step > target)

    process = place.start(config)
    if kind == "save":  # a checkpoint of this size is written in some hundredths of a second
        wait(process, lambda: last_step(place) > target - LONG["save_steps"])
    wait(process, now, poll_seconds=0.002 if kind == "save" else 0.02)
    time.sleep(0 if kind == "start" else pause)
    process.kill()
    process.communicate()
    return process.returncode


def assert_no_trace(place, config, whole):
    """The same command ends in the files of the uninterrupted run."""
    run = place.command(config)
    assert run.code == 0, run.err
    assert place.log() == whole.log()
    assert place.adapter() == whole.adapter()
    assert place.checkpoints() == whole.checkpoints()


@pytest.mark.slow
def test_ten_kills_leave_no_trace(place, whole):
    rng = random.Random(0)
    kinds = rng.sample(KILLS, len(KILLS))
    config, codes = place.write(**LONG_RUN), []
    for number, kind in enumerate(kinds):
        target = (STEPS - 3) * number // len(kinds) + rng.randint(0, 2)
        codes.append(kill_run(place, config, kind, target, rng))
    assert codes.count(-signal.SIGKILL) >= 9, "at most one came after the end"
    assert_no_trace(place, config, whole)


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(place, whole):
    config = place.write(**LONG_RUN)
    for signum, after in ((signal.SIGTERM, 3), (signal.SIGINT, 15)):
        process = place.start(config)
        wait(process, lambda after=after: last_step(place) > after)
        process.send_signal(signum)
        out, err = process.communicate()
        assert process.returncode == 128 + signum, out + err
        step = place.checkpoints()[-1]
        assert err.splitlines()[-2:] == [
            f"stopped and saved at step {step}",
            "  fix: the same command resumes from here",
        ]
        assert after < step < STEPS and last_step(place) == step
    assert place.command(config).code == 0
    assert place.log() == whole.log() and place.adapter() == whole.adapter()


@pytest.mark.slow
def test_8_bit_moments_in_host_memory_resume_to_the_last_bit(place):
    place.settings_for_loss()
    train = {"optim": "paged_adamw_8bit", "max_steps": 5, "save_steps": 2, "logging_steps": 1}
    settings = {"lora": {"r": 64}, "train": train}  # leaves of 4096 values and more
    place.run(**settings)
    adapter, log = place.adapter(), place.log()
    for step in (4, 5):
        shutil.rmtree(place.output / "checkpoints" / str(step))
    (place.output / "adapter_model.safetensors").unlink()
    place.run(**settings)
    assert place.adapter() == adapter and place.log() == log


def test_a_second_run_on_the_same_folder_is_refused(place):
    place.defaults = {"lora": {"target_modules": ["none"]}}  # would end soon, if it began
    with RunLock(place.output):
        run = place.command(place.write())
    assert run.code == OutputInUseError.exit_code == 73
    assert "another run is writing to this folder: process" in run.err and not run.out


class Killed(BaseException):
    pass


def test_dying_between_the_last_evaluation_and_the_last_save_repeats_no_line(place, monkeypatch):
    def save(self, state, progress, save=Checkpoints.save):
        if progress.finished:
            raise Killed
        save(self, state, progress)

    settings = {"train": {"max_steps": 4, "save_steps": 2}}
    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(Killed):
        place.run(**settings)
    monkeypatch.undo()
    before = place.log()
    assert place.checkpoints() == [2, 4] and "eval_loss" in before[-1]
    place.run(**settings)
    assert place.log() == before


@pytest.fixture(scope="module")
def eight_steps(tmp_path_factory, tiny_base, tiny_cache):
    """A finished run, with checkpoints at 3, 6 and 8."""
    place = Place(tmp_path_factory.mktemp("eight"), tiny_base, tiny_cache)
    place.settings_for_loss()
    place.defaults |= RANDOM_AND_TIMED
    place.run()
    return place


@pytest.fixture
def done(place, eight_steps):
    """A copy of it."""
    place.defaults = eight_steps.defaults
    shutil.copytree(eight_steps.output, place.output)
    return place


def test_dying_while_a_checkpoint_is_written_leaves_no_trace(place, eight_steps, monkeypatch):
    """As the kills above, in this process: the files are there, no manifest."""
    place.defaults = eight_steps.defaults

    def seal(folder, content, seal=store._seal):
        if folder.name == "6":
            raise Killed
        seal(folder, content)

    monkeypatch.setattr(store, "_seal", seal)
    with pytest.raises(Killed):
        place.run()
    monkeypatch.undo()
    assert place.checkpoints() == [3] and (place.output / "checkpoints" / "6").is_dir()
    assert place.log() and not (place.output / "adapter_model.safetensors").exists()
    place.run()
    assert place.log() == eight_steps.log() and place.adapter() == eight_steps.adapter()
    assert place.checkpoints() == eight_steps.checkpoints()


def test_an_earlier_checkpoint_by_its_path(done):
    log, adapter = done.log(), done.adapter()
    done.run(f"train.resume={done.output}/checkpoints/3", "train.save_steps=4")
    assert done.log() == log and done.adapter() == adapter
    assert done.checkpoints() == [3, 4, 8], "what came after it is gone"


def test_never_starts_over(done):
    done.run("train.resume=never", "train.max_steps=4")
    assert [line["step"] for line in done.log()] == [2, 4]
    assert done.checkpoints() == [3, 4]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("train.learning_rate=0.02", "train.learning_rate: 0.01 there, 0.02 here"),
        ("train.max_steps=9", "plan.total_steps: 8 there, 9 here"),
        ("data.max_length=32", "data.fingerprint"),
        ("lora.r=8", "lora.r: 4 there, 8 here"),
    ],
)
def test_other_settings_are_refused_by_name_and_change_nothing(done, change, named, monkeypatch):
    """Before a weight is loaded."""
    monkeypatch.setattr(train, "open_job", lambda *_, **__: pytest.fail("loaded"))

    def files():
        every = {path: path.stat().st_mtime_ns for path in done.output.rglob("*")}
        return {path: time for path, time in every.items() if path.name != ".lock"}

    before = files()
    with pytest.raises(ConfigError, match=named):
        done.run(change)
    assert files() == before


def test_a_deleted_log_is_a_warning(done, capsys):
    """A finished run writes its results again; the rest of an unfinished one is logged."""
    adapter, log = done.adapter(), done.output / "metrics.jsonl"
    lines = done.log()
    log.unlink()
    done.run()
    assert "metrics.jsonl lacks 4 of the 4 lines" in capsys.readouterr().out.replace("\n", " ")
    assert done.log() == [] and done.adapter() == adapter
    done.run(f"train.resume={done.output}/checkpoints/6")
    assert done.log() == lines[-1:] and done.adapter() == adapter
    done.run()
    assert done.log() == lines[-1:]


def test_switching_early_stopping_on_is_refused_by_name(done):
    """Its checkpoints hold the best tree besides the state, so leaves would be missing."""
    held_out = {"eval": [{"path": str(done.held_out), "format": "messages"}]}
    with pytest.raises(ConfigError, match=r"train\.early_stopping: False there, True here"):
        done.run("train.early_stopping_patience=2", data=held_out)


@pytest.mark.parametrize("kind", [pytest.param("pissa", marks=pytest.mark.slow), "loftq"])
def test_first_values_of_the_base_are_made_again_to_the_last_bit(place, kind):
    """A and B come from the base again; only what was trained is in a checkpoint."""
    place.settings_for_loss()
    train = {"max_steps": 4, "save_steps": 2, "logging_steps": 1}
    lora = {"init_lora_weights": kind, "use_dora": kind == "pissa"}
    lora["target_modules"] = ["q_proj", "down_proj"]  # an SVD of each is compiled
    settings = {"lora": lora, "train": train}
    if kind == "loftq":
        settings["quantization"] = QUANTIZED
    place.run(**settings)
    adapter, log = place.adapter(), place.log()
    shutil.rmtree(place.output / "checkpoints" / "4")
    (place.output / "adapter_model.safetensors").unlink()
    place.run(**settings)
    assert place.adapter() == adapter and place.log() == log
    config = json.loads((place.output / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    rank = 8 if kind == "pissa" else 4  # what it started from is subtracted, by as many ranks again
    assert rank in {config["r"], *config["rank_pattern"].values()}
