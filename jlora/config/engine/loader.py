"""From a YAML file and overrides to a section, with all faults of the file in one error."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jlora import errors
from jlora.config.engine.convert import (
    BadValueError,
    InputMark,
    literal_values,
    split_annotated,
    type_in_words,
    union_members,
    value_in_words,
)
from jlora.config.engine.faults import Fault, combined_error
from jlora.config.engine.input_paths import absolute_input
from jlora.config.engine.other_tools import has_no_effect, unknown_key_advice
from jlora.config.engine.schema import ConfigSection, field_types
from jlora.config.engine.yaml_nodes import YamlNode, YamlReader, apply_override, replace_at

T = TypeVar("T", bound=ConfigSection)

RESOLVED = "config.yaml"
"""The file in a run folder that holds the run's settings."""


Implied = Callable[[Path], tuple[Path, dict[str, Any]] | None]
"""Folder → the file that implies settings, and those; None if there is none."""


def load_section(
    root: type[T],
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    implied: Implied | None = None,
) -> T:
    """Reads a YAML file, or the config.yaml of a run folder, and applies overrides in order.

    If a folder has none, its settings are those that ``implied`` finds there.

    Input paths become absolute, see ``input_paths``. In the settings of a run folder,
    ``train.output_dir`` is replaced by that folder, so that a run can be moved, and the run's
    inputs need not exist any more.

    Raises ConfigError naming each fault's key with its file and line or its override; StorageError
    if the file cannot be read.
    """
    path = Path(path).expanduser()
    run_folder = path if path.is_dir() else None
    file = path / RESOLVED if run_folder else path
    faults: list[Fault] = []
    found = implied(path) if implied and run_folder and not file.exists() else None
    if found:
        run_folder, file = None, found[0]
        tree = YamlNode.of_plain(found[1], str(file))
    else:
        tree = YamlReader(str(file), faults).read(_file_text(file))
    if run_folder:
        output_dir = YamlNode(str(run_folder), str(file))
        tree = replace_at(tree, ("train", "output_dir"), output_dir, str(file), faults)
    for override in overrides:
        tree = apply_override(tree, override, faults)
    builder = _SectionBuilder(file, root, faults, inputs_must_exist=run_folder is None)
    section = builder.build(root, tree, "")
    if faults:
        raise combined_error(sorted(faults, key=_line_of))
    return section


def _line_of(fault: Fault) -> float:
    """Sort key of faults: the line in the file; overrides come last."""
    line = (fault.where or "").rpartition(":")[2]
    in_file = line.isdigit() and not (fault.where or "").startswith("override ")
    return int(line) if in_file else float("inf")


def _file_text(file: Path) -> str:
    try:
        # "-sig" drops the byte order mark that Windows programs write.
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as bad:
        line = bad.object[: bad.start].count(b"\n") + 1
        raise errors.ConfigError(
            "not UTF-8 text", where=f"{file}:{line}", fix="save it as UTF-8"
        ) from None
    except FileNotFoundError:
        folder = file.parent if file.parent.is_dir() else Path()
        fix = errors.did_you_mean(file.name, [f.name for f in folder.iterdir()])
        if file.name == RESOLVED:
            fix = (
                "name a YAML file, the output folder of a run, or (evaluate, generate, merge, "
                "export) the folder of a PEFT adapter"
            )
        raise errors.ConfigError("no such file", where=str(file), fix=fix) from None
    except OSError as bad:
        reason = bad.strerror or str(bad)
        raise errors.StorageError(f"cannot be read: {reason}", where=str(file)) from None


def _keys_of_sections(root: type[ConfigSection]) -> dict[str, list[str]]:
    """Section → its keys, and "" → the sections."""
    sections = {name: _section_in(hint)[0] for name, hint in field_types(root).items()}
    keys = {name: list(field_types(section)) for name, section in sections.items() if section}
    return {"": list(sections)} | keys


def _section_in(hint: Any) -> tuple[type[ConfigSection] | None, bool]:
    """(the section that a field of this type holds, whether the field is a list of them)."""
    for member in union_members(hint):
        if isinstance(member, type) and issubclass(member, ConfigSection):
            return member, False
        args = typing.get_args(member)
        if typing.get_origin(member) is tuple and issubclass(args[0], ConfigSection):
            return args[0], True
    return None, False


