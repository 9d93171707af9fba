"""Typed look-ups in a ``config.json``, which name the file and the key when they fail."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from jlora.errors import ConfigError, did_you_mean


class Keys:
    """The keys of one ``config.json``, read from ``where``."""

    def __init__(self, hf: Mapping[str, Any], where: str):
        self.hf, self.where = hf, where

    def fail(self, key: str, cause: str, fix: str | None = None) -> ConfigError:
        """The error for ``key``, to be raised."""
        return ConfigError(cause, where=f"{self.where}: {key}", fix=fix)

    def only(self, key: str, *values: Any, why: str | None = None) -> None:
        """A switch whose other settings are not implemented."""
        value = self.hf.get(key)
        if value is None or value in values:
            return
        allowed = " or ".join(json.dumps(v) for v in values if v is not None) or "absent"
        detail = f": {why}" if why else ""
        raise self.fail(key, f"{json.dumps(value)} is not supported{detail}", f"must be {allowed}")

    def number(self, key: str, default: Any, kind: type = int) -> Any:
        """A positive number; ``default`` where the key is absent or null, if it is not None."""
        value = self.hf.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
            raise self.fail(key, f"must be {kind.__name__}, not {value!r}")
        if not 0 < value < math.inf:
            raise self.fail(key, f"must be positive, not {value!r}")
        return kind(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.hf.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.fail(key, f"must be true or false, not {value!r}")
        return value

    def choice(self, key: str, default: str, options: Iterable[str]) -> str:
        """One of ``options``."""
        value = self.hf.get(key, default)
        if not isinstance(value, str) or value not in options:
            raise self.fail(key, f"{value!r} is not supported", did_you_mean(str(value), options))
        return value

    def token(self, key: str) -> int | None:
        """A token id or None."""
        return next(iter(self.tokens(key)), None)

    def tokens(self, key: str, default: int | None = None) -> tuple[int, ...]:
        """Token ids, written as one number, a list or null."""
        value = self.hf.get(key, default)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(v) is int for v in values):
            raise self.fail(key, f"must be a token id or a list of them, not {value!r}")
        return tuple(values)
