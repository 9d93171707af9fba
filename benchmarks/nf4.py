"""NF4 with double quantization: quantizing and dequantizing, compared with bitsandbytes.

    python benchmarks/nf4.py [--sizes 512,2048,4096] [--dtype bfloat16]

A unit quantizes, or dequantizes, 16 million weights: one matrix, or several calls on a smaller one.
The results hold the bits per parameter and the error relative to the matrix's norm; both sides
produce the same bytes (``tests/test_parity_quant_nf4.py``). Needs the extra ``parity``.
"""

from __future__ import annotations

from typing import Any

import llama
import paired

WEIGHTS = 2**24


def _values(size: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).standard_normal((size, size), np.float32)


def _facts(values: Any, got: Any, nbytes: int) -> dict[str, float]:
    import numpy as np

    error = np.linalg.norm(got - values) / np.linalg.norm(values)
    return {"bits_per_parameter": 8 * nbytes / values.size, "relative_error": float(error)}


def jlora_unit(what: str, size: int, dtype: str) -> Any:
    """``nf4.quantize`` or ``nf4.dequantize``."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jlora.quant import nf4

    values = _values(size)
    w = jnp.asarray(values).astype(dtype)
    q = nf4.quantize(w, double_quant=True)
    facts = _facts(values, np.asarray(nf4.dequantize(q)).astype(np.float32), q.nbytes)

    def unit() -> dict[str, float]:
        for _ in range(WEIGHTS // size**2):
            jax.block_until_ready(
                nf4.quantize(w, double_quant=True) if what == "quantize" else nf4.dequantize(q)
            )
        return facts

    return unit


def bitsandbytes_unit(what: str, size: int, dtype: str) -> Any:
    """``quantize_4bit`` or ``dequantize_4bit``."""
    torch = llama.torch_threads()
    import bitsandbytes.functional as bnb

    values = _values(size)
    w = torch.from_numpy(values).to(getattr(torch, dtype)).to(llama.torch_device())

    def quantize() -> tuple[Any, Any]:
        return bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)

    codes, state = quantize()
    nbytes = codes.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    facts = _facts(values, bnb.dequantize_4bit(codes, state).float().cpu().numpy(), nbytes)

    def unit() -> dict[str, float]:
        for _ in range(WEIGHTS // size**2):
            quantize() if what == "quantize" else bnb.dequantize_4bit(codes, state)
        if w.is_cuda:
            torch.cuda.synchronize()
        return facts

    return unit


def main() -> None:
    """Measures both directions for each size."""
    parser = paired.arguments(__doc__, repeats=7)
    parser.add_argument("--sizes", default="512,2048,4096")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    args = parser.parse_args()
    for what in ("quantize", "dequantize"):
        points = {}
        for size in map(int, args.sizes.split(",")):
            arguments = {"what": what, "size": size, "dtype": args.dtype}
            points[size] = [
                paired.Contestant("jlora", "nf4:jlora_unit", arguments),
                paired.Contestant("bitsandbytes", "nf4:bitsandbytes_unit", arguments),
            ]
        grows = {"grows": False, "weights": WEIGHTS}  # all sizes do the same work per unit
        paired.compare(f"nf4-{what}", "size", points, args, **grows)


if __name__ == "__main__":
    main()
