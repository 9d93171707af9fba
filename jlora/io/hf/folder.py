"""Opening a transformers folder or hub repository; its contents are untrusted input.

Weights are read from safetensors only: pickles (``.bin``, ``.pt``) can run code and are refused.
Code in a repository is neither downloaded nor imported. Shards must be plain file names inside the
folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jlora.errors import ConfigError, DataError, JloraError, StorageError
from jlora.files import storage_errors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types in safetensors files that can be a model's weights, and NumPy's names for them."""

DTYPE_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1},
}
"""Bytes per value of the types that are read."""

CHUNK_BYTES = 2**24
"""Approximate number of bytes that are compared or cast at a time, to bound host memory."""

MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
CONFIG_FILES = ["config.json", GENERATION]
# Repositories of Meta and Mistral have the weights a second time, in `original/` and
# `consolidated*`.
IGNORED_FILES = ["*/*", "consolidated*"]
"""Files that are downloaded from a hub repository: weights and tokenizer in its top folder
(MODEL_FILES), or the configuration only (CONFIG_FILES); IGNORED_FILES never."""


def find_folder(
    name: str | Path, revision: str | None = None, wanted: Sequence[str] = MODEL_FILES
) -> Path:
    """The local folder ``name``, or the snapshot of the hub repository of that name.

    Files of a repository that match ``wanted`` are downloaded.

    Raises:
      ConfigError: neither exists. StorageError: the hub cannot be reached.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    text = str(name)
    # A name on the hub has one slash at most.
    if folder.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise ConfigError(
            "there is no such folder", where=text, fix="name a transformers folder or a hub model"
        )
    return _download(text, revision, wanted)


def _download(name: str, revision: str | None, wanted: Sequence[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(wanted), ignore_patterns=IGNORED_FILES
            )
        )
    except (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.HFValidationError,
    ) as error:
        raise ConfigError(
            "there is no such folder, and no such model or revision on the Hugging Face hub "
            "(or it needs a login)",
            where=name,
            fix="check the name; for gated models accept the licence and set HF_TOKEN",
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        raise StorageError(
            "there is no such folder, and the Hugging Face hub cannot be reached",
            where=name,
            fix="connect to the network, or name a local folder",
        ) from error


def hub_snapshot(name: str | Path) -> tuple[str, str] | None:
    """The repository and the commit, if ``name`` is a folder in the hub's local cache."""
    folder = Path(name).expanduser().resolve()
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/"), folder.name


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; DataError if it is missing or not an object."""
    if not path.is_file():
        raise DataError("this file is missing", where=str(path), fix="name a transformers folder")
    if _is_outside(path):
        raise DataError("is a link that leads out of the folder", where=str(path))
    try:
        with storage_errors(path):
            value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"not valid JSON ({error})", where=str(path)) from error
    if not isinstance(value, dict):
        raise DataError("must hold a JSON object", where=str(path))
    return value


def shard_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a folder, and the index's map tensor → file name, if any.

    Raises DataError for pickled or missing weights and for names outside the folder.
    """
    # As in transformers the single file wins where a folder has both.
    if (folder / SINGLE).exists():
        names, weight_map = [SINGLE], None
    elif not (folder / INDEX).exists():
        raise _no_weights(folder)
    else:
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise DataError("has no weight_map", where=str(folder / INDEX))
        names = sorted({str(name) for name in weight_map.values()})
    faults = [f"  {name} {fault}" for name in names if (fault := _fault(folder, name))]
    if faults:
        raise DataError(
            "these shards are refused:\n" + "\n".join(faults),
            where=str(folder if weight_map is None else folder / INDEX),
            fix="download the folder again",
        )
    return [folder / name for name in names], weight_map


def _no_weights(folder: Path) -> JloraError:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        return DataError(
            f"the weights are pickles ({', '.join(pickles[:3])}), which can run code when loaded; "
            "jlora reads safetensors only",
            where=str(folder),
            fix="convert them where you trust them: AutoModelForCausalLM.from_pretrained(…)"
            ".save_pretrained(…) in transformers writes safetensors",
        )
    return DataError(f"there is no {SINGLE} and no {INDEX}", where=str(folder))


