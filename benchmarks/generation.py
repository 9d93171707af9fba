"""Greedy generation with a KV cache, compared with transformers' ``generate``.

    python benchmarks/generation.py [--batches 1,4,16] [--prompt 32] [--new 64] [--packed]

The 63-million-parameter Llama in bfloat16 with random weights; every row has a prompt of 32 tokens
and generates exactly 64 tokens. ``--packed``: NF4 on both sides. Compilation is not measured. Needs
the extra ``parity``.
"""

from __future__ import annotations

from typing import Any

import llama
import paired


def jlora_unit(batch: int, prompt: int, new: int, quantized: bool) -> Any:
    """The function that ``jlora generate`` calls."""
    import numpy as np

    from jlora.inference import decoding

    model, params = llama.jlora_model(llama.shape())
    params = llama.quantize(params) if quantized else params
    ids = np.random.default_rng(0).integers(0, llama.VOCAB, (batch, prompt)).tolist()

    def unit() -> dict[str, float]:
        replies = decoding.generate(model, params, ids, max_new_tokens=new, eos_ids=())
        return {"tokens": sum(map(len, replies))}

    return unit


def transformers_unit(batch: int, prompt: int, new: int, quantized: bool) -> Any:
    """``generate`` with its own cache."""
    torch = llama.torch_threads()
    model = llama.transformers_model(llama.shape())
    model = (llama.quantize_torch_model(model) if quantized else model).eval()
    ids = torch.randint(0, llama.VOCAB, (batch, prompt), device=llama.torch_device())
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}

    def unit() -> dict[str, float]:
        with torch.inference_mode():
            got = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return {"tokens": (got.shape[1] - prompt) * batch}

    return unit


def main() -> None:
    """Measures each batch size."""
    parser = paired.arguments(__doc__)
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--packed", action="store_true")
    args = parser.parse_args()
    points = {}
    for batch in map(int, args.batches.split(",")):
        arguments = {
            "batch": batch,
            "prompt": args.prompt,
            "new": args.new,
            "quantized": args.packed,
        }
        points[batch] = [
            paired.Contestant("jlora", "generation:jlora_unit", arguments),
            paired.Contestant("transformers", "generation:transformers_unit", arguments),
        ]
    name = f"generation{'-nf4' if args.packed else ''}"
    size = 2 * llama.linear_parameters(llama.shape())  # read for every token
    paired.compare(name, "batch", points, args, new=args.new, bytes_per_token=size)


if __name__ == "__main__":
    main()
