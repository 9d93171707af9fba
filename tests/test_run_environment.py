"""The compilation cache and its folder; and the memory of GPUs that commands take."""

import os
from types import SimpleNamespace

import jax
import pytest
import tiny_runs

from jlora import cli
from jlora.errors import ConfigError
from jlora.run import environment


@pytest.fixture
def cache_settings():
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_in_the_users_cache(tmp_path, cache_settings):
    folder = environment.enable_compilation_cache({"XDG_CACHE_HOME": str(tmp_path)})
    assert folder.parent == tmp_path / "jlora"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    environ = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own")}
    assert environment.enable_compilation_cache(environ) == tmp_path / "own"


def test_an_unwritable_cache_folder_is_not_an_error(tmp_path, cache_settings):
    (tmp_path / "file").write_text("")
    before = jax.config.jax_compilation_cache_dir
    assert environment.enable_compilation_cache({"XDG_CACHE_HOME": str(tmp_path / "file")}) is None
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.parametrize(("given", "taken"), [(None, "0.92"), ("", "0.92"), ("0.5", "0.5")])
def test_commands_take_most_of_a_gpu_before_jax_starts(place, monkeypatch, given, taken):
    """What the planner counts, with or without the scripts."""
    monkeypatch.setenv(environment.MEMORY_FRACTION, given or "")
    if given is None:
        monkeypatch.delenv(environment.MEMORY_FRACTION)
    seen = []
    command = SimpleNamespace(run=lambda *_: seen.append(os.environ[environment.MEMORY_FRACTION]))
    monkeypatch.setattr(cli.importlib, "import_module", lambda _: command)
    assert cli.main("train", [str(place.write()), tiny_runs.OFF]) == 0
    assert seen == [taken] and environment.memory_fraction() == float(taken)


def test_the_newer_name_of_the_variable_is_kept_alone():
    """JAX refuses to start where both names are set."""
    environ = {environment.NEW_MEMORY_FRACTION: "0.8"}
    environment.reserve_gpu_memory(environ)
    assert environ == {environment.NEW_MEMORY_FRACTION: "0.8"}
    assert environment.memory_fraction(environ) == 0.8
    with pytest.raises(ConfigError, match="both set"):
        environment.reserve_gpu_memory(environ | {environment.MEMORY_FRACTION: "0.8"})


def test_a_fraction_that_is_no_number_is_an_error(place, monkeypatch, capsys):
    monkeypatch.setenv(environment.MEMORY_FRACTION, "most")
    assert place.main() == 2
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION='most'" in capsys.readouterr().err
