"""The list of all settings with types, defaults and meanings, behind ``--help`` and the docs."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jlora.config.engine.convert import type_in_words, union_members
from jlora.config.engine.schema import ConfigSection, field_types
from jlora.config.engine.yaml_text import plain_settings, yaml_line


class Option(NamedTuple):
    """One setting; ``default`` is YAML text, or None for a required setting."""

    section: str
    field: str
    type: str
    default: str | None
    help: str
    section_help: str


def section_options(root: type[ConfigSection]) -> Iterator[Option]:
    """Every setting of every section of ``root``, in order."""
    texts = field_docs(root)
    for name, hint in field_types(root).items():
        for section in _nested_sections(hint):
            yield from _options_of(name, section, texts[name])


def _nested_sections(hint: Any) -> list[type[ConfigSection]]:
    """The members of a field's type that are sections."""
    members = union_members(hint)
    return [m for m in members if isinstance(m, type) and issubclass(m, ConfigSection)]


def _options_of(name: str, section: type[ConfigSection], title: str) -> Iterator[Option]:
    """A section's own settings, then those of the sections nested in it."""
    texts, nested = field_docs(section), []
    for field in dataclasses.fields(section):  # pyright: ignore[reportArgumentType]
        hint = field_types(section)[field.name]
        required = field.default is dataclasses.MISSING
        default = None if required else yaml_line(plain_settings(field.default))
        kind = type_in_words(hint)
        entry = typing.get_args(hint)[:1] if typing.get_origin(hint) is tuple else ()
        if entry and issubclass(entry[0], ConfigSection):
            kind = "a list of sources"
            if required:  # describe an entry once, under the first list of them
                nested.append((f"{name}.{field.name}.0", entry[0], inspect.getdoc(entry[0])))
        elif sections := _nested_sections(hint):
            kind = f"a section, {name}.{field.name}"
            nested.append((f"{name}.{field.name}", sections[0], texts[field.name]))
        yield Option(name, field.name, kind, default, texts[field.name], title)
    for key, inner, text in nested:
        yield from _options_of(key, inner, text)


@functools.cache
def field_docs(section: type) -> Mapping[str, str]:
    """Field name → the docstring below it, read from the source: Python does not keep it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(tree, ast.ClassDef)
    result = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name) and isinstance(text.value, ast.Constant)
            result[field.target.id] = " ".join(str(text.value.value).split())
    return result
