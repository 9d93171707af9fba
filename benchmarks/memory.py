"""Peak memory of the training step, by the compiler's own analysis: no weights, no accelerator.

    python benchmarks/memory.py --target h200 [--models 7B,65B] [--ranks 16,64] [--length 512]

The step is the one that ``jlora train`` runs (model, quantization, adapter, optimizer), lowered
from shapes alone and compiled for the target. Peak is arguments + temporaries + outputs - aliases,
what the device holds while a step runs, in GB of 1e9 bytes. ``h200`` needs ``jax[cuda13]``,
``v5e`` needs ``jax[tpu]``, neither needs the device; ``cpu`` needs nothing. Results are merged
into ``benchmarks/results/memory-TARGET.json``, from which the printed table is made.
"""

import argparse
import dataclasses
import functools
import json
import os
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ENVIRONMENT = {
    "cpu": {"JAX_PLATFORMS": "cpu"},
    "h200": {"JAX_PLATFORMS": "cpu,cuda", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"},
    "v5e": {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"},
}
"""What each target needs set before JAX is imported: none of the devices is here."""


def llama(hidden: int, inner: int, layers: int, heads: int, kv: int = 0, **more: Any) -> dict:
    """A Llama's ``config.json``."""
    return {
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv or heads,
        "max_position_embeddings": 4096,
        **more,
    }


MODELS = {
    "1B": llama(2048, 8192, 16, 32, 8, vocab_size=128_256, head_dim=64, tie_word_embeddings=True),
    "7B": llama(4096, 11_008, 32, 32),
    "8B": llama(4096, 14_336, 32, 32, 8, vocab_size=128_256),
    "13B": llama(5120, 13_824, 40, 40),
    "33B": llama(6656, 17_920, 60, 52),
    "65B": llama(8192, 22_016, 80, 64),
    "70B": llama(8192, 28_672, 80, 64, 8),
}
"""Llama-3.2-1B, LLaMA 7B, Llama-3.1-8B, LLaMA 13B, 33B and 65B, Llama-2-70B."""

PAPER = {"7B": 6.9, "13B": 11.3, "33B": 24.7, "65B": 45.0}
"""GB of QLoRA, batch 1 x 512, checkpointing, paged moments (arXiv 2305.14314, figure 6)."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What is trained, and how: an adapter on every linear layer, over bf16 or NF4 weights."""

    r: int
    optim: str = "adamw"
    quantized: bool = True

    def __str__(self) -> str:
        return f"{'QLoRA' if self.quantized else 'LoRA'} r {self.r}, {self.optim}"


def lower_step(hf: dict, row: Row, batch: int, length: int, device: Any) -> Any:
    """A function that lowers the train step of one device, and bytes of what the step is given."""
    import jax
    import jax.numpy as jnp

    import jlora
    from jlora import sharding
    from jlora.config import MeshConfig, TrainConfig
    from jlora.job import attach
    from jlora.models import Model, init_params
    from jlora.optim import make_optimizer
    from jlora.state import init_state
    from jlora.step import make_train_step

    model = Model.from_config(hf, "bfloat16", gradient_checkpointing=True)
    lora = jlora.LoraConfig(r=row.r, lora_dropout=0.05, target_modules="all-linear")
    mesh = sharding.make_mesh(MeshConfig(), [device])

    def base(key):
        params = init_params(key, model)
        return jlora.quantize(params, jlora.QuantConfig()) if row.quantized else params

    def placed(tree, places):
        return jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, places
        )

    frozen = jax.eval_shape(base, jax.random.key(0))
    adapter = jax.eval_shape(
        functools.partial(jlora.init_adapter, config=lora), jax.random.key(1), frozen
    )
    optimizer = make_optimizer(TrainConfig(output_dir="unused", optim=row.optim), 1000, adapter)
    state = sharding.typed(functools.partial(init_state, optimizer=optimizer), adapter)
    tokens = jax.ShapeDtypeStruct((1, batch, length), jnp.int32)
    rows = dict.fromkeys(("input_ids", "labels", "positions", "segment_ids"), tokens)
    places = sharding.shardings(state, mesh)
    step = make_train_step(model, attach, optimizer, state_shardings=places)
    given = (
        placed(state, places),
        (placed(frozen, sharding.shardings(frozen, mesh)), None),
        placed(rows, dict.fromkeys(rows, sharding.batch_sharding(mesh))),
    )
    sizes = {"base": frozen, "adapter": state.trainable, "optimizer": state.opt_state}

    def lower() -> Any:
        with jax.set_mesh(mesh):
            return step.lower(*given)

    return lower, {k: n_bytes(v) for k, v in sizes.items()}


def n_bytes(tree: Any) -> int:
    """What the arrays of a tree occupy."""
    import jax

    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def measure(hf: dict, row: Row, batch: int, length: int, device: Any) -> dict[str, Any]:
    """Bytes of the compiled step, in all and by part; or why it cannot be compiled."""
    start = time.perf_counter()
    try:
        lower, parts = lower_step(hf, row, batch, length, device)
        compiled = lower().compile()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"refused": str(error).strip().splitlines()[0]}
    memory = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return {
        "peak": peak,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliases": memory.alias_size_in_bytes,
        "host": memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        **parts,
        "compile_seconds": round(time.perf_counter() - start, 1),
    }


