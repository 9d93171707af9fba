"""The splits of a local folder, as ``datasets`` finds them, and their slices.

In this order (https://huggingface.co/docs/datasets/repository_structure):

- a folder that ``save_to_disk`` wrote: what its JSON files say;
- the ``configs`` at the head of ``README.md``;
- ``data/<split>-00000-of-00001.parquet``;
- folders, then files, named by a keyword: ``train/…``, ``valid.jsonl``, ``my-test-1.csv``;
- otherwise every file is in ``train``.

If there are named splits, files of other names belong to none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import yaml

from jlora.errors import ConfigError, DataError, did_you_mean

Row = TypeVar("Row")

# As SPLIT_KEYWORDS and NON_WORDS_CHARS in datasets.data_files.
KEYWORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
SEPARATOR = "[-._ 0-9]"
IN_FOLDER_NAME = {
    split: re.compile(f"(?:.*{SEPARATOR})?(?:{words})(?:{SEPARATOR}.*)?")
    for split, words in KEYWORDS.items()
}
IN_FILE_NAME = {
    split: re.compile(f"(?:.*{SEPARATOR})?(?:{words}){SEPARATOR}.*")
    for split, words in KEYWORDS.items()
}
SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")

Splits = dict[str, list[Path]]


def saved_splits(folder: Path) -> Splits | None:
    """Split → Arrow files of a folder that ``save_to_disk`` wrote; None if it is not one.

    A data set that was saved without a split's name is ``train``.
    """
    if (folder / "dataset_dict.json").is_file():
        names = _read_json(folder / "dataset_dict.json").get("splits", [])
        return {name: _saved_files(folder / name)[1] for name in names}
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        split, files = _saved_files(folder)
        return {split: files}
    return None


def _saved_files(folder: Path) -> tuple[str, list[Path]]:
    state = _read_json(folder / "state.json")
    if state.get("_indices_data_files"):
        cause = "is a selection of rows, as datasets 1 saved it"
        raise DataError(cause, where=str(folder), fix="load it with datasets and save it again")
    files = [folder / Path(file["filename"]).name for file in state.get("_data_files", [])]
    return state.get("_split") or "train", files


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        cause = f"cannot be read: {error}"
        raise DataError(cause, where=str(file), fix="save the data set again") from error


def named_splits(folder: Path, files: Sequence[Path], name: str | None = None) -> Splits:
    """Split → its files, of the data files ``files`` of a folder, in their order.

    Args:
      folder: the folder.
      files: the data files below it.
      name: the configuration ("subset") in the head of ``README.md``.

    Raises ConfigError if there is no such configuration, or several and none is the default.
    """
    visible = [file for file in files if not _is_hidden(file.relative_to(folder))]
    configs = _configs(folder / "README.md")
    if name is None and not configs:
        return _splits_by_name(folder, visible)
    chosen = _choose_config(folder, configs, name)
    below = folder / str(chosen.get("data_dir") or "")
    visible = [file for file in visible if file.is_relative_to(below)]
    patterns = chosen.get("data_files")
    if patterns is None:
        return _splits_by_name(below, visible)
    try:
        return {
            # Once, though two patterns match it; `datasets` reads such a file twice.
            split: [file for file in visible if _matches(below, file, paths)]
            for split, paths in _patterns_of_splits(patterns).items()
        }
    except (TypeError, KeyError, AttributeError, re.error) as error:
        cause = "data_files is not a pattern, a list of patterns, or splits with their paths"
        fix = "write it as datasets documents it"
        raise DataError(cause, where=str(folder / "README.md"), fix=fix) from error


def _is_hidden(path: Path) -> bool:
    # datasets skips folders such as __pycache__ and __MACOSX, too, but not files named so.
    return any(part.startswith(".") for part in path.parts) or any(
        part.startswith("__") for part in path.parent.parts
    )


def _splits_by_name(folder: Path, files: Sequence[Path]) -> Splits:
    relative = {file: file.relative_to(folder) for file in files}
    shards: Splits = {}
    for file, path in relative.items():
        if match := SHARD.fullmatch(path.as_posix()):
            shards.setdefault(match[1], []).append(file)
    if shards:
        return shards
    by_folder = {
        split: [f for f, path in relative.items() if any(map(pattern.fullmatch, path.parent.parts))]
        for split, pattern in IN_FOLDER_NAME.items()
    }
    by_file = {
        split: [file for file in files if pattern.fullmatch(file.name)]
        for split, pattern in IN_FILE_NAME.items()
    }
    for found in (by_folder, by_file):
        if any(found.values()):
            return {split: part for split, part in found.items() if part}
    return {"train": list(files)}


def _configs(readme: Path) -> dict[str, dict[str, Any]]:
    """Name → configuration, from the YAML head of a data set's card."""
    if not readme.is_file():
        return {}
    head = re.match(r"\s*---\r?\n(.*?)\r?\n---", readme.read_text("utf-8", "replace"), re.DOTALL)
    try:
        values = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError as error:
        raise DataError("its head is not YAML", where=str(readme), fix="repair it") from error
    configs = values.get("configs") if isinstance(values, Mapping) else None
    return {
        str(config.get("config_name", "default")): dict(config)
        for config in (configs if isinstance(configs, list) else ())
        if isinstance(config, Mapping)
    }


