"""Products with packed matrices: the fused kernel beside dequantizing first, on this device.

    python benchmarks/nf4_matmul.py [--repeats 20]            measure, print, write JSON
    python benchmarks/nf4_matmul.py --compile h200|v5e        compile only, without the device
    python benchmarks/nf4_matmul.py --floor                   the arithmetic, without anything

Shapes are Llama-3.1-8B's, bf16, NF4 with double quantization; forward ``x @ W`` and the gradient
``g @ W.T``. Each result is compared with the reference before anything is timed; the two ways are
timed in turn, medians. Where the kernel is faster for all shapes up to some number of rows, that
number belongs into ``nf4_kernel.MEASURED``.

The floor of each way is the larger of bytes over bandwidth and FLOPs over the matrix rate.
Dequantizing first moves 0.5 + 2 + 2 bytes a parameter (codes, the matrix written, the matrix read),
the kernel 0.5; both compute 2 FLOPs for each row and parameter. The kernel's dequantizing is done
anew for every tile of rows, which the floor leaves out: many rows are the matrix unit's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from memory import ENVIRONMENT, HERE, device_of

SHAPES = [(4096, 4096), (4096, 1024), (4096, 14_336), (14_336, 4096)]
ROWS = [1, 16, 64, 256, 512, 2048, 4096]
DEVICES = {"h200": (4.8e12, 9.9e14), "v5e": (8.2e11, 1.97e14)}
"""Bytes and bf16 FLOPs a second, from the vendors' data sheets."""


def floors(device: str) -> str:
    """Markdown: microseconds at least, for the largest shape."""
    bandwidth, rate = DEVICES[device]
    size = 4096 * 14_336
    lines = [f"| rows ({device}) | dequantize, then multiply | fused | ratio |", "|---" * 4 + "|"]
    for rows in ROWS:
        activations, compute = 2 * rows * (4096 + 14_336), 2 * rows * size / rate
        first = 2.516 * size / bandwidth + max(compute, (2 * size + activations) / bandwidth)
        fused = max(compute, (0.516 * size + activations) / bandwidth)
        cells = f"{1e6 * first:.1f} | {1e6 * fused:.1f} | {first / fused:.2f}"
        lines.append(f"| {rows} | {cells} |")
    return "\n".join(lines)


def ways(platform: str, transpose: bool) -> dict[str, Any]:
    """Both as functions (x, q)."""
    from jlora import nf4_kernel
    from jlora.dot import _product

    return {
        "dequantize": lambda x, q: _product(x, q.dequantize(), int(transpose)),
        "fused": lambda x, q: nf4_kernel.matmul(x, q, transpose, platform=platform),
    }


def measure(repeats: int) -> list[dict[str, Any]]:
    """A line for each shape, number of rows and direction."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jlora import nf4

    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    lines = []
    for shape in SHAPES:
        w = jax.random.normal(jax.random.key(0), shape[::-1], jnp.bfloat16)
        q = nf4.quantize(w).mT
        for rows in ROWS:
            for transpose in (False, True):
                x = jax.random.normal(jax.random.key(1), (rows, shape[transpose]), jnp.bfloat16)
                runs = {k: jax.jit(f) for k, f in ways(platform, transpose).items()}
                got, want = (np.asarray(runs[k](x, q), np.float32) for k in ("fused", "dequantize"))
                error = float(np.abs(got - want).max() / np.abs(want).max())
                assert error < 0.01, (shape, rows, transpose, error)
                times: dict[str, list[float]] = {k: [] for k in runs}
                for _ in range(repeats):
                    for name, run in runs.items():
                        start = time.perf_counter()
                        jax.block_until_ready(run(x, q))
                        times[name].append(time.perf_counter() - start)
                ms = {k: round(1e3 * statistics.median(v), 4) for k, v in times.items()}
                lines.append({"shape": shape, "rows": rows, "gradient": transpose, **ms})
                print(lines[-1], flush=True)
    return lines


def compile_only(target: str) -> None:
    """Temporary bytes of both ways, compiled for a device that is not here."""
    import jax
    import jax.numpy as jnp

    from jlora import nf4

    place = jax.sharding.SingleDeviceSharding(device_of(target))
    platform = "tpu" if target == "v5e" else "cuda"

    def shaped(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    for shape in SHAPES:
        w = jax.ShapeDtypeStruct(shape[::-1], jnp.bfloat16)
        q = shaped(jax.eval_shape(lambda w: nf4.quantize(w).mT, w))
        for rows in ROWS:
            for transpose in (False, True):
                x = shaped(jax.ShapeDtypeStruct((rows, shape[transpose]), jnp.bfloat16))
                sizes = {}
                for name, way in ways(platform, transpose).items():
                    compiled = jax.jit(way).lower(x, q).compile()
                    sizes[name] = compiled.memory_analysis().temp_size_in_bytes
                print(shape, rows, "gradient" if transpose else "forward", sizes, flush=True)


def main() -> None:
    """Measures, compiles or computes, as asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--compile", choices=[t for t in ENVIRONMENT if t != "cpu"])
    parser.add_argument("--floor", action="store_true")
    asked = parser.parse_args()
    if asked.floor:
        print("\n\n".join(floors(device) for device in DEVICES))
        return
    if asked.compile:
        os.environ |= ENVIRONMENT[asked.compile]
        compile_only(asked.compile)
        return
    import jax

    lines = measure(asked.repeats)
    device = jax.devices()[0].device_kind
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    path = Path(HERE) / "results" / f"nf4_matmul-{device.replace(' ', '-').lower()}.json"
    path.write_text(json.dumps({"device": device, **versions, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
