"""The manifest of a checkpoint: what makes it whole, whose it is, and whether it is undamaged.

Nothing here knows how the state is stored, only that it lies in files below ``state``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jlora.errors import ConfigError, DataError
from jlora.files import storage_errors, write_atomic

FORMAT = 1
FILE_NAME = "manifest.json"
END = b"\n}\n"  # how a manifest ends: one that ends otherwise was torn


def steps(directory: Path) -> list[int]:
    """The steps of all complete checkpoints below ``directory``, ascending."""
    return sorted(int(f.name) for f in _step_folders(directory) if is_complete(f))


def latest(directory: Path) -> int | None:
    """The step of the newest complete checkpoint, or None."""
    return max(steps(directory), default=None)


def discard_incomplete(directory: Path) -> list[Path]:
    """Removes the folders of interrupted saves and returns them. For process 0, before a run."""
    found = [folder for folder in _step_folders(directory) if not is_complete(folder)]
    for folder in found:
        remove(folder)
    return found


def discard_later(directory: Path, step: int) -> list[Path]:
    """Removes the checkpoints after ``step`` and returns them. For process 0."""
    found = [Path(directory) / str(later) for later in steps(directory) if later > step]
    for folder in found:
        remove(folder)
    return found


def remove(folder: Path) -> None:
    """Deletes a checkpoint, its manifest first: a removal cut short leaves one that is no more."""
    with storage_errors(folder):
        (folder / FILE_NAME).unlink(missing_ok=True)
        shutil.rmtree(folder)


def is_complete(folder: Path) -> bool:
    """Whether the manifest is there to its end; whether it is right is for ``read`` to say."""
    path = folder / FILE_NAME
    return path.is_file() and path.read_bytes().endswith(END)


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Seals a checkpoint: digests of its files and of the manifest itself, then the file."""
    manifest = {"format": FORMAT, **content, "files": _file_digests(folder)}
    manifest["sha256"] = _content_digest(manifest)
    write_atomic(folder / FILE_NAME, json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint; DataError when there is none or it is damaged."""
    path = folder / FILE_NAME
    if not is_complete(folder):
        found = ", ".join(map(str, steps(folder.parent))) or "none"
        raise DataError("no complete checkpoint", where=str(folder), fix=f"complete ones: {found}")
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["sha256"] != _content_digest(manifest):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise damaged(folder, path) from None
    if manifest["format"] != FORMAT:
        raise DataError(
            f"checkpoint format {manifest['format']}, this version reads {FORMAT}",
            where=str(path),
            fix="resume with the version of jlora that wrote it",
        )
    return manifest


def check_files(folder: Path, manifest: Mapping[str, Any], part: str = "") -> None:
    """DataError naming the first file (and its leaf) that is missing or not as it was written.

    Of the leaves only those whose names begin with ``part`` are looked at.
    """
    others = {name for name in manifest["leaves"] if not name.startswith(part)}
    found = _file_digests(folder, others)
    for name, digest in manifest["files"].items():
        if Path(name).parts[1] not in others and found.get(name) != digest:
            leaf = Path(name).parts[1]
            raise damaged(folder, folder / name, leaf if leaf in manifest["leaves"] else None)


def check_run(directory: Path, step: int, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The ``extra`` of a checkpoint, of which only the manifest is read.

    Raises ConfigError listing the settings in which this run differs from the one that saved.
    """
    folder = Path(directory) / str(step)
    manifest = read(folder)
    _check_run_settings(folder, manifest, identity)
    return manifest["extra"]


def _check_run_settings(folder: Path, manifest: Mapping[str, Any], identity: Any) -> None:
    sections = {**manifest["identity"], **identity}
    check_settings(folder, manifest, {name: identity.get(name) for name in sections})


def check_identity(folder: Path, manifest: Mapping[str, Any], identity: Any, base: str) -> None:
    """ConfigError listing the settings in which this run differs from the one that saved."""
    _check_run_settings(folder, manifest, identity)
    if manifest["base_fingerprint"] != base:
        raise ConfigError(
            "the checkpoint was made on another base model: its weights differ",
            where=str(folder),
            fix="check model.name_or_path and model.revision, or choose another train.output_dir",
        )


def check_settings(folder: Path, manifest: Mapping[str, Any], sections: Mapping) -> None:
    """ConfigError listing the settings in which these sections differ from those saved."""
    saved = {name: manifest["identity"].get(name) for name in sections}
    old, new = _flat(saved), _flat(as_json(sections))
    different = [
        f"{key}: {old.get(key, 'unset')!r} there, {new.get(key, 'unset')!r} here"
        for key in sorted({**old, **new})
        # Not None, which is the value of a setting that is unset.
        if old.get(key, ...) != new.get(key, ...)
    ]
    if different:
        raise ConfigError(
            "the checkpoint was made with other settings:\n    " + "\n    ".join(different),
            where=str(folder),
            fix="restore these settings, or set train.resume=never or another train.output_dir",
        )


def damaged(folder: Path, file: Path, leaf: str | None = None) -> DataError:
    """The error for a digest that differs; the remedy is the checkpoint before, if there is one."""
    earlier = [step for step in steps(folder.parent) if step < int(folder.name)]
    then = f"continues from step {earlier[-1]}" if earlier else "starts from the beginning"
    return DataError(
        "the file is damaged: its digest is not the manifest's" + (f" (leaf {leaf})" * bool(leaf)),
        where=str(file),
        fix=f"delete {folder}; the run then {then}",
    )


def as_json(value: Any) -> Any:
    """``value`` as JSON gives it back: tuples are lists, keys are strings."""
    return json.loads(json.dumps(value))


def _step_folders(directory: Path) -> list[Path]:
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return [f for f in directory.iterdir() if f.is_dir() and f.name.isdecimal()]


def _content_digest(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_digests(folder: Path, without: Collection[str] = ()) -> dict[str, str]:
    """SHA-256 of each file below ``folder/state``, by its path below ``folder``.

    The folders of the leaves ``without`` are left out.
    """
    state = folder / "state"
    files = sorted(
        f for f in state.rglob("*") if f.is_file() and f.relative_to(state).parts[0] not in without
    )

    def digest(file: Path) -> str:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    # hashlib releases the GIL, so threads do read and digest at the same time.
    with storage_errors(folder), ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(digest, files))
    names = [str(file.relative_to(folder)) for file in files]
    return dict(zip(names, digests, strict=True))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts by dotted keys; lists are values."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    items: dict[str, Any] = {}
    for key, value in tree.items():
        items |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return items
