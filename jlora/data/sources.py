"""Reads data files to raw rows, each with its place (``file:line``).

``path`` is a file, a folder, a glob or a data set on the hub. Local files are parsed here and not
by ``datasets``, which does not report the line that a user needs to fix a row. Formats that can
contain code (pickle, loading scripts) are never opened.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from jlora.data.folders import named_splits, saved_splits, slice_rows
from jlora.errors import ConfigError, DataError, StorageError, did_you_mean, nearest

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
COMPRESSED = (".gz", ".zst")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".arrow", *COMPRESSED)
"""The suffixes of data files; a compressed one has the suffix of its content before its own."""

ROWS_PER_BATCH = 1024
"""Rows of an Arrow table that are converted at once."""


class RawRow(NamedTuple):
    """One row of a file, not yet converted; ``fault`` is the reason if it cannot be parsed."""

    where: str
    value: Any
    fault: str | None = None


def read_raw_rows(path: str, split: str | None = None, name: str | None = None) -> Iterator[RawRow]:
    """The raw rows of a source in file order.

    Args:
      path: a file, a folder (its data files, recursively, by name), a glob, or a hub name.
      split: the split of a folder (see ``folders``) or of a hub data set, and a slice of it, as
        ``datasets`` writes them: ``test``, ``train[:90%]``, ``[100:200]``, ``train+test``. Default:
        ``train``, or the only split of a folder.
      name: the configuration ("subset") of a folder with a ``README.md`` or of a hub data set.

    Raises:
      ConfigError: there is nothing at ``path``, or no such split or data set on the hub.
      DataError: a file is empty or damaged.
    """
    splits = _local_splits(path, name)
    if splits is None:
        return hub_rows(path, split, name)
    parts = []
    for part in (split or "").split("+"):
        selected, _, bounds = part.strip().partition("[")
        files = _files_of_split(path, splits, selected)
        rows = (row for file in files for row in read_file(file))
        parts.append(slice_rows(rows, f"[{bounds}") if bounds else rows)
    return chain(*parts)


def _local_splits(path: str, name: str | None) -> dict[str, list[Path]] | None:
    """Split → files; None if ``path`` can only be a name on the hub."""
    place = Path(path).expanduser()
    splits = saved_splits(place)
    if splits is None:
        files = find_files(path)
        if files is None:
            return None
        if place.is_dir():
            return named_splits(place, files, name)
        splits = {"train": files}
    if name is not None:
        cause = f"{path} has no configurations to choose {name!r} from"
        fix = "leave it out; only a hub data set and a folder with a README.md have configurations"
        raise ConfigError(cause, where="name", fix=fix)
    return splits


def _files_of_split(path: str, splits: dict[str, list[Path]], split: str) -> list[Path]:
    if split == "all":
        return [file for files in splits.values() for file in files]
    if not split:
        split = next(iter(splits)) if len(splits) == 1 else "train"
    if split in splits:
        return splits[split]
    if not Path(path).expanduser().is_dir():
        fix = "a local file has no splits; write a slice such as train[:90%], or leave it out"
        raise ConfigError(f"split {split!r} is not a slice", where="split", fix=fix)
    fix = did_you_mean(split, splits) or f"set `split` to one of {', '.join(splits)}"
    raise ConfigError(f"there is no split {split!r} in this folder", where=path, fix=fix)


def find_files(path: str) -> list[Path] | None:
    """The local files that ``path`` names; None if it can only be a name on the hub."""
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        # Sorted: file systems list in different orders, and a resumed run needs the same one.
        files = sorted(p for p in place.rglob("*") if _kind(p) and p.is_file())
    elif any(c in path for c in "*?["):
        files = sorted(Path(p) for p in glob.glob(str(place), recursive=True) if Path(p).is_file())
    elif is_hub_name(path):
        return None
    else:
        raise ConfigError("no such data file", where=path, fix=_siblings(place))
    if not files:
        raise ConfigError("no data files here", where=path, fix=f"expected {', '.join(SUFFIXES)}")
    return files


def is_hub_name(path: str) -> bool:
    """Whether ``path`` has the form ``name`` or ``owner/name`` and is not a file's name."""
    shaped = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) is not None
    return shaped and Path(path).suffix not in SUFFIXES


def _kind(file: Path) -> str | None:
    """The suffix that tells the kind of a data file's content; None for other files."""
    suffix = file.suffix.lower()
    if suffix not in COMPRESSED:
        return suffix if suffix in SUFFIXES else None
    inner = Path(file.stem).suffix.lower()
    return inner if inner in TEXT_SUFFIXES else None


