"""Products with quantized matrices: the fused kernel compared with dequantizing first.

    python benchmarks/nf4_matmul.py [--repeats 20]            measure, print, write JSON
    python benchmarks/nf4_matmul.py --compile h200|v5e        compile only, without the device
    python benchmarks/nf4_matmul.py --floor                   compute lower bounds only

Shapes are Llama-3.1-8B's, bf16, NF4 with double quantization; forward ``x @ W`` and the gradient
``g @ W.T``. Each result is compared with the reference before anything is timed; the two methods
are timed alternately, and medians are reported. The kernel may be used up to the largest number of
rows for which it is faster with every shape.

A floor is the largest of bytes / bandwidth, FLOPs / matrix rate and decoding operations / ALU rate.
Dequantizing first moves 0.5 + 2 + 2 bytes a parameter (codes, the matrix written, the matrix read)
and decodes each value once; the kernel moves 0.5, and decodes each value again for every tile of
rows of ``x``. How much of the decoding overlaps with the matrix unit is only known on a device, so
the kernel has two figures: full overlap, and none.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import time
from pathlib import Path
from typing import Any

from memory import HERE, start

SHAPES = [(4096, 4096), (4096, 1024), (4096, 14_336), (14_336, 4096)]
ROWS = [1, 16, 64, 256, 512, 2048, 4096]
DEVICES = {
    "h200": (4.8e12, 9.9e14, 132 * 128 * 1.98e9, (43, 13), 128),
    "v5e": (8.2e11, 1.97e14, 4 * 1024 * 1.5e9, (25, 25), 1024),
}
"""Bytes, bf16 FLOPs and lane operations a second; operations to decode a value, first and fused;
rows of ``x`` that one decoding serves.

Rates are the vendors', v5e's ALUs (four of 8 x 128 lanes) and clock inferred from its matrix rate.
H200's operations were counted in the PTX of both ways, v5e's in the source (15 selects, 4 tests).
"""


def floors(device: str) -> str:
    """Markdown: the lower bound in microseconds, for the largest shape."""
    bandwidth, rate, lanes, (first_ops, fused_ops), tile = DEVICES[device]
    size = 4096 * 14_336
    names = "dequantize, then multiply | fused, decoding hidden | not hidden | ratio"
    lines = [f"| rows ({device}) | {names} |", "|---" * 5 + "|"]
    for rows in ROWS:
        activations, compute = 2 * rows * (4096 + 14_336), 2 * rows * size / rate
        first = max(2.516 * size / bandwidth, first_ops * size / lanes)
        first += max(compute, (2 * size + activations) / bandwidth)
        decode = -(-rows // tile) * fused_ops * size / lanes
        moved = (0.516 * size + activations) / bandwidth
        hidden, bare = max(moved, compute, decode), max(moved, compute + decode)
        cells = " | ".join(f"{1e6 * t:.0f}" for t in (first, hidden, bare))
        lines.append(f"| {rows} | {cells} | {first / bare:.2f}–{first / hidden:.2f} |")
    return "\n".join(lines)


def ways(platform: str, transpose: bool) -> dict[str, Any]:
    """Both methods as functions of (x, q)."""
    from jlora.experimental.nf4_matmul import nf4_matmul
    from jlora.ops.matmul import array_matmul

    return {
        "dequantize": lambda x, q: array_matmul(x, q.dequantize(), int(transpose)),
        "fused": lambda x, q: nf4_matmul(x, q, transpose, platform=platform),
    }


def measure(repeats: int) -> list[dict[str, Any]]:
    """One result for each shape, number of rows and direction."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jlora.quant import nf4

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
    """Prints the temporary bytes of both methods, compiled for an absent device."""
    start(target)
    import jax
    import jax.numpy as jnp

    from jlora.plan.target import devices, parse_target
    from jlora.quant import nf4

    found = devices(parse_target(target))
    assert found is not None, f"JAX's plugin for {target} is not installed"
    place = jax.sharding.SingleDeviceSharding(found[0])
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
    """Measures, compiles, or computes the floors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--compile", choices=list(DEVICES))
    parser.add_argument("--floor", action="store_true")
    args = parser.parse_args()
    if args.floor:
        print("\n\n".join(floors(device) for device in DEVICES))
        return
    if args.compile:
        compile_only(args.compile)
        return
    import jax

    lines = measure(args.repeats)
    device = jax.devices()[0].device_kind
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    path = Path(HERE) / "results" / f"nf4_matmul-{device.replace(' ', '-').lower()}.json"
    path.write_text(json.dumps({"device": device, **versions, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
