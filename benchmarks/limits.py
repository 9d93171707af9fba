"""The machine's limits: its matrix-product rate and copy bandwidth, through jax and torch.

    python benchmarks/limits.py [--size 2048] [--megabytes 256]

The cases are a square product in bfloat16, accumulated in float32; one in float32; and adding one
to a block of memory in place, which reads and writes it once. Floors in the docs are FLOPs divided
by the better of the two frameworks' rates. Needs the extra ``parity``.
"""

from __future__ import annotations

from typing import Any

import llama
import paired

CALLS = 8


def jax_unit(case: str, size: int, megabytes: int) -> Any:
    """The case, jitted."""
    import jax
    import jax.numpy as jnp

    if case == "copy":
        x = jnp.zeros(megabytes * 2**18, jnp.float32)
        step = jax.jit(lambda x: x + 1, donate_argnums=0)
    else:
        a = jax.random.normal(jax.random.key(0), (size, size), case)

        def product(x: Any) -> Any:
            return jnp.matmul(a, x, preferred_element_type=jnp.float32).astype(case)

        x, step = a, jax.jit(product)

    def unit() -> dict[str, float]:
        nonlocal x
        for _ in range(CALLS):
            y = jax.block_until_ready(step(x))
            x = y if case == "copy" else x
        return work(case, size, megabytes)

    return unit


def torch_unit(case: str, size: int, megabytes: int) -> Any:
    """The case, writing into preallocated memory."""
    torch = llama.torch_threads()
    device = llama.torch_device()
    if case == "copy":
        x = torch.zeros(megabytes * 2**18, device=device)
    else:
        a = torch.randn(size, size, device=device).to(getattr(torch, case))
        out = torch.empty_like(a)

    def unit() -> dict[str, float]:
        for _ in range(CALLS):
            x.add_(1) if case == "copy" else torch.matmul(a, a, out=out)
        if device == "cuda":
            torch.cuda.synchronize()
        return work(case, size, megabytes)

    return unit


def work(case: str, size: int, megabytes: int) -> dict[str, float]:
    """The FLOPs, or the bytes, of a unit."""
    if case == "copy":
        return {"bytes": CALLS * 2.0 * megabytes * 2**20}
    return {"flops": CALLS * 2.0 * size**3}


def main() -> None:
    """Measures the three cases."""
    parser = paired.arguments(__doc__, repeats=9)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--megabytes", type=int, default=256)
    args = parser.parse_args()
    points = {}
    for case in ("bfloat16", "float32", "copy"):
        arguments = {"case": case, "size": args.size, "megabytes": args.megabytes}
        points[case] = [
            paired.Contestant("jax", "limits:jax_unit", arguments),
            paired.Contestant("torch", "limits:torch_unit", arguments),
        ]
    paired.compare("limits", "case", points, args, warmup=2, grows=False, memory=False)


if __name__ == "__main__":
    main()
