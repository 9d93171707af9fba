"""Typed look-ups in a ``config.json``; errors name the file and the key."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from jlora.errors import ConfigError, did_you_mean


class ConfigReader:
    """The keys of one ``config.json``.

    Args:
      hf: the parsed JSON.
      where: the file, for errors.
      names: common name of a key → the family's name; empty if the family has no such key.
      defaults: values of keys that are absent, or null where null has no meaning of its own.
    """

    def __init__(
        self,
        hf: Mapping[str, Any],
        where: str,
        names: Mapping[str, str] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ):
        self.hf, self.where = hf, where
        self.names, self.defaults = names or {}, defaults or {}

    def of(self, *, names: Mapping[str, str] | None = None, **defaults: Any) -> ConfigReader:
        """A reader of the same file with a family's names and defaults."""
        return ConfigReader(self.hf, self.where, names, defaults)

    def name(self, key: str) -> str:
        """The name of ``key`` in the file."""
        return self.names.get(key, key) or key

    def _given(self, key: str, default: Any = None) -> Any:
        return self.hf.get(self.names.get(key, key), default)

    def get(self, key: str, default: Any = None) -> Any:
        """The value; for an absent key the family's default, else ``default``."""
        return self._given(key, self.defaults.get(key, default))

    def fail(self, key: str, cause: str, fix: str | None = None) -> ConfigError:
        """The ConfigError for ``key``, for the caller to raise."""
        return ConfigError(cause, where=f"{self.where}: {self.name(key)}", fix=fix)

    def only(self, key: str, *values: Any, why: str | None = None) -> None:
        """Raises ConfigError unless ``key`` is null or one of the supported ``values``."""
        value = self.get(key)
        if value is None or value in values:
            return
        allowed = " or ".join(json.dumps(v) for v in values if v is not None) or "absent"
        detail = f": {why}" if why else ""
        raise self.fail(key, f"{json.dumps(value)} is not supported{detail}", f"must be {allowed}")

    def number(self, key: str, default: Any = None, kind: type = int) -> Any:
        """A positive number; if the key is absent or null, the family's default or ``default``."""
        value = self._given(key)
        value = self.defaults.get(key, default) if value is None else value
        # A bool is an int in Python, but `true` is no size.
        if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
            raise self.fail(key, f"must be {kind.__name__}, not {value!r}")
        # Also false for NaN and Infinity, which Python's JSON parser accepts.
        if not 0 < value <= sys.float_info.max:
            raise self.fail(key, f"must be positive, not {value!r}")
        return kind(value)

    def optional(self, key: str, kind: type = int) -> Any:
        """A positive number, or None if the key is null, or absent without a default."""
        return None if self.get(key) is None else self.number(key, kind=kind)

    def flag(self, key: str, default: bool = False) -> bool:
        """A boolean."""
        value = self._given(key)
        value = self.defaults.get(key, default) if value is None else value
        if not isinstance(value, bool):
            raise self.fail(key, f"must be true or false, not {value!r}")
        return value

    def choice(self, key: str, options: Iterable[str], default: str | None = None) -> str:
        """A string, one of ``options``."""
        value, options = self.get(key, default), list(options)
        if not isinstance(value, str) or value not in options:
            fix = did_you_mean(str(value), options) or f"supported: {', '.join(options)}"
            raise self.fail(key, f"{value!r} is not supported", fix)
        return value

    def token(self, key: str) -> int | None:
        """The first token id, or None."""
        return next(iter(self.tokens(key)), None)

    def tokens(self, key: str) -> tuple[int, ...]:
        """Token ids; the file may hold one id, a list or null."""
        value = self.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(v) is int for v in values):
            raise self.fail(key, f"must be a token id or a list of them, not {value!r}")
        return tuple(values)
