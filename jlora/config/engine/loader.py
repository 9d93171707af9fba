"""From a YAML file and overrides to a ``Config``, with all faults of the file in one error."""

from __future__ import annotations

import dataclasses
import glob
import os
import typing
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from jlora import errors
from jlora.config.engine import other_tools
from jlora.config.engine.convert import (
    BadValueError,
    alternatives,
    describe,
    show,
    split_annotated,
)
from jlora.config.engine.faults import Fault, as_error
from jlora.config.engine.schema import INPUT, LOCAL, Section, hints
from jlora.config.engine.yaml_nodes import Node, Reader, override, put

ASSETS = Path(__file__).parents[2] / "assets"
"""What ``jlora://`` names lie in."""

T = TypeVar("T", bound=Section)

SCHEME = "jlora://"

RESOLVED = "config.yaml"
"""The file of a run folder that holds its resolved settings."""

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".jinja", ".gz", ".yaml")


def load_table(table: type[T], path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> T:
    """Reads a YAML file, or the config.yaml of a run folder, and applies overrides in order.

    Input paths become absolute: ``jlora://…`` names what the package ships, a relative path is
    looked up from the working directory, then from the file's folder; a name that is found in
    neither stays as it is where it may be a hub name. Of a run folder, ``train.output_dir`` is
    the folder itself, so that a run can be moved, and its inputs need not be there any more.

    Raises ConfigError naming each fault's file, line and key, or the override; StorageError when
    the file cannot be read.
    """
    path = Path(path).expanduser()
    run = path if path.is_dir() else None
    file = path / RESOLVED if run else path
    faults: list[Fault] = []
    root = Reader(str(file), faults).read(_text(file))
    if run:
        root = put(root, ("train", "output_dir"), Node(str(run), str(file)), str(file), faults)
    for text in overrides:
        root = override(root, text, faults)
    builder = _Builder(file, table, faults, inputs_must_exist=run is None)
    result = builder.table(table, root, "")
    if faults:
        raise as_error(sorted(faults, key=_line))
    return result


def _line(fault: Fault) -> float:
    """The order in which faults are shown: by line, then the overrides'."""
    line = (fault.where or "").rpartition(":")[2]
    in_file = line.isdigit() and not (fault.where or "").startswith("override ")
    return int(line) if in_file else float("inf")


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as bad:
        line = bad.object[: bad.start].count(b"\n") + 1
        raise errors.ConfigError(
            "not UTF-8 text", where=f"{file}:{line}", fix="save it as UTF-8"
        ) from None
    except FileNotFoundError:
        folder = file.parent if file.parent.is_dir() else Path()
        near = errors.did_you_mean(file.name, [f.name for f in folder.iterdir()])
        if file.name == RESOLVED:
            near = "name a YAML file, or the output folder of a run"
        raise errors.ConfigError("no such file", where=str(file), fix=near) from None
    except OSError as bad:
        reason = bad.strerror or str(bad)
        raise errors.StorageError(f"cannot be read: {reason}", where=str(file)) from None


def _tables(root: type[Section]) -> dict[str, list[str]]:
    sections = {name: _table_of(hint)[0] for name, hint in hints(root).items()}
    return {"": list(sections)} | {name: list(hints(t)) for name, t in sections.items() if t}


def _table_of(hint: Any) -> tuple[type[Section] | None, bool]:
    """(the table that a field holds, whether it holds a list of them)."""
    for option in alternatives(hint):
        if isinstance(option, type) and issubclass(option, Section):
            return option, False
        args = typing.get_args(option)
        if typing.get_origin(option) is tuple and issubclass(args[0], Section):
            return args[0], True
    return None, False


@dataclasses.dataclass
class _Builder:
    file: Path
    root: type[Section]
    faults: list[Fault]
    inputs_must_exist: bool

    def fault(self, node: Node, key: str, cause: str, fix: str | None = None) -> None:
        self.faults.append(Fault((key,) if key else (), cause, fix, node.where))

    def table(self, table: type[Section], node: Node, prefix: str) -> Any:
        """A table from a mapping.

        After a fault it holds None or the default in the faulty fields: enough to check the rest,
        so that one error shows everything.
        """
        given = node.value
        if given is None:
            given = {}
        if not isinstance(given, dict):
            self.fault(node, prefix, f"expected keys and values, got {_kind(given)}")
            given = {}
        self._unknown(table, given, prefix)
        values, bad = {}, set()
        for field in dataclasses.fields(table):  # pyright: ignore[reportArgumentType]
            key = f"{prefix}.{field.name}".lstrip(".")
            count = len(self.faults)
            default = None if field.default is dataclasses.MISSING else field.default
            values[field.name] = default
            if field.name in given:
                values[field.name] = self.value(table, field.name, given[field.name], key, default)
            elif field.default is dataclasses.MISSING:
                values[field.name] = self._missing(table, field.name, node, key)
            bad |= {key} if len(self.faults) > count else set()
        self._check(table, values, node, prefix, bad)
        result = object.__new__(table)
        for name, value in values.items():
            object.__setattr__(result, name, value)
        return result if self.faults else table(**values)

    def value(self, table: type[Section], name: str, node: Node, key: str, default: Any) -> Any:
        """The value of one field, or ``default`` after a fault."""
        hint = hints(table)[name]
        inner, many = _table_of(hint)
        if inner and many and isinstance(node.value, list):
            return tuple(self.table(inner, n, f"{key}.{i}") for i, n in enumerate(node.value))
        if inner and not many:
            if node.value is not None:
                return self.table(inner, node, key)
            if type(None) not in alternatives(hint):
                return self.table(inner, node, key)
            if node.empty:
                fix = f"write {key}: {{}} for the defaults, or {key}: null to leave it out"
                self.fault(node, key, "the section is empty", fix)
            return None
        return self._leaf(table, name, node, key, default)

    def _leaf(self, table: type[Section], name: str, node: Node, key: str, default: Any) -> Any:
        hint = hints(table)[name]
        plain = node.plain()
        only_text = {split_annotated(h)[0] for h in alternatives(hint)} <= {str, type(None)}
        if node.text is not None and only_text and plain is not None:
            plain = node.text  # a shell has eaten the quotes of an override
        try:
            value = table.convert(name, plain, hint)
            return self._path(value, hint)
        except BadValueError as bad:
            fix = bad.fix
            if plain is None and fix and default is not None:
                fix = f"{fix} to use the default"
            self.fault(node, key, bad.cause, fix)
            return default

    def _unknown(self, table: type[Section], given: dict[str, Node], prefix: str) -> None:
        known = hints(table)
        section = prefix.partition(".")[0] if prefix.count(".") == 0 else prefix
        for key, node in given.items():
            if key in known or other_tools.harmless(section, key, node.plain()):
                continue
            cause, fix = other_tools.remedy(
                section, key, _tables(self.root) | {section: list(known)}
            )
            self.fault(node, f"{prefix}.{key}".lstrip("."), cause, fix)

    def _missing(self, table: type[Section], name: str, node: Node, key: str) -> Any:
        inner, many = _table_of(hints(table)[name])
        if inner and not many:
            self.fault(node, key, "the section is missing", f"it needs {_needs(inner)}")
            return _Builder(self.file, self.root, [], False).table(inner, Node({}, node.where), key)
        self.fault(node, key, "is missing", f"give {describe(hints(table)[name])}")
        return None

    def _check(self, table: type, values: dict, node: Node, prefix: str, bad: set[str]) -> None:
        for fault in table.check(SimpleNamespace(**values)):
            fault = fault.under(prefix) if prefix else fault
            if not bad.intersection(fault.keys):
                key = fault.keys[0]
                self.fault(_find(node, key.removeprefix(f"{prefix}.")), key, fault.cause, fault.fix)

    def _path(self, value: Any, hint: Any) -> Any:
        """An input path as an absolute one, if it is there; see ``load``."""
        marks = {m for h in alternatives(hint) for m in split_annotated(h)[1]} & {INPUT, LOCAL}
        words = [w for h in alternatives(hint) for w in typing.get_args(h) if isinstance(w, str)]
        if not isinstance(value, str) or not marks or value in words[:-1]:
            return value
        return self._resolve(value, may_be_hub=INPUT in marks)

    def _resolve(self, name: str, may_be_hub: bool) -> str:
        folders = [Path.cwd(), self.file.resolve().parent]
        relative = os.path.expanduser(name)
        if name.startswith(SCHEME):
            folders, relative = [ASSETS], name.removeprefix(SCHEME)
        for folder in folders:
            candidate = os.path.normpath(folder / relative)
            if os.path.exists(candidate) or (glob.has_magic(name) and glob.glob(candidate)):
                return candidate
        local = name.startswith((SCHEME, "/", ".", "~")) or name.endswith(DATA_SUFFIXES)
        if self.inputs_must_exist and (local or glob.has_magic(name) or not may_be_hub):
            raise BadValueError(f"no such file or folder: {name!r}", _near(folders, relative))
        return name


def _find(node: Node, key: str) -> Node:
    """The deepest given node on the way to ``key``."""
    for part in key.split("."):
        if not isinstance(node.value, dict) or part not in node.value:
            break
        node = node.value[part]
    return node


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else show(value)


def _needs(table: type[Section]) -> str:
    fields = dataclasses.fields(table)  # pyright: ignore[reportArgumentType]
    return ", ".join(f.name for f in fields if f.default is dataclasses.MISSING)


def _near(folders: Sequence[Path], relative: str) -> str:
    parents = [(folder / relative).parent for folder in folders]
    names = {f.name for parent in parents if parent.is_dir() for f in parent.iterdir()}
    close = errors.did_you_mean(Path(relative).name, sorted(names))
    return close or f"looked in {' and '.join(str(f) for f in dict.fromkeys(folders))}"
