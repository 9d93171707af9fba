"""Speed and size of NF4 beside bitsandbytes on the same machine, in the same run, as JSON.

    python benchmarks/nf4.py [--size 4096] [--dtype bfloat16] [--repeats 7]

Times are the fastest of the repeats, taken in turn so that a busy moment hits both. Needs the extra
``parity``; bitsandbytes runs on the CPU, so run jax there too (``JAX_PLATFORMS=cpu``).
"""

import argparse
import json
import os
import platform
import time

import bitsandbytes
import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import torch

from jlora import nf4


def fastest(functions: dict, repeats: int) -> dict[str, float]:
    """Milliseconds of each function, the first call (which compiles) left out."""
    best = dict.fromkeys(functions, float("inf"))
    for function in functions.values():
        function()
    for name in list(functions) * repeats:
        start = time.perf_counter()
        functions[name]()
        best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return {name: round(value, 2) for name, value in best.items()}


def measure(size: int, dtype: str, repeats: int) -> dict:
    """Rows for quantizing and dequantizing one square matrix."""
    values = np.random.default_rng(0).standard_normal((size, size), np.float32)
    ours, theirs = (
        jnp.asarray(values).astype(dtype),
        torch.from_numpy(values).to(getattr(torch, dtype)),
    )
    result: dict = {}
    for double in (False, True):
        q = nf4.quantize(ours, double_quant=double)
        state = bnb.quantize_4bit(theirs, quant_type="nf4", compress_statistics=double)
        calls = {
            "quantize": {
                "jlora": lambda d=double: jax.block_until_ready(nf4.quantize(ours, double_quant=d)),
                "bitsandbytes": lambda d=double: bnb.quantize_4bit(
                    theirs, quant_type="nf4", compress_statistics=d
                ),
            },
            "dequantize": {
                "jlora": lambda q=q: jax.block_until_ready(nf4.dequantize(q)),
                "bitsandbytes": lambda s=state: bnb.dequantize_4bit(*s),
            },
        }
        got = np.asarray(q.dequantize()).astype(np.float64)
        row = {
            "bits_per_parameter": round(8 * q.nbytes / q.size, 4),
            "relative_error": round(
                float(np.linalg.norm(got - values) / np.linalg.norm(values)), 5
            ),
        }
        for name, pair in calls.items():
            times = fastest(pair, repeats)
            ratio = round(times["bitsandbytes"] / times["jlora"], 2)
            row[name] = {f"{who}_ms": ms for who, ms in times.items()} | {"speedup": ratio}
        result["double_quant" if double else "single"] = row
    return result


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    machine = {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "bitsandbytes": bitsandbytes.__version__,
    }
    results = measure(options.size, options.dtype, options.repeats)
    print(json.dumps({"machine": machine, "options": vars(options), **results}, indent=2))


if __name__ == "__main__":
    main()
