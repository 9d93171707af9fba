"""Settings as YAML text that ``load`` reads back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import yaml

from jlora.config.engine.schema import ConfigSection
from jlora.config.engine.yaml_nodes import parse_scalar


class _Dumper(yaml.SafeDumper):
    """Quotes strings that ``parse_scalar`` would read as something else."""


def _represent_string(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # PyYAML follows YAML 1.1, whose numbers and booleans are not those of our 1.2 reader.
    style = "'" if not isinstance(parse_scalar(text), str) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_string)


def to_yaml(config: ConfigSection) -> str:
    """All settings, defaults included; ``load`` reads an equal config back."""
    plain = plain_settings(config)
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def in_lines(config: ConfigSection) -> dict[str, str]:
    """Section → all its settings in one line of YAML; null for a section that is left out."""
    return {name: yaml_line(section) for name, section in plain_settings(config).items()}


def yaml_line(value: Any) -> str:
    """A plain value as YAML in one line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def plain_settings(value: Any) -> Any:
    """Sections, mappings and tuples as dicts and lists."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain_settings(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain_settings(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain_settings(item) for item in value]
    return value
