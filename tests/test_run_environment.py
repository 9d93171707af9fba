"""The persistent compilation cache: its folder, and what happens if it is not writable."""

import jax
import pytest

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
