"""Compiles equal programs only once in a test process.

Many tests trace the same computation from different function objects, which JAX's in-memory cache
distinguishes. Here the key is that of JAX's persistent cache (canonical HLO, devices, options and
versions), and the executables stay in memory: writing them to disk has aborted whole test
processes inside XLA (docs/log.md). Only the tests do this; the package patches nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax._src import cache_key, compiler

MAX_MEMORY_MAPS = 30_000
"""All executables are dropped when the process has more memory maps than this. Each executable of
XLA's CPU backend holds several, and Linux allows a process 65,530 (``vm.max_map_count``)."""

_executables: dict[str, Any] = {}


def install() -> None:
    """Makes JAX reuse executables that this process has already compiled."""
    compiler.compile_or_get_cached = _reusing(compiler.compile_or_get_cached)


def _reusing(compile_program: Callable[..., Any]) -> Callable[..., Any]:
    def reuse(backend, module, devices, options, callbacks, *rest, **named):
        processes = {device.process_index for device in devices.flatten()}
        if callbacks or len(processes) > 1 or backend.platform != "cpu":
            return compile_program(backend, module, devices, options, callbacks, *rest, **named)
        key = cache_key.get(module, devices, options, backend)
        if key not in _executables:
            _executables[key] = compile_program(
                backend, module, devices, options, callbacks, *rest, **named
            )
        return _executables[key]

    return reuse


def drop_if_too_many() -> None:
    """Drops all executables once the process holds more than ``MAX_MEMORY_MAPS``."""
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > MAX_MEMORY_MAPS:
        _executables.clear()