def _fault(folder: Path, name: str) -> str | None:
    """Why a shard of this name is refused; None if it is a file in the folder."""
    if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
        return "is not the plain name of a safetensors file"
    if not (folder / name).is_file():
        return "is missing"
    return "is a link that leads out of the folder" if _is_outside(folder / name) else None


def _is_outside(file: Path) -> bool:
    """Whether a file, with links resolved, is outside its folder (or the hub cache's blobs)."""
    folder = file.parent.resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots":  # in the hub's cache, files are links to blobs
        allowed.append(folder.parent.parent / "blobs")
    return not any(file.resolve().is_relative_to(root) for root in allowed)


class Shards:
    """Open safetensors files: names and shapes are known, values are read tensor by tensor."""

    def __init__(self, handles: dict[Path, Any], weight_map: dict[str, str] | None):
        self.files: dict[str, Path] = {}
        self.problems: list[tuple[str, str]] = []
        """(tensor name, problem): duplicates, and contradictions to the index."""
        self._handles = handles
        for file, handle in handles.items():
            for name in handle.keys():  # noqa: SIM118 (a safe_open handle is not a mapping)
                if name in self.files:
                    self.problems.append((name, f"is in {self.files[name].name} and {file.name}"))
                self.files[name] = file
        if weight_map is not None:
            self._check_index(weight_map)

    def _check_index(self, weight_map: dict[str, str]) -> None:
        for name, file in weight_map.items():
            if name not in self.files:
                self.problems.append((name, f"is in the index but not in {file}"))
            elif self.files[name].name != file:
                self.problems.append((name, f"is in {self.files[name].name}, not in {file}"))
        for name in self.files:
            if name not in weight_map:
                self.problems.append((name, f"is in {self.files[name].name} but not in the index"))

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape in the file."""
        return tuple(self._handles[self.files[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The type's name in the file, such as ``F32`` or ``BF16``."""
        return self._handles[self.files[name]].get_slice(name).get_dtype()

    def nbytes(self, name: str) -> int:
        """The tensor's bytes in the file."""
        return math.prod(self.shape(name)) * DTYPE_BYTES.get(self.dtype(name), 8)

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors of equal shape have equal values; they are read in chunks."""
        spans = self.spans(name)
        return all(np.array_equal(self.read(name, span), self.read(other, span)) for span in spans)

    def spans(self, name: str) -> Iterator[slice]:
        """Slices of the first axis of about ``CHUNK_BYTES`` bytes."""
        rows, *rest = self.shape(name)
        # 8 bytes: the widest type, F64.
        step = max(1, CHUNK_BYTES // (8 * math.prod(rest)))
        return (slice(i, min(i + step, rows)) for i in range(0, rows, step))

    def read(self, name: str, span: slice | None = None) -> np.ndarray:
        """The tensor's values, or those of a slice of rows; BF16 is ml_dtypes' bfloat16."""
        with safetensors_errors(self.files[name]):
            handle = self._handles[self.files[name]]
            return handle.get_tensor(name) if span is None else handle.get_slice(name)[span]


@contextmanager
def open_shards(folder: Path) -> Iterator[Shards]:
    """The folder's weights, open for reading; DataError if a file is damaged."""
    files, weight_map = shard_files(folder)
    with ExitStack() as stack:
        handles = {}
        for file in files:
            with safetensors_errors(file):
                # safetensors.numpy's own functions raise KeyError for BF16, and read whole files.
                handles[file] = stack.enter_context(safe_open(file, framework="numpy"))
        yield Shards(handles, weight_map)


@contextmanager
def safetensors_errors(file: Path) -> Iterator[None]:
    """Turns errors of safetensors inside the block into a DataError that names ``file``."""
    try:
        yield
    except SafetensorError as error:
        raise DataError(
            f"not a whole safetensors file ({error})",
            where=str(file),
            fix="it is truncated or damaged: download or write it again",
        ) from error
    except OSError as error:
        raise StorageError(f"cannot be read ({error})", where=str(file)) from error
