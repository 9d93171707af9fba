import errno
import os
import signal
import subprocess
import sys
import types

import pytest

from jlora import cli, config, errors

MINIMAL = """\
model: {name_or_path: org/base}
data: {train: [{path: org/rows, format: messages}]}
train: {output_dir: out}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL)
    return str(path)


READ = ("model", "data")


@pytest.fixture
def command(monkeypatch):
    """Registers a command ``probe`` and returns the list of its calls' arguments."""
    calls = []
    module = types.ModuleType("probe_command")
    module.run = lambda settings, options: calls.append((settings, options))  # pyright: ignore
    monkeypatch.setitem(sys.modules, "probe_command", module)
    flags = {"--fast": {"action": "store_true", "help": "hurry"}}
    monkeypatch.setitem(cli.COMMANDS, "probe", cli.Command("probe_command", "look", READ, flags))
    return calls


def test_a_command_gets_its_settings_and_options(command, file):
    assert cli.main("probe", [file, "lora.r=4", "--fast", "mesh.data=2"]) == 0
    ((settings, options),) = command
    assert settings == config.load(file, ["lora.r=4", "mesh.data=2"])
    assert options.fast and not options.debug
    assert cli.dispatch(["probe", file]) == 0 and not command[1][1].fast


def test_help_lists_the_settings_that_a_command_reads(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main("probe", ["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--fast" in text and "CONFIG.yaml" in text
    read = [option for option in config.options() if option.section.split(".")[0] in READ]
    assert {option.section for option in read} >= {"model", "data", "data.train.0"}
    for option in read:
        default = "required" if option.default is None else option.default
        assert f"\n  {option.field} = {default}\n" in text
    unwrapped = " ".join(text.split())
    assert all(option.section_help in unwrapped for option in read)
    assert all(" ".join(option.help.split()) in unwrapped for option in read)
    for option in config.options():
        assert (f"\n{option.section}: " in text) == (option in read), option


def test_every_section_is_read_by_a_command():
    read = {section for command in cli.COMMANDS.values() for section in command.sections}
    assert read == {option.section.split(".")[0] for option in config.options()}


@pytest.mark.parametrize("argv", [[], ["--nonsense", "c.yaml"], ["c.yaml", "--fas"]])
def test_incorrect_usage_exits_2(command, argv):
    with pytest.raises(SystemExit) as stopped:
        cli.main("probe", argv)
    assert stopped.value.code == 2 and not command


def test_an_invalid_setting_exits_2_before_the_command_is_imported(monkeypatch, capsys, file):
    monkeypatch.setitem(cli.COMMANDS, "probe", cli.Command("no_such_module", "look", READ))
    assert cli.main("probe", [file, "lora.rr=1"]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        "error: override 'lora.rr=1': lora.rr: unknown key\n  fix: did you mean 'r'?\n"
    )
    assert not captured.out


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["train", "--help"], ["trian"]])
def test_help_imports_nothing_slow(argv):
    """It takes a quarter of a second, Python's start included; importing jax takes one or two."""
    code = f"""
import sys
from jlora import cli
try:
    cli.dispatch({argv})
except SystemExit:
    pass
slow = {{"jax", "flax", "optax", "transformers", "datasets", "torch", "orbax", "numpy", "rich"}}
print(sorted(slow & set(sys.modules)))
"""
    env = os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(cli.__file__))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout.splitlines()[-1] == "[]"


PROBE = """
import sys

def run(config, options):
    from transformers import AutoTokenizer  # imports torch where it is found
    print(sys.modules.get("torch"))
"""


@pytest.mark.parametrize("start", ["cli.entry()", "cli.main('probe')"])
def test_a_command_in_its_own_process_does_not_import_torch(tmp_path, file, start):
    (tmp_path / "probe_command.py").write_text(PROBE)
    code = f"""
import sys
from jlora import cli
cli.COMMANDS["probe"] = cli.Command("probe_command", "look", ())
sys.argv = ["jlora", *(["probe"] if "entry" in {start!r} else []), {file!r}]
{start}
"""
    path = os.pathsep.join([str(tmp_path), os.path.dirname(os.path.dirname(cli.__file__))])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.stdout == "None\n" and "PyTorch" not in done.stderr


def test_overview_version_and_unknown_commands(capsys):
    assert cli.dispatch(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and c.help in text for name, c in cli.COMMANDS.items())
    assert cli.dispatch(["--version"]) == 0
    assert capsys.readouterr().out == "jlora 0.1.0\n"
    assert cli.dispatch([]) == 2
    assert cli.dispatch(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (errors.ConfigError("c", fix="f"), 2, "error: c\n  fix: f\n"),
        (errors.DataError("c", where="rows:3"), 65, "error: rows:3: c\n"),
        (errors.DivergedError("c"), 70, "error: c\n"),
        (errors.OutputInUseError("c"), 73, "error: c\n"),
        (errors.StorageError("c"), 74, "error: c\n"),
        (errors.StoppedError("c", signum=15), 143, "^c\n"),
        (errors.StoppedError("c", signum=2), 130, "^c\n"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 74, "x: the disk is full"),
        (OSError(errno.EIO, "Input/output error", "x"), 74, "x: cannot be read or written"),
        (RuntimeError("write failed: No space left on device"), 74, "the disk is full"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 1, "per_device_train_batch_size"),
        (ZeroDivisionError("by zero"), 1, "unexpected ZeroDivisionError: by zero\n  fix: run"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(), 128 + signal.SIGPIPE, ""),
    ],
)
def test_exit_codes_with_one_readable_message(error, code, words, capfd):
    def work():
        raise error

    assert cli.guard(work) == code
    captured = capfd.readouterr().err
    assert words in f"^{captured}" and "Traceback" not in captured


def test_debug_shows_the_traceback(capsys):
    def work():
        raise errors.DataError("c")

    assert cli.guard(work, debug=True) == 65
    assert "Traceback" in capsys.readouterr().err


def test_every_command_is_a_module_with_run():
    import importlib

    for name, command in cli.COMMANDS.items():
        module = importlib.import_module(command.module)
        assert callable(module.run) and callable(module.main), name