def _siblings(place: Path) -> str:
    folder = place.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either; relative paths start where you run"
    close = nearest(place.name, [p.name for p in folder.iterdir()])
    return f"{folder} has {', '.join(close)}" if close else f"look into {folder}"


def read_file(file: Path) -> Iterator[RawRow]:
    """The raw rows of one local file; at least one, or DataError."""
    readers = {
        ".json": _json,
        ".csv": _csv,
        ".tsv": _csv,
        ".parquet": _parquet,
        ".arrow": _arrow,
        ".txt": _txt,
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
    }
    reader = readers.get(_kind(file) or "")
    if reader is None:
        fix = f"use one of {', '.join(SUFFIXES)} (compressed text: .jsonl.gz)"
        cause = f"unknown kind of data file {''.join(file.suffixes[-2:])!r}"
        raise DataError(cause, where=str(file), fix=fix)
    empty = True
    try:
        for row in reader(file):
            empty = False
            yield row
    except UnicodeDecodeError as e:
        where = f"{file}:{_line_of_byte(file, e)}"
        raise DataError("not valid UTF-8", where=where, fix="convert the file to UTF-8") from e
    except (OSError, EOFError, zlib.error) as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise StorageError(f"cannot be read: {e.strerror}", where=str(file)) from e
        # The decompressors' own errors have no number of the system's.
        cause = f"damaged compressed file: {e}"
        raise DataError(cause, where=str(file), fix="compress it again") from e
    if empty:
        raise DataError("the file holds no rows", where=str(file), fix="remove it or fill it")


def _open(file: Path) -> Any:
    """The file's bytes, decompressed: a binary file object."""
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return gzip.open(file)
    if suffix == ".zst":
        import pyarrow

        return pyarrow.input_stream(str(file), compression="zstd")
    return file.open("rb")


def _open_text(file: Path, newline: str | None = None) -> io.TextIOWrapper:
    return io.TextIOWrapper(_open(file), encoding="utf-8-sig", newline=newline)


