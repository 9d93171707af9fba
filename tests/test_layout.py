"""The direction of imports, and the sizes of files: DESIGN's layout, read from the syntax trees."""

import ast
import functools
from pathlib import Path

import pytest

import jlora

PACKAGE = Path(jlora.__file__).parent
ROOT = PACKAGE.parent

LAYERS = [
    {"errors", "files", "paths", "config", "codebooks"},
    {"targets", "nf4", "int8", "fingerprint", "kept"},
    {"quantization"},
    {"lora", "sharding", "nf4_kernel"},
    {"bases", "combine", "dot", "models"},
    {"optim", "state", "step", "foreign"},
    {"adapter_io", "checkpoint", "data", "metrics", "console", "report", "runtime", "decoding"},
    {"batches", "classes", "described", "evaluation", "header", "job", "loop", "outputs"}
    | {"cli", "plan", "program", "progress"},
    {"train", "inspect_config", "evaluate", "generate", "merge", "export", "quantize"},
]
"""Lowest first: a module imports from lower layers, or from its own where that is not closed."""

CLOSED = [{"nf4", "int8", "targets"}, {"lora", "sharding", "nf4_kernel"}, LAYERS[6], LAYERS[8]]
"""Layers whose members do not know each other."""

NEVER = {
    "optim": {"models"},
    "state": {"models"},
    "step": {"models"},
    "lora": {"nf4", "int8", "quantization"},
}

WITHOUT_JAX = {"errors", "files", "paths", "config", "cli", "metrics", "console"}


@functools.cache
def files() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "assets" not in p.parts)


def module_of(path: Path) -> str:
    """The file's or folder's name below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


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


def ours(path: Path) -> set[str]:
    """Our modules that a file imports, its own aside."""
    names = {name.split(".")[1] for name in imports(path) if name.startswith("jlora.")}
    return (names & set().union(*LAYERS)) - {module_of(path)}


def level(module: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if module in layer)


def test_every_module_has_a_layer():
    present = {module_of(path) for path in files()} - {"__init__", "__main__"}
    assert present == set().union(*LAYERS)


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    module = module_of(path)
    if module in ("__init__", "__main__"):
        return
    for other in ours(path):
        if module in LAYERS[-1] and other == "cli":
            continue
        assert level(other) <= level(module), f"{module} imports {other} from a higher layer"
        closed = any({module, other} <= group for group in CLOSED)
        assert not closed, f"{module} imports its sibling {other}"
        assert other not in NEVER.get(module, set()), f"{module} imports {other}"


def test_the_package_imports_nothing_of_its_own_at_once():
    assert not any(n.startswith("jlora") for n in imports(PACKAGE / "__init__.py", True))


def test_settings_and_errors_import_nothing_heavy():
    heavy = {"jax", "flax", "optax", "orbax", "transformers", "datasets", "torch"}
    for path in files():
        if module_of(path) in WITHOUT_JAX:
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
    names = {path.stem for path in files()} | {path.parent.name for path in files()}
    assert not names & {"utils", "util", "helpers", "misc", "common", "_src"}


def test_tests_mirror_files():
    """A test file is named for a module, or for what several do together."""
    wholes = {"layout", "public_names", "commands", "configs", "configuration_page", "quickstart"}
    wholes |= {
        "hf",
        "main_job",
        "resume",
        "devices",
        "foreign",
        "peers",
        "packaging",
        "launchers",
        "aot",
        "readme",
        "benchmarks",
        "foreign_trees",
    }
    paths = (p.relative_to(PACKAGE).with_suffix("") for p in files())
    names = {(p.parent if p.name == "__init__" else p).parts for p in paths} - {()}
    known = {"_".join(part) for part in names} | {part[-1] for part in names} | wholes
    known |= {part[0] for part in names}
    for path in (ROOT / "tests").glob("test_*.py"):
        name = path.stem.removeprefix("test_").removeprefix("parity_")
        assert any(f"{name}_".startswith(f"{k}_") for k in known), path.name