def device_of(target: str) -> Any:
    """One device of the target, real for ``cpu`` and described for the others."""
    import jax
    from jax.experimental import topologies

    if target == "cpu":
        return jax.devices("cpu")[0]
    if target == "v5e":
        options = {"topology_name": "v5e:1x1", "chips_per_host_bounds": (1, 1, 1)}
        return topologies.get_topology_desc(platform="tpu", **options).devices[0]
    text = (HERE / "targets" / f"{target}.txt").read_text()
    options = {"topology_name": target, "target_config": text, "topology": "1x1x1"}
    return topologies.get_topology_desc(platform="cuda", **options).devices[0]


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: a line for each model and row, in GB."""
    titles = [
        "model",
        "step",
        "peak",
        "paper",
        "base",
        "adapter",
        "moments",
        "temporaries",
        "on the host",
    ]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for name in MODELS:
        for row, got in results.get(name, {}).items():
            if "refused" in got:
                lines.append(f"| {name} | {row} | refused: {got['refused'][:80]} |" + " |" * 6)
                continue
            paper = PAPER.get(name, "") if row.startswith("QLoRA") else ""
            keys = "base", "adapter", "optimizer", "temporaries", "host"
            cells = [f"{got['peak'] / 1e9:.2f}", paper, *(f"{got[k] / 1e9:.2f}" for k in keys)]
            lines.append(f"| {name} | {row} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Compiles the rows asked for, updates the target's results and prints them as a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=list(ENVIRONMENT), required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--ranks", default="16,64")
    parser.add_argument("--optim", default="adamw")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    asked = parser.parse_args()
    os.environ |= ENVIRONMENT[asked.target]
    import jax

    device = device_of(asked.target)
    path = HERE / "results" / f"memory-{asked.target}.json"
    whole = json.loads(path.read_text()) if path.exists() else {"results": {}}
    for name in asked.models.split(","):
        rows = whole["results"].setdefault(name, {})
        for r in asked.ranks.split(","):
            for optim in asked.optim.split(","):
                for quantized in (False, True) if optim == "adamw" else (True,):
                    row = Row(int(r), optim, quantized)
                    got = measure(MODELS[name], row, asked.batch, asked.length, device)
                    rows[str(row)] = got
                    print(name, row, got, flush=True)
    whole |= {
        "date": date.today().isoformat(),
        "target": asked.target,
        "device": str(device),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "batch": [asked.batch, asked.length],
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(whole, indent=1) + "\n")
    print(table(whole["results"]))


if __name__ == "__main__":
    main()
