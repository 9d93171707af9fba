"""How the time to compile the training step grows with depth: it should not.

    python benchmarks/compile_time.py [--target cpu|h200|v5e] [--layers 4,32] [--repeats 3]

Compiles the QLoRA step that ``memory.py`` measures, of models whose layers are alike and of models
whose layers differ, from shapes alone; prints the best of the repeats for each depth and the ratio
of the deepest to the shallowest. Trees and shapes are made before the clock starts; tracing,
lowering and compilation are timed. Results go to ``benchmarks/results/compile-time-TARGET.json``.
"""

import argparse
import json
import os
import time
from datetime import date
from typing import Any

from memory import HERE, Row, llama, program_of, start

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


def seconds(hf: dict[str, Any], layers: int, target: str | None) -> float:
    """Tracing, lowering and compiling the step of a model so deep."""
    import jax

    from jlora.plan.target import chosen_for, devices, parse

    key = "n_layer" if hf["model_type"] == "gpt2" else "num_hidden_layers"
    jax.clear_caches()
    aim = parse(target)
    found = (devices(aim) or ())[:1]
    program = program_of({**hf, key: layers}, Row(16), batch=1, length=512, devices=found)
    begin = time.perf_counter()
    with chosen_for(aim):
        program.compile()
    return time.perf_counter() - begin


def main() -> None:
    """Measures every model and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--layers", default="4,32")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    target = start(asked.target)
    import jax

    depths = [int(n) for n in asked.layers.split(",")]
    results: dict[str, Any] = {}
    print("| model |", " | ".join(f"{n} layers" for n in depths), "| ratio |")
    print("|---" * (len(depths) + 2) + "|")
    for name, hf in MODELS.items():
        each: dict[int, list[float]] = {n: [] for n in depths}
        for _ in range(asked.repeats):  # in turn, so that a busy machine is busy for all
            for n in depths:
                each[n].append(seconds(hf, n, target))
        best = [min(each[n]) for n in depths]
        ratio = best[-1] / best[0]
        results[name] = {"seconds": each, "ratio": ratio}
        print(f"| {name} |", " | ".join(f"{s:.2f} s" for s in best), f"| {ratio:.2f} |", flush=True)
    where = {"date": str(date.today()), "jax": jax.__version__, "cpus": os.cpu_count()}
    path = HERE / "results" / f"compile-time-{asked.target}.json"
    path.write_text(json.dumps({**where, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
