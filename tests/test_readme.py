"""README and docs agree with the code: their Python runs, their links and paths exist."""

import functools
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from jlora.config import load

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_setup_is_at_the_top():
    block = re.search(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    assert block.group(1).splitlines() == [
        "pip install -e . && python -m jlora.train configs/quickstart.yaml",
        'pip install -e ".[test]" && pytest',
    ]
    assert block.start() < 200


def blocks_of(page) -> list[str]:
    """A page's Python blocks."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def run_python(page, folder, monkeypatch):
    """Runs a page's Python blocks as one program in ``folder``; returns its names."""
    (folder / "jlora").symlink_to(ROOT / "jlora")
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(
        compile("\n".join(blocks_of(page)), page.name, "exec"), names
    )  # trusted: a page of this repository
    return names


def test_python_example_runs(tmp_path, monkeypatch):
    names = run_python(ROOT / "README.md", tmp_path, monkeypatch)
    assert (tmp_path / "outputs/python-adapter/adapter_model.safetensors").is_file()
    before = names["loss"](names["jlora"].init_adapter(*_initial(names)))
    assert names["loss"](names["adapter"]) < before


def _initial(names: dict) -> tuple:
    return names["jax"].random.key(0), names["params"], names["config"]


def test_links_resolve():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} → {target}"


def test_commands_name_files_that_exist():
    for page in PAGES:
        for config in re.findall(r"configs/[\w.-]+\.yaml", page.read_text(encoding="utf-8")):
            assert (ROOT / config).is_file(), f"{page.name} → {config}"
        for module in re.findall(r"python -m (jlora[\w.]*)", page.read_text(encoding="utf-8")):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or path.is_dir(), f"{page.name} → {module}"


def test_paths_in_pages_exist():
    """Paths in backticks and in commands, except in the log, whose paths may be historical."""
    for page in PAGES:
        if page.name == "log.md":
            continue
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"[` ]((?:jlora|tests|benchmarks|\.ci)/[\w./*]+)", text):
            assert list(ROOT.glob(path.rstrip("."))), f"{page.name} → {path}"


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_modules_in_the_table_of_changes_exist(page):
    table = re.findall(
        r"^\| [^|]+ \| (.+) \|$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE
    )
    modules = {module for cell in table for module in re.findall(r"`([a-z_]+(?:/[a-z_]*)+)`", cell)}
    assert len(modules) > 8
    for module in modules - {"jlora/"}:
        path = ROOT / "jlora" / module
        assert path.is_dir() or path.with_suffix(".py").is_file(), f"{page} → {module}"


def test_combining_adapters_matches_the_page(tmp_path, monkeypatch):
    names = run_python(ROOT / "docs/combining_adapters.md", tmp_path, monkeypatch)
    base = kernel(names["params"])
    one, two, both, less, small, found = (
        kernel(names["jlora"].merge(names["params"], names[name])) - base
        for name in ("one", "two", "both", "less", "small", "found")
    )
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5 * np.abs(one).max())
    plain = names["model"](names["params"], names["ids"])
    np.testing.assert_array_equal(names["off"], plain)
    assert np.abs(names["on"] - plain).max() > 0.1
    close(kernel(names["merged"]), base + one)
    close(kernel(names["back"]), base)
    close(kernel(names["summed"]), base + one + two)
    close(both, 0.7 * one + 0.3 * two)
    close(found, two)
    for got, exact, r in [(less, one - 0.5 * two, 4), (small, both, 8)]:
        u, s, vh = np.linalg.svd(exact, full_matrices=False)
        close(got, u[..., :r] * s[:, None, :r] @ vh[:, :r])
    assert (tmp_path / "outputs/both/adapter_model.safetensors").is_file()


def test_many_adapters_matches_the_page(tmp_path, monkeypatch):
    page = ROOT / "docs/many_adapters.md"
    names = run_python(page, tmp_path, monkeypatch)
    model, params, ids, jlora = (names[n] for n in ("model", "params", "ids", "jlora"))
    alone = {None: model(params, ids)}
    alone |= {n: model(jlora.attach(params, names[n]), ids) for n in ("fr", "de", "it")}
    for got, adapters in (
        ("logits", ("de", None, "fr", "de")),
        ("before", ("de", None, "fr", "de")),
        ("after", ("de", None, "it", "de")),
    ):
        for row, adapter in enumerate(adapters):
            want = np.asarray(alone[adapter][row])
            np.testing.assert_allclose(names[got][row], want, atol=1e-5 * np.abs(want).max())
    assert np.abs(alone["it"] - alone["fr"]).max() > 0.1
    assert names["answer"]._cache_size() == 1
    (settings,) = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "two.yaml").write_text(settings)
    assert load(tmp_path / "two.yaml").adapters == ("first", "second")


def kernel(params) -> np.ndarray:
    return np.asarray(params["model"]["layers"]["self_attn"]["q_proj"]["kernel"])


EXAMPLES = dict(
    zip(
        ["linen", "nnx", "vit", "equinox"],
        blocks_of(ROOT / "docs/your_own_model.md"),
        strict=True,
    )
)


@pytest.mark.parametrize("name", EXAMPLES)
def test_your_own_models_are_adapted_as_the_page_says(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"):  # required by optax.adam
        exec(
            compile(EXAMPLES[name], "your_own_model.md", "exec"), names
        )  # trusted: a page of this repository
    if name == "equinox":
        grads = jax.tree.leaves(names["grads"])
        assert any(np.any(np.asarray(g) != 0) for g in grads)
        return
    jlora, adapter, params = names["jlora"], names["adapter"], names["params"]
    loss = jax.jit(names["loss"])
    assert loss(adapter) < loss(jlora.init_adapter(*_initial(names)))
    loaded = jlora.load_adapter(f"{name}-adapter", params)
    inputs = names["images"] if name == "vit" else names["ids"]
    got = jax.jit(lambda a: names["model"](jlora.attach(params, a), inputs))(loaded)
    np.testing.assert_allclose(got, names["tuned"], rtol=0, atol=1e-5 * np.abs(got).max())