def _choose_config(
    folder: Path, configs: Mapping[str, dict[str, Any]], name: str | None
) -> dict[str, Any]:
    listed = f"README.md has {', '.join(configs) or 'none'}"
    if name is not None:
        if name not in configs:
            cause = f"there is no configuration {name!r}"
            fix = did_you_mean(name, configs) or listed
            raise ConfigError(cause, where=str(folder), fix=fix)
        return configs[name]
    default = [key for key, config in configs.items() if config.get("default")]
    default = default or [key for key in configs if key == "default" or len(configs) == 1]
    if not default:
        cause = f"there are {len(configs)} configurations and none is the default"
        raise ConfigError(cause, where=str(folder), fix=f"set `name`; {listed}")
    return configs[default[0]]


def _patterns_of_splits(patterns: Any) -> dict[str, list[str]]:
    """``data_files`` of a configuration: a pattern, several, or a list of splits with theirs."""
    if isinstance(patterns, Mapping):
        patterns = [{"split": split, "path": path} for split, path in patterns.items()]
    items = [patterns] if isinstance(patterns, str) else patterns
    splits: dict[str, list[str]] = {}
    for item in items:
        split, paths = (
            (item["split"], item["path"]) if isinstance(item, Mapping) else ("train", item)
        )
        splits.setdefault(str(split), []).extend([paths] if isinstance(paths, str) else paths)
    return splits


def _matches(folder: Path, file: Path, patterns: Iterable[str]) -> bool:
    """Whether a glob pattern, in which ``**`` also crosses folders, matches the file's path."""
    path = file.relative_to(folder).as_posix()
    return any(re.fullmatch(_regex(pattern), path) for pattern in patterns)


def _regex(pattern: str) -> str:
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern.removeprefix("./"))
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    # Every second piece is one that the split was at.
    return "".join(
        known.get(piece) or (_character_set(piece) if i % 2 else re.escape(piece))
        for i, piece in enumerate(pieces)
    )


def _character_set(piece: str) -> str:
    negated, inner = piece.startswith("[!"), piece[1:-1].replace("\\", r"\\")
    if inner.startswith("^"):  # no negation in a glob pattern
        inner = "\\" + inner
    return f"[^{inner[1:]}]" if negated else f"[{inner}]"


def slice_rows(rows: Iterable[Row], split: str) -> Iterator[Row]:
    """The rows that ``[from:to]`` selects; bounds are rows or percentages."""
    match = re.fullmatch(r"\[(-?\d+%?)?:(-?\d+%?)?\]", split)
    if match is None:
        fix = "write a slice such as train[:90%] or [100:200], or leave it out"
        raise ConfigError(f"split {split!r} is not a slice", where="split", fix=fix)
    low, high = match.groups()
    if not any(b and (b.endswith("%") or b.startswith("-")) for b in (low, high)):
        return islice(rows, int(low or 0), int(high) if high else None)
    all_rows = list(rows)
    return iter(all_rows[_bound(low, len(all_rows)) : _bound(high, len(all_rows))])


def _bound(text: str | None, total: int) -> int | None:
    """A bound of a slice in rows; percents round to the nearest row, as in ``datasets``."""
    if text is None:
        return None
    return round(total * int(text[:-1]) / 100) if text.endswith("%") else int(text)
