"""What a command sets in its own process around JAX: no torch, GPU memory, a compilation cache.

Nothing heavy is imported here: ``jlora.cli`` needs this module before the settings are checked.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from jlora.errors import ConfigError


def block_torch() -> None:
    """Makes ``import torch`` fail in this process, as if torch were not installed.

    transformers 5 imports torch wherever it is installed (``USE_TORCH=0`` is no longer honoured):
    five seconds of every start, for models that jlora does not use. Only commands do this, in their
    own process; jlora as a library leaves torch alone.
    """
    # setdefault: where torch is imported already, hiding it gains nothing.
    sys.modules.setdefault("torch", None)  # pyright: ignore (None makes the import fail)
    # transformers would print that torch is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


MEMORY_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
"""The variable for the fraction of a GPU's memory that JAX preallocates, and that programs get."""

DEFAULT_MEMORY_FRACTION = 0.92
"""Of commands, where JAX's own is 0.75. cuDNN, NCCL and the driver need the rest."""


NEW_MEMORY_FRACTION = "XLA_CLIENT_MEM_FRACTION"
"""Its newer name. JAX refuses to start where both are set."""


def memory_fraction(environ: Mapping[str, str] = os.environ) -> float:
    """The fraction of a GPU's memory that a command of jlora takes.

    Raises ConfigError if both variables are set, or one to something that is no number.
    """
    given = [name for name in (NEW_MEMORY_FRACTION, MEMORY_FRACTION) if environ.get(name)]
    if not given:
        return DEFAULT_MEMORY_FRACTION
    if len(given) == 2:
        cause, fix = f"{' and '.join(given)} are both set", f"remove {MEMORY_FRACTION}"
        raise ConfigError(cause, where="environment", fix=fix)
    (name,) = given
    try:
        return float(environ[name])
    except ValueError:
        cause, fix = f"{name}={environ[name]!r}", "give it a number, such as 0.92"
        raise ConfigError(cause, where="environment", fix=fix) from None


def reserve_gpu_memory(environ: MutableMapping[str, str] = os.environ) -> None:
    """Lets JAX take ``memory_fraction`` of each GPU; call it before JAX's first use."""
    fraction = memory_fraction(environ)
    if not environ.get(NEW_MEMORY_FRACTION):
        environ[MEMORY_FRACTION] = f"{fraction:g}"


def enable_compilation_cache(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Turns on JAX's persistent compilation cache, in the user's cache folder.

    The folder is ``JAX_COMPILATION_CACHE_DIR``, else ``$XDG_CACHE_HOME/jlora``, else
    ``~/.cache/jlora``; returns it, or None if it cannot be written, which is not an error.
    """
    import jax

    chosen = environ.get("JAX_COMPILATION_CACHE_DIR")
    cache = environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME", "~")).expanduser() / ".cache"
    folder = Path(chosen) if chosen else Path(cache) / "jlora" / f"xla-{_cpu_digest()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # mkdir succeeds on a folder that is there, even if nothing can be written to it.
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default JAX does not store programs that compile within a second: loading and quantizing
    # have dozens of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return folder


def _cpu_digest() -> str:
    """A short digest of this CPU's features: code compiled for another CPU may not run here."""
    features = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    return hashlib.sha256(features.encode()).hexdigest()[:8]