def _line_of_byte(file: Path, error: UnicodeDecodeError) -> int:
    """The line of the first byte that is not UTF-8 (decoders report offsets within a chunk)."""
    del error
    with _open(file) as f:
        for number, line in enumerate(f, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def _json_lines(file: Path) -> Iterator[RawRow]:
    # "-sig" drops the byte order mark that Windows programs write. A lone carriage return is white
    # space in JSON and does not end a line.
    with _open_text(file, newline="\n") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                yield RawRow(where, json.loads(line))
            except (json.JSONDecodeError, RecursionError) as e:
                yield RawRow(where, None, f"not valid JSON: {_reason(e)}")


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply"


def _json(file: Path) -> Iterator[RawRow]:
    """A JSON array of rows; a ``.json`` file that begins otherwise is read as JSON lines."""
    with _open_text(file) as f:
        text = f.read()
    decoder = json.JSONDecoder()
    at = _skip_space(text, 0)
    if text[at : at + 1] != "[":
        yield from _one_object(file, text) if text[at : at + 1] == "{" else _json_lines(file)
        return
    line, counted, separator = 1, 0, "["
    while text[at : at + 1] == separator:
        at = _skip_space(text, at + 1)
        if separator == "[" and text[at : at + 1] == "]":
            return
        line, counted = line + text.count("\n", counted, at), at
        try:
            # Row by row: json.loads of the whole would lose on which line each begins.
            value, at = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as e:
            at_line = getattr(e, "lineno", line)
            raise _damaged(f"{file}:{at_line}", f"not valid JSON: {_reason(e)}") from e
        yield RawRow(f"{file}:{line}", value)
        at, separator = _skip_space(text, at), ","
    if text[at : at + 1] != "]":
        line += text.count("\n", counted, at)
        raise _damaged(f"{file}:{line}", "the JSON array is cut off: expected ',' or ']'")


def _skip_space(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _one_object(file: Path, text: str) -> Iterator[RawRow]:
    """A ``.json`` file that starts with an object: JSON lines, or a single row."""
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return _json_lines(file)
    lists = [k for k, v in value.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
    if lists and len(value) <= 2 and "messages" not in value and "conversations" not in value:
        fix = f"write the list under {lists[0]!r} alone, or one row a line (.jsonl)"
        raise DataError("one JSON object, not a list of rows", where=str(file), fix=fix)
    return iter([RawRow(f"{file}:1", value)])


def _damaged(where: str, cause: str) -> DataError:
    return DataError(cause, where=where, fix="repair the file, or write one row a line (.jsonl)")


def _csv(file: Path) -> Iterator[RawRow]:
    # Python's own limit, 128 KiB a field, is less than a long document.
    csv.field_size_limit(2**31 - 1)
    with _open_text(file, newline="") as f:
        # Strict: without it an open quotation mark swallows the rows up to the next one.
        reader = csv.reader(f, delimiter="\t" if _kind(file) == ".tsv" else ",", strict=True)
        try:
            header = next(reader, None)
            start = reader.line_num + 1
            for values in reader:
                where, start = f"{file}:{start}", reader.line_num + 1
                if values and header and len(values) != len(header):
                    fault = f"{len(values)} fields, but the header has {len(header)}"
                    yield RawRow(where, None, fault)
                elif values:
                    yield RawRow(where, dict(zip(header or (), values, strict=True)))
        except csv.Error as e:
            raise _damaged(f"{file}:{reader.line_num}", f"not valid CSV: {e}") from e


def _parquet(file: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            yield from arrow_rows(str(file), table.iter_batches(batch_size=ROWS_PER_BATCH))
    except pyarrow.ArrowException as e:
        fix = "write the file again"
        raise DataError(f"damaged parquet file: {e}", where=str(file), fix=fix) from e


def _arrow(file: Path) -> Iterator[RawRow]:
    """Arrow's stream format, which ``datasets`` writes, or its file format (Feather)."""
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(file)) as source:
            is_stream = source.read(6) != b"ARROW1"
            source.seek(0)
            if is_stream:
                yield from arrow_rows(str(file), pyarrow.ipc.open_stream(source))
            else:
                table = pyarrow.ipc.open_file(source)
                batches = (table.get_batch(i) for i in range(table.num_record_batches))
                yield from arrow_rows(str(file), batches)
    except pyarrow.ArrowException as e:
        fix = "write the file again"
        raise DataError(f"damaged Arrow file: {e}", where=str(file), fix=fix) from e


def arrow_rows(where: str, batches: Iterable[Any]) -> Iterator[RawRow]:
    """The rows of Arrow tables or record batches, numbered from 1, as JSON would hold them."""
    number = 0
    for batch in batches:
        types = {field.name: field.type for field in batch.schema}
        for row in batch.to_pylist():
            number += 1
            values = {name: json_value(value, types[name]) for name, value in row.items()}
            yield RawRow(f"{where}:{number}", values)


def json_value(value: Any, arrow_type: Any) -> Any:
    """A value of an Arrow column without the nulls that fill up its structs.

    All structs of a column have the same keys; one that a row did not have is null, which cannot be
    told from a null that was written. Nulls elsewhere stay. Columns of JSON text are parsed.
    """
    from pyarrow import types

    if value is None:
        return None
    if types.is_struct(arrow_type):
        given = ((f.name, f.type) for f in arrow_type if value[f.name] is not None)
        return {name: json_value(value[name], field_type) for name, field_type in given}
    if types.is_map(arrow_type):
        return {key: json_value(item, arrow_type.item_type) for key, item in value}
    if isinstance(value, list):
        return [json_value(item, arrow_type.value_type) for item in value]
    if getattr(arrow_type, "extension_name", None) == "arrow.json":
        return json.loads(value)
    return value


def _txt(file: Path) -> Iterator[RawRow]:
    with _open_text(file) as f:
        text = f.read()
    if text.strip():
        yield RawRow(f"{file}:1", {"text": text})


def hub_rows(path: str, split: str | None, name: str | None) -> Iterator[RawRow]:
    """The rows of a data set on the hub (or in its local cache), through ``datasets``."""
    import datasets

    parts = [part.strip() for part in (split or "train").split("+")]
    split = "+".join(f"train{part}" if part.startswith("[") else part for part in parts)
    try:
        table = datasets.load_dataset(path, name, split=split)
    except Exception as e:  # datasets raises many kinds, and users need one message
        cause = f"neither a file here nor a data set that can be loaded: {_first_line(e)}"
        fix = "check the name, the split, `name` (the subset) and the network"
        raise ConfigError(cause, where=f"{path}[{split}]", fix=fix) from e
    if not len(table):
        raise DataError("the data set holds no rows", where=f"{path}[{split}]")
    batches = table.with_format("arrow").iter(ROWS_PER_BATCH)
    return arrow_rows(f"{path}[{split}]", batches)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
