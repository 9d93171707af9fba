"""Lets JAX lower cuDNN attention for a GPU that is not in this machine.

``jax.nn.dot_product_attention(implementation="cudnn")`` checks the compute capability of the
process's own first GPU while it lowers, and has no argument for another one (jax 0.10.2 to 0.12).
Until it does, the private check is replaced for the duration of a compilation for an absent GPU.
This is the only place where jlora changes another package.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def jax_checks_capability(capability: tuple[int, int] | None) -> Iterator[None]:
    """In the block JAX checks this compute capability; None leaves its check alone."""
    if capability is None:
        yield
        return
    from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn

    def is_at_least(required: str) -> bool:
        return capability >= tuple(map(int, required.split(".")))

    check = jax_cudnn.check_compute_capability
    jax_cudnn.check_compute_capability = is_at_least
    try:
        yield
    finally:
        jax_cudnn.check_compute_capability = check
