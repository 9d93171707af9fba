"""Tables as text: the resolved YAML of a run, and the list of options behind ``--help``."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import yaml

from jlora.config.engine.convert import alternatives, describe
from jlora.config.engine.schema import Section, hints
from jlora.config.engine.yaml_nodes import scalar


class Option(NamedTuple):
    """One setting; ``default`` is YAML text, or None when it must be given."""

    section: str
    field: str
    type: str
    default: str | None
    help: str


class _Dumper(yaml.SafeDumper):
    """Quotes what our loader would not read back as a string."""


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "'" if not isinstance(scalar(text), str) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _string)


def to_yaml(config: Section) -> str:
    """All settings, defaults included; ``load`` reads an equal Config back."""
    return yaml.dump(_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def in_lines(config: Section) -> dict[str, str]:
    """Each section with all its settings as one line of YAML; null for one that is left out."""
    return {name: _one_line(section) for name, section in _plain(config).items()}


def table_options(root: type[Section]) -> Iterator[Option]:
    """Every setting of every section, in order."""
    for section, hint in hints(root).items():
        for table in _tables(hint):
            yield from _options(section, table)


def _tables(hint: Any) -> list[type[Section]]:
    """The section that a value of this type is, if it is one; null aside."""
    return [t for t in alternatives(hint) if isinstance(t, type) and issubclass(t, Section)]


def _options(section: str, table: type[Section]) -> Iterator[Option]:
    texts, types_of = docs(table), hints(table)
    for field in dataclasses.fields(table):  # pyright: ignore[reportArgumentType]
        hint = types_of[field.name]
        required = field.default is dataclasses.MISSING
        default = None if required else _one_line(_plain(field.default))
        inner = typing.get_args(hint)[:1] if typing.get_origin(hint) is tuple else ()
        if inner and issubclass(inner[0], Section):
            yield Option(section, field.name, "a list of sources", default, texts[field.name])
            if required:  # the first list shows what an entry holds
                yield from _options(f"{section}.{field.name}.0", inner[0])
        elif nested := _tables(hint):
            yield from _options(f"{section}.{field.name}", nested[0])
        else:
            yield Option(section, field.name, describe(hint), default, texts[field.name])


def _one_line(value: Any) -> str:
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


@functools.cache
def docs(table: type) -> Mapping[str, str]:
    """Field name → the docstring below it, read from the table's source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(table))).body[0]
    assert isinstance(tree, ast.ClassDef)
    result = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name) and isinstance(text.value, ast.Constant)
            result[field.target.id] = " ".join(str(text.value.value).split())
    return result
