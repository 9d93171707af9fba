"""A product with a quantized weight, forward and input gradient, compared with Linear4bit.

    python benchmarks/dot.py [--rows 1,16,256,2048] [--width 2048]

``jlora.dot`` on an NF4 leaf with double quantization, and bitsandbytes' layer; x is bfloat16 [rows,
width], the weight [width, width]. "jlora, dense" is ``dot`` on the unquantized weight, which shows
the cost of dequantizing. Needs the extra ``parity``.
"""

from __future__ import annotations

from typing import Any

import llama
import paired

ROWS = 2048
"""A unit makes enough calls for this many rows in total (at most 32 calls)."""


def jlora_unit(rows: int, width: int, quantized: bool) -> Any:
    """The jitted product and its vector-Jacobian product, with a quantized or a dense weight."""
    import jax
    import jax.numpy as jnp

    import jlora
    from jlora.quant import nf4

    key = jax.random.key(0)
    w = jax.random.normal(key, (width, width), jnp.bfloat16) / width**0.5
    w = nf4.quantize(w, double_quant=True) if quantized else w
    x = jax.random.normal(key, (rows, width), jnp.bfloat16)

    @jax.jit
    def both(x: Any, g: Any, w: Any) -> tuple[Any, Any]:
        y, back = jax.vjp(lambda x: jlora.dot(x, w), x)
        return y, back(g)[0]

    def unit() -> None:
        for _ in range(calls(rows)):
            jax.block_until_ready(both(x, x, w))

    return unit


def bitsandbytes_unit(rows: int, width: int) -> Any:
    """The layer's forward and backward pass in training mode."""
    torch = llama.torch_threads()
    layer = torch.nn.Sequential(torch.nn.Linear(width, width, bias=False, dtype=torch.bfloat16))
    layer = llama.quantize_torch_model(layer.to(llama.torch_device())).train()
    x = torch.randn(rows, width, dtype=torch.bfloat16, device=llama.torch_device())
    g, x = x.clone(), x.requires_grad_()

    def unit() -> None:
        for _ in range(calls(rows)):
            layer(x).backward(g)
            x.grad = None
        if x.is_cuda:
            torch.cuda.synchronize()

    return unit


def calls(rows: int) -> int:
    """Calls per unit, at most 32: enough for a measurable time; each dequantizes the weight."""
    return min(32, max(1, ROWS // rows))


def main() -> None:
    """Measures each number of rows."""
    parser = paired.arguments(__doc__, repeats=7)
    parser.add_argument("--rows", default="1,16,256,2048")
    parser.add_argument("--width", type=int, default=2048)
    args = parser.parse_args()
    points = {}
    for rows in map(int, args.rows.split(",")):
        arguments = {"rows": rows, "width": args.width}
        points[rows] = [
            paired.Contestant("jlora", "dot:jlora_unit", {**arguments, "quantized": True}),
            paired.Contestant("bitsandbytes", "dot:bitsandbytes_unit", arguments),
            paired.Contestant("jlora, dense", "dot:jlora_unit", {**arguments, "quantized": False}),
        ]
    counts = {str(rows): calls(rows) for rows in points}
    paired.compare(
        "dot-packed", "rows", points, args, calls=counts, peers=["bitsandbytes"], memory=False
    )


if __name__ == "__main__":
    main()
