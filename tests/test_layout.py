"""The direction of imports, and the sizes of files: docs/architecture.md held against the code.

The two tables of layers are read from that page, the imports from the syntax trees.
"""

import ast
import functools
import re
from pathlib import Path

import pytest

import jlora

PACKAGE = Path(jlora.__file__).parent
ROOT = PACKAGE.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")

COMMAND_ROOMS = ("cli", "errors", "files")
"""Files at the top of the package that are no commands."""

NEVER = {"training": {"models"}, "lora": {"quant"}, "quant": {"lora"}, "interop": {"models"}}

WITHOUT_JAX = {"errors", "files", "config", "cli", "ui", "data"}


def table(heading: str) -> dict[str, str]:
    """First cell → second cell of the table under a heading of the page."""
    _, _, section = PAGE.partition(f"\n{heading}\n")
    assert section, f"docs/architecture.md has no heading {heading!r}"
    rows: dict[str, str] = {}
    for line in section.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            rows[cells[0].strip("`")] = cells[1]
        elif rows:
            break
    return dict(list(rows.items())[2:])  # without the heads and the rule below them


def names(cell: str) -> set[str]:
    return set(re.findall(r"`([a-z0-9_]+)`", cell))


LAYERS = [names(cell) for cell in table("## Layers").values()]
"""Lowest first: a room imports from lower layers only."""

INSIDE = {
    folder: [names(group) for group in cell.split("←")]
    for folder, cell in table("### Inside the folders").items()
}
"""Folder → its files and sub-folders, lowest first, in the same way."""


@functools.cache
def files() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "assets" not in p.parts)


def parts_of(path: Path) -> tuple[str, ...]:
    """A file's module below the package: ``("io", "hf", "read")``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


@functools.cache
def imports(path: Path, outermost_only: bool = False) -> frozenset[str]:
    """Everything that a file imports, as dotted names."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if outermost_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def imported(path: Path) -> list[tuple[str, ...]]:
    """The modules of the package that a file imports, as parts; names in them come last."""
    dotted = [name.split(".")[1:] for name in imports(path) if name.startswith("jlora.")]
    return [tuple(parts) for parts in dotted]


def level(name: str, layers: list[set[str]], where: str) -> int:
    found = [i for i, layer in enumerate(layers) if name in layer]
    assert len(found) == 1, f"{where}: {name} is in {len(found)} layers of docs/architecture.md"
    return found[0]


def test_every_room_has_a_layer():
    present = {parts_of(path)[0] for path in files() if parts_of(path)} - {"__main__"}
    assert present == set().union(*LAYERS)


def test_the_top_holds_commands_and_folders_only():
    from jlora.cli import COMMANDS

    commands = {command.module.split(".")[1] for command in COMMANDS.values()}
    top = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert top - set(COMMAND_ROOMS) == commands - {"plan"}


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    room = parts_of(path)[:1]
    if room in ((), ("__main__",)):
        return
    for other in imported(path):
        if other[0] == room[0] or other[0] == "__version__":
            continue
        own, below = (level(name, LAYERS, str(path)) for name in (room[0], other[0]))
        assert below < own, f"{path.name}: {room[0]} imports {'.'.join(other)}"
        assert other[0] not in NEVER.get(room[0], set()), f"{room[0]} imports {other[0]}"


def test_every_file_of_a_folder_has_a_place_in_it():
    for folder, layers in INSIDE.items():
        found = PACKAGE.joinpath(folder).iterdir()
        present = {p.stem for p in found if p.suffix == ".py" or (p / "__init__.py").exists()}
        assert present - {"__init__", "__main__"} == set().union(*layers), folder


def test_folders_with_an_order_of_their_own_are_in_the_table():
    sizes: dict[str, int] = {}
    for path in files():
        folder = "/".join(path.relative_to(PACKAGE).parts[:-1])
        sizes[folder] = sizes.get(folder, 0) + (path.stem not in ("__init__", "__main__"))
    large = {folder for folder, n in sizes.items() if folder and n > 2}
    assert large - {"models/families", "config"} <= set(INSIDE)


@pytest.mark.parametrize("folder", INSIDE)
def test_imports_go_down_within_a_folder(folder):
    prefix = tuple(folder.split("/"))
    for path in PACKAGE.joinpath(folder).rglob("*.py"):
        parts = parts_of(path)
        if len(parts) <= len(prefix) or parts[-1] == "__main__":  # the folder's own __init__
            continue
        name = parts[len(prefix)]
        for other in imported(path):
            if other[: len(prefix)] != prefix or len(other) <= len(prefix):
                continue
            sibling = other[len(prefix)]
            if sibling == name or not any(sibling in layer for layer in INSIDE[folder]):
                continue  # itself, or a name that the folder's __init__ re-exports
            own, below = (level(n, INSIDE[folder], folder) for n in (name, sibling))
            assert below < own, f"{path.relative_to(PACKAGE)} imports {'.'.join(other)}"


def test_init_files_hold_no_logic():
    for path in files():
        if path.name != "__init__.py" or path.parent == PACKAGE:
            continue
        for node in ast.parse(path.read_text()).body:
            literal = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            listing = (
                isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
            )
            assert literal or listing or isinstance(node, ast.Import | ast.ImportFrom), path


def test_the_package_imports_nothing_of_its_own_at_once():
    assert not any(n.startswith("jlora") for n in imports(PACKAGE / "__init__.py", True))


def test_settings_and_errors_import_nothing_heavy():
    heavy = {"jax", "flax", "optax", "orbax", "transformers", "datasets", "torch"}
    for path in files():
        if parts_of(path)[:1] and parts_of(path)[0] in WITHOUT_JAX:
            roots = {name.split(".")[0] for name in imports(path, outermost_only=True)}
            assert not roots & heavy, path


def test_nothing_unpickles_and_no_torch():
    for path in files():
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"torch", "peft", "bitsandbytes", "pickle", "marshal", "shelve"}, path


def test_files_are_short():
    lengths = {path: len(path.read_text().splitlines()) for path in files()}
    long = {str(path): n for path, n in lengths.items() if n > 400}
    assert not long
    assert sorted(lengths.values())[len(lengths) // 2] <= 150


def test_no_drawers():
    stems = {path.stem for path in files()} | {path.parent.name for path in files()}
    assert not stems & {"utils", "util", "helpers", "misc", "common", "_src"}


def test_tests_are_named_for_rooms():
    """A test file is named for a module, or for what several do together."""
    together = {"layout", "public_names", "configs", "configuration_page", "quickstart", "devices"}
    together |= {"launchers", "aot", "readme", "benchmarks", "classification"}
    rooms = {"_".join(parts_of(path)) for path in files()} - {""}
    rooms |= {"_".join(parts_of(path)[:n]) for path in files() for n in (1, 2)} - {""}
    for path in (ROOT / "tests").glob("test_*.py"):
        name = path.stem.removeprefix("test_").removeprefix("parity_")
        assert any(f"{name}_".startswith(f"{known}_") for known in rooms | together), path.name
