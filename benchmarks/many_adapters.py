"""What it costs that every row of a batch uses its own adapter, beside one adapter for all rows.

    python benchmarks/many_adapters.py [--adapters 4] [--r 16] [--batch 8] [--length 128]

The forward pass and the gradient of all adapters, of a small Llama with LoRA on all linear layers;
also with ``--quantized``. The two are run in turn, so that a busy machine is busy for both: medians
of the repeats and their ratio. Results go to ``benchmarks/results/many-adapters-PLATFORM.json``.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import jax
import jax.numpy as jnp
from memory import HERE, llama

import jlora
from jlora.models import Model, init_params


def seconds(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """The times of each function, in turn; the first call, which compiles, is left out."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if round_:
                times[name].append(time.perf_counter() - start)
    return times


def programs(asked: argparse.Namespace) -> dict[str, dict[str, Callable[[], Any]]]:
    """Forward pass and gradient with one adapter for all rows, and with one for each row."""
    hf = llama(asked.hidden, 3 * asked.hidden, asked.layers, asked.hidden // 64)
    model = Model.from_config(hf | {"vocab_size": 4096}, asked.dtype, gradient_checkpointing=True)
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), model)
    if asked.quantized:
        params = jlora.quantize(params, jlora.QuantConfig())
    config = jlora.LoraConfig(r=asked.r, target_modules="all-linear", init_lora_weights=False)
    keys = jax.random.split(jax.random.key(1), asked.adapters)
    adapters = [jlora.init_adapter(key, params, config) for key in keys]
    one, stack = adapters[0], jlora.stack_adapters(adapters)
    ids = jax.random.randint(jax.random.key(2), (asked.batch, asked.length), 0, 4096)
    rows = jnp.arange(asked.batch) % (asked.adapters + 1) - 1  # some with none

    def alone(adapter: Any, params: Any) -> Any:
        return model(jlora.attach(params, adapter), ids)

    def mixed(stack: Any, params: Any) -> Any:
        return model(jlora.attach(params, stack, adapter_ids=rows), ids)

    def gradient(f: Any) -> Any:
        return jax.jit(jax.grad(lambda a, p: jnp.sum(jnp.sin(f(a, p)))))

    def pair(wrap: Callable) -> dict[str, Callable[[], Any]]:
        first, second = wrap(alone), wrap(mixed)
        return {"one": lambda: first(one, params), "each its own": lambda: second(stack, params)}

    return {"forward": pair(jax.jit), "gradient": pair(gradient)}


def main() -> None:
    """Measures, prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("adapters", 4), ("r", 16), ("batch", 8), ("length", 128), ("hidden", 512), ("layers", 4),
        ("repeats", 15),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantized", action="store_true")
    asked = parser.parse_args()
    results = {}
    for name, pair in programs(asked).items():
        medians = {k: statistics.median(v) for k, v in seconds(pair, asked.repeats).items()}
        ratio = medians["each its own"] / medians["one"]
        results[name] = {"seconds": medians, "ratio": round(ratio, 3)}
        print(name, {k: f"{1e3 * v:.1f} ms" for k, v in medians.items()}, f"{ratio:.3f}")
    platform = jax.default_backend()
    path = HERE / "results" / f"many-adapters-{platform}.json"
    whole = json.loads(path.read_text()) if path.exists() else {"results": {}}
    key = f"{'NF4, ' if asked.quantized else ''}{asked.dtype}, {asked.adapters} adapters"
    whole["results"][key] = {"options": vars(asked), **results}
    where = {
        "date": str(date.today()),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
    }
    path.write_text(json.dumps({**where, **whole}, indent=1) + "\n")


if __name__ == "__main__":
    main()
