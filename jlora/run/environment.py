"""What a command sets in its own process around JAX: no torch, and a compilation cache.

Nothing heavy is imported here: ``jlora.cli`` needs this module before the settings are checked.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path


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
