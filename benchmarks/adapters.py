"""The cost of each kind of adapter: its training step compared with plain LoRA's and with peft's.

    python benchmarks/adapters.py [--method lora,qlora] [--length 256] [--batch 4]

The step is that of ``training_step.py`` with the 63-million-parameter Llama, r 16 on every linear
layer; "jlora, LoRA" is the same step with a plain adapter, measured alternately. QLoRA is NF4 with
double quantization and every layer recomputed in the backward pass. peft's step runs under autocast
with the adapter in float32. Needs the extra ``parity``.
"""

from __future__ import annotations

from typing import Any

import paired
from training_step import HEADLINE

KINDS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "embeddings too": {"target_modules": ".*(_proj|embed_tokens)"},
    "256 tokens' rows too": {"trainable_token_indices": list(range(256))},
    "a bias on B": {"lora_bias": True},
}
"""Settings of ``LoraConfig``, which have the same names in both libraries."""


def contestants(
    method: str, sizes: dict[str, int], settings: dict[str, Any]
) -> list[paired.Contestant]:
    """jlora with and without these settings, and peft with them."""
    step, plain = "training_step:jlora_step", {"method": method, "sizes": sizes}
    arguments = {**plain, "settings": settings}
    return [
        paired.Contestant("jlora", step, arguments),
        paired.Contestant("jlora, LoRA", step, plain),
        paired.Contestant("peft", "training_step:peft_step", {**arguments, "autocast": True}),
    ]


def main() -> None:
    """Measures every kind."""
    parser = paired.arguments(__doc__)
    parser.add_argument("--method", default="lora,qlora")
    parser.add_argument("--length", type=int, default=HEADLINE["length"])
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    sizes = {**HEADLINE, "length": args.length, "batch": args.batch}
    for method in args.method.split(","):
        points = {kind: contestants(method, sizes, settings) for kind, settings in KINDS.items()}
        facts = {"grows": False, "peers": ["peft"]}
        paired.compare(f"adapters-{method}", "adapter", points, args, warmup=2, **facts)


if __name__ == "__main__":
    main()
