"""How the time to compile the training step grows with depth; it should not grow.

    python benchmarks/compile_time.py [--target cpu|h200|v5e] [--layers 4,32]

Compiles the QLoRA step that ``memory.py`` measures, batch 1 x 512, width 1024, for models whose
layers are all equal and for models whose layers differ, from shapes alone. Trees and shapes are
made before the clock starts; tracing, lowering and compilation are timed, without a cache.
"""

from __future__ import annotations

from typing import Any

import paired
from memory import Row, llama, program_of, start

GEMMA3 = {
    "model_type": "gemma3_text",
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "sliding_window": 256,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": llama(1024, 4096, 1, 8),
    "gemma3_text, five local layers to a global one": GEMMA3,
    "gpt2": {"model_type": "gpt2", "n_embd": 1024, "n_head": 8, "vocab_size": 32_000},
    "qwen3_moe, 16 experts": {
        **llama(1024, 4096, 1, 8),
        "model_type": "qwen3_moe",
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 512,
    },
}


def compiling(model: str, layers: int, target: str) -> Any:
    """A unit that traces, lowers and compiles the step of a model with this many layers."""
    name = start(target)
    import jax

    from jlora.plan.jax_cudnn_shim import jax_checks_capability
    from jlora.plan.target import devices, parse_target

    compile_target = parse_target(name)
    found = (devices(compile_target) or ())[:1]
    hf = MODELS[model]
    key = "n_layer" if hf["model_type"] == "gpt2" else "num_hidden_layers"
    program = program_of(
        {**hf, key: layers},
        Row(16),
        batch=1,
        length=512,
        devices=found,
        compile_target=compile_target,
    )

    def unit() -> None:
        jax.clear_caches()
        with jax_checks_capability(compile_target.gpu_capability):
            program.compile()

    return unit


def main() -> None:
    """Measures every model at each depth."""
    parser = paired.arguments(__doc__, repeats=3)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--layers", default="4,32")
    args = parser.parse_args()
    points = {
        model: [
            paired.Contestant(
                f"{layers} layers",
                "compile_time:compiling",
                {"model": model, "layers": int(layers), "target": args.target},
            )
            for layers in args.layers.split(",")
        ]
        for model in MODELS
    }
    facts = {"grows": False, "memory": False}
    paired.compare(f"compile-time-{args.target}", "model", points, args, **facts)


if __name__ == "__main__":
    main()