@dataclasses.dataclass
class _SectionBuilder:
    """Builds sections from YAML nodes and appends what is wrong to ``faults``.

    Each value is converted once and each section checked once, on the section itself.
    """

    file: Path
    root: type[ConfigSection]
    faults: list[Fault]
    inputs_must_exist: bool

    def add_fault(self, node: YamlNode, key: str, cause: str, fix: str | None = None) -> None:
        self.faults.append(Fault((key,) if key else (), cause, fix, node.where))

    def build(self, section: type[T], node: YamlNode, prefix: str) -> T:
        """The section that ``node`` describes; ``prefix`` is its own dotted key.

        A faulty field holds its default, or None if it has none, so that the other fields can be
        checked and one error reports everything.
        """
        given = node.value
        if given is None:
            given = {}
        if not isinstance(given, dict):
            found = "a list" if isinstance(given, list) else value_in_words(given)
            self.add_fault(node, prefix, f"expected keys and values, got {found}")
            given = {}
        self._report_unknown_keys(section, given, prefix)
        values, faulty = {}, set()
        for field in dataclasses.fields(section):  # pyright: ignore[reportArgumentType]
            key = f"{prefix}.{field.name}".lstrip(".")
            count = len(self.faults)
            required = field.default is dataclasses.MISSING
            default = None if required else field.default
            if field.name in given:
                value = self._field(section, field.name, given[field.name], key, default)
            else:
                value = self._missing(section, field.name, node, key) if required else default
            values[field.name] = value
            faulty |= {key} if len(self.faults) > count else set()
        result = section.from_converted(values)
        self._check(result, node, prefix, faulty)
        return result

    def _field(
        self, section: type[ConfigSection], name: str, node: YamlNode, key: str, default: Any
    ) -> Any:
        """The value of one field, or ``default`` after a fault."""
        hint = field_types(section)[name]
        nested, is_list = _section_in(hint)
        if nested and is_list and isinstance(node.value, list):
            return tuple(self.build(nested, n, f"{key}.{i}") for i, n in enumerate(node.value))
        if nested and not is_list:
            if node.value is not None or type(None) not in union_members(hint):
                return self.build(nested, node, key)
            # `lora:` without anything below could mean either; only a written null is clear.
            if node.empty:
                fix = f"write {key}: {{}} for the defaults, or {key}: null to leave it out"
                self.add_fault(node, key, "the section is empty", fix)
            return None
        return self._plain_field(section, name, node, key, default)

    def _plain_field(
        self, section: type[ConfigSection], name: str, node: YamlNode, key: str, default: Any
    ) -> Any:
        hint = field_types(section)[name]
        value = node.plain()
        only_text = {split_annotated(h)[0] for h in union_members(hint)} <= {str, type(None)}
        if node.override_text is not None and only_text and value is not None:
            # The shell removes quotes: model.revision="123" arrives as the number 123.
            value = node.override_text
        try:
            return self._with_absolute_path(section.convert_field(name, value), hint)
        except BadValueError as bad:
            fix = bad.fix
            if value is None and fix and default is not None:
                fix = f"{fix} to use the default"
            self.add_fault(node, key, bad.cause, fix)
            return default

    def _with_absolute_path(self, value: Any, hint: Any) -> Any:
        """``value``, made absolute if the field is an input path."""
        marks = [m for h in union_members(hint) for m in split_annotated(h)[1]]
        inputs = [mark for mark in marks if isinstance(mark, InputMark)]
        if not inputs or not isinstance(value, str) or value in literal_values(hint):
            return value
        may_be_hub_name = any(mark.may_be_hub_name for mark in inputs)
        return absolute_input(value, self.file, may_be_hub_name, self.inputs_must_exist)

    def _report_unknown_keys(
        self, section: type[ConfigSection], given: dict[str, YamlNode], prefix: str
    ) -> None:
        known = field_types(section)
        for key, node in given.items():
            if key in known or has_no_effect(prefix, key, node.plain()):
                continue
            keys_of = _keys_of_sections(self.root) | {prefix: list(known)}
            cause, fix = unknown_key_advice(prefix, key, keys_of)
            self.add_fault(node, f"{prefix}.{key}".lstrip("."), cause, fix)

    def _missing(self, section: type[ConfigSection], name: str, node: YamlNode, key: str) -> Any:
        """Reports a required field that is not given; an empty section in its place, or None."""
        hint = field_types(section)[name]
        nested, is_list = _section_in(hint)
        if nested and not is_list:
            self.add_fault(node, key, "the section is missing", f"it needs {_required(nested)}")
            silent = dataclasses.replace(self, faults=[])
            return silent.build(nested, YamlNode({}, node.where), key)
        self.add_fault(node, key, "is missing", f"give {type_in_words(hint)}")
        return None

    def _check(self, section: ConfigSection, node: YamlNode, prefix: str, faulty: set[str]) -> None:
        """Reports contradictions between fields, except those that involve a faulty field."""
        try:
            for fault in section.check():
                fault = fault.with_prefix(prefix) if prefix else fault
                if not faulty.intersection(fault.keys):
                    key = fault.keys[0]
                    place = _deepest_given(node, key.removeprefix(f"{prefix}."))
                    self.add_fault(place, key, fault.cause, fault.fix)
        except (AttributeError, TypeError, LookupError):
            # A property may not bear the None of a faulty field, which is reported already.
            if not self.faults:
                raise


def _deepest_given(node: YamlNode, key: str) -> YamlNode:
    """The deepest node on the path ``key`` that is in the file."""
    for part in key.split("."):
        if not isinstance(node.value, dict) or part not in node.value:
            break
        node = node.value[part]
    return node


def _required(section: type[ConfigSection]) -> str:
    fields = dataclasses.fields(section)  # pyright: ignore[reportArgumentType]
    return ", ".join(f.name for f in fields if f.default is dataclasses.MISSING)
