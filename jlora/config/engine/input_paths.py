"""Makes input paths in settings absolute and refuses those that do not exist."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from jlora import errors
from jlora.config.engine.convert import BadValueError

ASSETS = Path(__file__).parents[2] / "assets"
"""Folder of what the package ships."""

SCHEME = "jlora://"
"""Prefix of paths within ``ASSETS``."""

DATA_SUFFIXES = (
    ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst",
    ".jinja", ".yaml",
)  # fmt: skip


def absolute_input(name: str, config_file: Path, may_be_hub_name: bool, must_exist: bool) -> str:
    """The absolute path of an existing file, folder or glob pattern that ``name`` refers to.

    Relative paths are looked up in the working directory, then in the folder of ``config_file``.
    If nothing is found, a possible hub name is returned unchanged; anything else raises
    BadValueError, unless ``must_exist`` is false.
    """
    folders, relative = [Path.cwd(), config_file.resolve().parent], os.path.expanduser(name)
    if name.startswith(SCHEME):
        folders, relative = [ASSETS], name.removeprefix(SCHEME)
    for folder in folders:
        candidate = os.path.normpath(folder / relative)
        if os.path.exists(candidate) or (glob.has_magic(name) and glob.glob(candidate)):
            return candidate
    looks_local = name.startswith((SCHEME, "/", ".", "~")) or name.endswith(DATA_SUFFIXES)
    if must_exist and (looks_local or glob.has_magic(name) or not may_be_hub_name):
        raise BadValueError(f"no such file or folder: {name!r}", _similar_names(folders, relative))
    return name


def _similar_names(folders: Sequence[Path], relative: str) -> str:
    parents = [(folder / relative).parent for folder in folders]
    names = {f.name for parent in parents if parent.is_dir() for f in parent.iterdir()}
    similar = errors.did_you_mean(Path(relative).name, sorted(names))
    return similar or f"looked in {' and '.join(str(f) for f in dict.fromkeys(folders))}"
