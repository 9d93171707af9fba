"""Peak memory of the training step by the compiler's analysis, without weights or accelerator.

    python benchmarks/memory.py --target h200 [--models 7B,65B] [--ranks 16,64] [--length 512]

The step is the one that ``jlora train`` runs, compiled from shapes alone as ``jlora plan`` does.
The peak is arguments + temporaries + outputs - aliases, the memory in use while a step runs, in GB
of 1e9 bytes. Targets are those of ``plan`` (GPUs need ``jax[cuda13]``, TPUs ``jax[tpu]``, neither
needs the device), or ``cpu``, this machine. Results are merged into
``benchmarks/results/memory-TARGET.json``, from which ``tables.py`` makes the page's table.
"""

import argparse
import dataclasses
import json
import math
import platform
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


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
    offloading: bool = False

    def __str__(self) -> str:
        more = ", offloading" if self.offloading else ""
        return f"{'QLoRA' if self.quantized else 'LoRA'} r {self.r}, {self.optim}{more}"


def program_of(
    hf: dict, row: Row, batch: int, length: int, devices: Any, compile_target: Any, **mesh: int
) -> Any:
    """The run's step (``TrainStep``) on rows of ``length`` tokens, from shapes alone."""
    from jlora.config import (
        Config,
        DataConfig,
        LoraConfig,
        MeshConfig,
        ModelConfig,
        QuantConfig,
        SourceConfig,
        TrainConfig,
    )
    from jlora.distributed import sharding
    from jlora.run.abstract_job import abstract_job
    from jlora.run.step_counts import StepCounts
    from jlora.run.train_step import TrainStep

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(hf))
        config = Config(
            model=ModelConfig(name_or_path=folder),
            quantization=QuantConfig() if row.quantized else None,
            lora=LoraConfig(r=row.r, lora_dropout=0.05, target_modules="all-linear"),
            data=DataConfig(train=(SourceConfig(path="unused", format="text"),), max_length=length),
            train=TrainConfig(
                output_dir="unused",
                max_steps=1000,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=1,
                optim=row.optim,
                activation_offloading=row.offloading,
            ),
            mesh=MeshConfig(**mesh),
        )
        mesh_of = sharding.make_mesh(config.mesh, devices)
        capability = compile_target.gpu_capability
        job = abstract_job(config=config, tokenizer=None, mesh=mesh_of, gpu_capability=capability)
    return TrainStep.of(job, StepCounts.of(config, job.mesh, lambda rows: 1), length, documents=1)


def measure(
    hf: dict,
    row: Row,
    batch: int,
    length: int,
    target: str | None,
    limit: float = math.inf,
    **mesh: int,
) -> dict[str, Any]:
    """The bytes of the compiled step, total and by part, or why it cannot be compiled.

    A step whose weights, adapter and moments alone exceed ``limit`` is not compiled.
    """
    from jlora.plan.jax_cudnn_shim import jax_checks_capability
    from jlora.plan.memory import arguments, measured
    from jlora.plan.target import devices, parse_target

    compile_target, start = parse_target(target), time.perf_counter()
    found = devices(compile_target)
    assert found is not None, f"JAX's plugin for {target} is not installed"
    used = found if compile_target.hardware else found[:1]
    program = program_of(hf, row, batch, length, used, compile_target, **mesh)
    if (given := sum(arguments(program).values())) > limit:
        return {"refused": f"weights, adapter and moments take {given:,} bytes"}
    try:
        with jax_checks_capability(compile_target.gpu_capability):
            memory = measured(program, program.compile())
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"refused": str(error).strip().splitlines()[0]}
    seconds = round(time.perf_counter() - start, 1)
    return {"peak": memory.peak, **dataclasses.asdict(memory), "compile_seconds": seconds}


def start(name: str) -> str | None:
    """Prepares this process for a target, before jax is imported; returns None for ``cpu``."""
    from jlora.plan.target import parse_target, set_environment

    target = None if name == "cpu" else name
    set_environment(parse_target(target))
    return target


def main() -> None:
    """Compiles the requested rows, and updates the target's results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--ranks", default="16,64")
    parser.add_argument("--optim", default="adamw")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    target = start(args.target)
    import jax

    path = HERE / "results" / f"memory-{args.target}.json"
    document = json.loads(path.read_text()) if path.exists() else {"results": {}}
    for name in args.models.split(","):
        rows = document["results"].setdefault(name, {})
        for r in args.ranks.split(","):
            for optim in args.optim.split(","):
                for quantized in (False, True) if optim == "adamw" else (True,):
                    row = Row(int(r), optim, quantized)
                    got = measure(MODELS[name], row, args.batch, args.length, target)
                    rows[str(row)] = got
                    print(name, row, got, flush=True)
    document |= {
        "date": date.today().isoformat(),
        "target": args.target,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "batch": [args.batch, args.length],
        "paper": PAPER,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
