"""What each kind of adapter costs: its training step beside plain LoRA's, in one run.

    python benchmarks/adapters.py [--quantize] [--length 256] [--batch 8] [--repeats 9]

A Llama of 63 million random parameters, bfloat16, r 16 on every linear layer, one step of AdamW;
the steps of all kinds take turns, so that a busy machine is busy for all. Prints the median of each
and its ratio to LoRA's; results go to ``benchmarks/results/adapters.json``.
"""

import argparse
import json
import os
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

LLAMA = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "embeddings too": {"target_modules": ".*(_proj|embed_tokens)"},
    "256 tokens' rows too": {"trainable_token_indices": list(range(256))},
    "a bias on B": {"lora_bias": True},
}


def steps(asked: argparse.Namespace) -> dict[str, Any]:
    """A function for each kind that does one step, and waits for it."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import jlora
    from jlora import sharding
    from jlora.config import MeshConfig
    from jlora.job import attach
    from jlora.models import Model, init_params
    from jlora.state import init_state
    from jlora.step import make_train_step

    model = Model.from_config(LLAMA, "bfloat16", gradient_checkpointing=asked.checkpointing)
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), model)
    if asked.quantize:
        params = jlora.quantize(params, jlora.QuantConfig())
    shape = (1, asked.batch, asked.length)
    ids = np.random.default_rng(0).integers(0, 8192, shape, dtype=np.int32)
    positions = np.broadcast_to(np.arange(asked.length, dtype=np.int32), shape)
    batch = {"input_ids": ids, "labels": ids, "positions": positions}
    batch = {k: jnp.asarray(v) for k, v in {**batch, "segment_ids": np.ones_like(ids)}.items()}

    def make(fields: dict[str, Any]) -> Any:
        fields = {"target_modules": "all-linear", "r": 16, **fields}
        adapter = jlora.init_adapter(jax.random.key(1), params, jlora.LoraConfig(**fields))
        optimizer = optax.adamw(1e-4)
        options = sharding.compiler_options(sharding.make_mesh(MeshConfig()))
        step = make_train_step(model, attach, optimizer, compiler_options=options)
        state = init_state(adapter, optimizer)

        def one() -> None:
            nonlocal state
            state, metrics = step(state, (params, None), batch)
            jax.block_until_ready(metrics)

        return one

    return {name: make(fields) for name, fields in KINDS.items()}


def main() -> None:
    """Measures every kind and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quantize", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    asked = parser.parse_args()
    import jax

    todo, times = steps(asked), {name: [] for name in KINDS}
    for one in todo.values():
        one()  # compiles
    for _ in range(asked.repeats):
        for name, one in todo.items():
            start = time.perf_counter()
            one()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(each) for name, each in times.items()}
    print("| adapter | step | of LoRA's |")
    print("|---|---|---|")
    for name, seconds in medians.items():
        print(f"| {name} | {seconds:.3f} s | {seconds / medians['LoRA']:.2f} |")
    where = {"date": str(date.today()), "jax": jax.__version__, "cpus": os.cpu_count()}
    path = Path(__file__).parent / "results" / f"adapters{'-nf4' if asked.quantize else ''}.json"
    result = {**where, **vars(asked), "device": jax.devices()[0].device_kind, "seconds": times}
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
