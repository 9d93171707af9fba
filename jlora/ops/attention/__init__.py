"""Attention over packed rows and over a key-value cache, by several implementations."""

from jlora.ops.attention.case import Case
from jlora.ops.attention.choice import BACKENDS, Choice, check_backend, choose, needs_static_window
from jlora.ops.attention.dispatch import attend, attend_cached

__all__ = [
    "BACKENDS",
    "Case",
    "Choice",
    "attend",
    "attend_cached",
    "check_backend",
    "choose",
    "needs_static_window",
]
