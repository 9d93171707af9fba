"""What README promises: its Python runs, its links lead somewhere, its reading order exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_set_up_stands_at_the_top():
    block = re.search(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    assert block.group(1).splitlines() == [
        "pip install -e . && python -m jlora.train configs/quickstart.yaml",
        'pip install -e ".[test]" && pytest',
    ]
    assert block.start() < 200


def test_python_example_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "jlora").symlink_to(ROOT / "jlora")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)  # the file is ours
    assert (tmp_path / "outputs/python-adapter/adapter_model.safetensors").is_file()
    before = names["loss"](names["jlora"].init_adapter(*_initial(names)))
    assert names["loss"](names["adapter"]) < before


def _initial(names: dict) -> tuple:
    return names["jax"].random.key(0), names["params"], names["config"]


def test_links_lead_somewhere():
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
