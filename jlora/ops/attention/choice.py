"""The choice of the attention backend: by platform, properties of the call, and measurements."""

from __future__ import annotations

from typing import NamedTuple

from jlora.errors import ConfigError, did_you_mean
from jlora.ops.attention import chunked, cudnn, splash
from jlora.ops.attention.case import Case

BACKENDS = ("auto", "reference", "chunked", "cudnn", "splash")
"""Values of ``model.attention``; ``auto`` picks one of the others."""

# JAX's Pallas Triton attention is not among them: JAX has deprecated it, and has had the test of
# its gradients off on all GPUs since September 2025.
KERNELS = {"cuda": ("cudnn", cudnn), "tpu": ("splash", splash)}
"""Lowering platform of JAX → the name and the module of its attention kernel."""


class Choice(NamedTuple):
    """A backend and the reason for it."""

    backend: str
    why: str


SHORT = chunked.CHUNKS["cpu"][0][-1]
"""Rows of at most this many tokens take the reference: one chunk has nothing to skip."""


def check_backend(name: str) -> str:
    """``name`` itself; ConfigError if there is no such backend."""
    if name not in BACKENDS:
        raise ConfigError(
            f"there is no attention {name!r}",
            where="model.attention",
            fix=did_you_mean(name, BACKENDS) or f"one of {', '.join(BACKENDS)}",
        )
    return name


def choose(platform: str, case: Case, backend: str = "auto") -> Choice:
    """The backend that ``backend`` resolves to on a platform ("cpu", "cuda", "tpu").

    ``auto`` is the platform's kernel if that supports the call, else ``chunked``, whose memory is
    linear in length and which on a CPU is as fast as the reference from 128 tokens on and four
    times as fast at 1024 (docs/log.md); for short rows it is ``reference``.
    """
    if backend != "auto":
        return Choice(backend, "asked for")
    reason = ""
    if platform in KERNELS:
        name, kernel = KERNELS[platform]
        declined = kernel.declines(case)
        if declined is None:
            return Choice(name, f"made for {platform}")
        reason = f"{declined}; "
    name = fallback(case.length)
    than = "more than" if name == "chunked" else "no more than"
    return Choice(name, f"{reason}{case.length} tokens are {than} a chunk of {SHORT}")


def fallback(length: int) -> str:
    """The backend for calls that no kernel supports."""
    return "chunked" if length > SHORT else "reference"


def needs_static_window(backend: str) -> bool:
    """Whether ``backend`` may resolve to a kernel, which needs the window as a Python integer.

    Scanned layers with different windows then need one branch per window (``jax.lax.switch``); the
    other backends take a traced window and need no branches.
    """
    if backend == "auto":
        return any(kernel.available() for _, kernel in KERNELS.values())
    return any(backend == name for name, _ in KERNELS.values())


def check_possible(backend: str, case: Case) -> None:
    """Raises ConfigError if the named backend does not support the call or is not installed."""
    for platform, (name, kernel) in KERNELS.items():
        if name != backend:
            continue
        reason = kernel.declines(case)
        if not kernel.available():
            reason = f"{name} needs JAX's support for {platform}, which is not installed"
        if reason:
            raise ConfigError(
                reason,
                where=f"model.attention: {backend}",
                fix="set it to auto, which uses it where it can",
            )
