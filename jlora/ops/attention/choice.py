"""Which backend computes an attention, and why."""

from __future__ import annotations

from typing import NamedTuple

from jlora.errors import ConfigError, did_you_mean
from jlora.ops.attention import chunked, cudnn, splash
from jlora.ops.attention.case import Case

BACKENDS = ("auto", "reference", "chunked", "cudnn", "splash")
"""Values of ``model.attention``; ``auto`` picks one of the others."""

KERNELS = {"cuda": ("cudnn", cudnn), "tpu": ("splash", splash)}
"""Platform, as JAX lowers for it → the backend that is made for it, and its module."""


class Choice(NamedTuple):
    """A backend, and why it was picked."""

    backend: str
    why: str


SHORT = chunked.CPU_CHUNKS[-1]
"""Rows of so many tokens are attended to at once, where no kernel does it."""


def check_backend(name: str) -> str:
    """``name`` itself; ConfigError when there is no such backend."""
    if name not in BACKENDS:
        raise ConfigError(
            f"there is no attention {name!r}",
            where="model.attention",
            fix=did_you_mean(name, BACKENDS) or f"one of {', '.join(BACKENDS)}",
        )
    return name


def choose(platform: str, case: Case, backend: str = "auto") -> Choice:
    """What ``backend`` means for a call on a platform ("cpu", "cuda", "tpu").

    The platform's own kernel where that can do it. Else chunks: they were measured on CPU to be as
    fast as the reference from 128 tokens on and four times faster at 1024 (docs/log.md), and take
    memory linear in length. A row of one chunk has nothing to skip, and takes the reference.
    """
    if backend != "auto":
        return Choice(backend, "asked for")
    reason = ""
    if platform in KERNELS:
        name, kernel = KERNELS[platform]
        declined = kernel.declines(case)
        if declined is None:
            has_documents = name == "cudnn" and case.segments
            falls_back = has_documents and not cudnn.supports_packed_rows(case)
            rest = f"; packed rows: {fallback(case.length)}" if falls_back else ""
            return Choice(name, f"made for {platform}{rest}")
        reason = f"{declined}; "
    name = fallback(case.length)
    than = "more than" if name == "chunked" else "no more than"
    return Choice(name, f"{reason}{case.length} tokens are {than} a chunk of {SHORT}")


def fallback(length: int) -> str:
    """The backend for all that no kernel does."""
    return "chunked" if length > SHORT else "reference"


def needs_static_window(backend: str) -> bool:
    """Whether ``backend`` may be, for a program made here, one that takes no traced window.

    Layers of different windows then need a branch each (``jax.lax.switch``) where they would share
    one program that is given its window; otherwise ``auto`` does without the kernel.
    """
    if backend == "auto":
        return any(kernel.available() for _, kernel in KERNELS.values())
    return any(backend == name for name, _ in KERNELS.values())


def check_possible(backend: str, case: Case) -> None:
    """Raises ConfigError when a backend that was asked for cannot do this, or not here."""
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
