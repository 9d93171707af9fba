"""The loss of quality by quantization, on real weights: perplexity by code, and after fine-tuning.

    python benchmarks/quantization_quality.py ASSETS [OUTPUT] [--steps 300]

ASSETS is a folder with ``models/stories260k`` and ``data``. Perplexity and the divergence from the
float32 model's predictions (KL, nats a token) of two models whose linear layers are quantized in
blocks of 64: int4 (15 even steps from -absmax to absmax), FP4 as QLoRA's paper names it (E2M1: 0,
0.5, 1, 1.5, 2, 3, 4, 6), FP4 as bitsandbytes has it (0, 0.0625, 2, 3, 4, 6, 8, 12), NF4, and NF4
with double quantization, in float32 arithmetic. stories260k reads 64 stories of 256 tokens that it
wrote itself in float32 (sampled at temperature 1), the quickstart model 640 stretches of the
documentation that it was trained on. Then LoRA and QLoRA with the recipe of ``stories260k.py``.
QLoRA's order is NF4, FP4, int4 (arXiv 2305.14314, table 2). A table is printed, JSON is in OUTPUT.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from stories260k import CONFIG, texts

import jlora
from jlora.assets.quickstart import corpus
from jlora.config import QuantConfig
from jlora.data import load_tokenizer
from jlora.models import Model
from jlora.quant.params import quantize_params
from jlora.tree import paths

LENGTH, STORIES, STRETCHES = 256, 64, 640
QUICKSTART = Path(corpus.__file__).parent / "model"


TABLES = {
    "int4": np.arange(-7, 8) / 7,
    "FP4 (E2M1)": np.array([s * v / 6 for s in (-1, 1) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]),
}
"""Codes that only this comparison needs, as fractions of a block's largest magnitude."""


def rounding(table: np.ndarray) -> Callable[[Any], Any]:
    """Rounds every kernel except the head to a table, in blocks of 64 along torch's rows."""
    values = np.unique(table).astype(np.float32)
    thresholds = (values[1:] + values[:-1]) / 2

    def round_trip(kernel: jax.Array) -> jax.Array:
        rows = kernel.mT
        blocks = rows.reshape(*rows.shape[:-2], -1, 64)
        absmax = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
        codes = jnp.searchsorted(thresholds, blocks / jnp.where(absmax > 0, absmax, 1))
        return (jnp.asarray(values)[codes] * absmax).reshape(rows.shape).mT

    def change(path: paths.Path, leaf: jax.Array) -> jax.Array:
        return round_trip(leaf) if path[-1] == "kernel" and path[0] != "lm_head" else leaf

    return lambda params: paths.map_leaves(change, params)


def quantizer(**settings: Any) -> Callable[[Any], Any]:
    return lambda params: quantize_params(params, QuantConfig(**settings))


CODES: dict[str, Callable[[Any], Any]] = {
    "float32": lambda params: params,
    "int4": rounding(TABLES["int4"]),
    "FP4 (E2M1)": rounding(TABLES["FP4 (E2M1)"]),
    "FP4 (bitsandbytes)": quantizer(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False),
    "NF4": quantizer(bnb_4bit_use_double_quant=False),
    "NF4+DQ": quantizer(),
    "int8": quantizer(load_in_8bit=True),
}


def stories(model: Model, params: Any, tokenizer: Any) -> np.ndarray:
    """(64, 257) tokens sampled from the model itself."""
    step = jax.jit(model.decode)
    cache = model.init_cache(STORIES, LENGTH)
    ids, key = [jnp.full((STORIES, 1), tokenizer.bos_token_id)], jax.random.key(0)
    for index in range(LENGTH):
        logits, cache = step(params, ids[-1], None, cache)
        draw = jax.random.categorical(jax.random.fold_in(key, index), logits[:, -1])
        ids.append(draw[:, None])
    return np.concatenate([np.asarray(i) for i in ids], axis=1)


def documentation(model: Model, params: Any, tokenizer: Any) -> np.ndarray:
    """(640, 257) tokens of the quickstart model's training text, evenly spaced."""
    text, _ = corpus.rows()
    ids = np.asarray(tokenizer("\n\n".join(row["text"] for row in text))["input_ids"])
    starts = np.linspace(0, len(ids) - LENGTH - 1, STRETCHES).astype(int)
    return np.stack([ids[start : start + LENGTH + 1] for start in starts])


def perplexities(folder: Path, sample: Callable[..., np.ndarray]) -> dict[str, dict[str, float]]:
    """Code → perplexity and divergence from the float32 model."""
    model, params = jlora.load_pretrained(folder, dtype="float32")
    ids = sample(model, params, load_tokenizer(str(folder)))

    @jax.jit
    def predict(params: Any, rows: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(model(params, rows[:, :-1]))

    def measure(params: Any) -> tuple[float, float]:
        nll = kl = 0.0
        for start in range(0, len(ids), 16):
            rows = jnp.asarray(ids[start : start + 16])
            wanted, got = predict(original, rows), predict(params, rows)
            picked = jnp.take_along_axis(got, rows[:, 1:, None], axis=-1)
            nll -= float(picked.sum())
            kl += float(jnp.sum(jnp.exp(wanted) * (wanted - got)))
        return nll / (len(ids) * LENGTH), kl / (len(ids) * LENGTH)

    original, result = params, {}
    for name, change in CODES.items():
        nll, kl = measure(change(params))
        result[name] = {"perplexity": round(float(np.exp(nll)), 4), "kl": round(kl, 6)}
    return result


def held_out(name: str, assets: Path, work: Path, quantized: bool, steps: int) -> float:
    """The last eval_loss of LoRA or QLoRA on one of the two data sets."""
    work.mkdir(parents=True, exist_ok=True)
    for part, text in zip(("train", "heldout"), texts(name, assets / "data"), strict=True):
        (work / f"{name}-{part}.txt").write_text(text)
    config = work / f"{name}{'-q' * quantized}.yaml"
    text = CONFIG.format(assets=assets, work=work, name=name)
    config.write_text(text + "quantization: {load_in_4bit: true}\n" * quantized)
    out = work / f"{name}{'-qlora' if quantized else '-lora'}"
    command = [sys.executable, "-m", "jlora.train", str(config), "train.resume=never"]
    subprocess.run([*command, f"train.output_dir={out}", f"train.max_steps={steps}"], check=True)
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["eval_loss"] for line in lines if "eval_loss" in line][-1]


def tables(result: dict[str, Any]) -> str:
    models = result["perplexity"]
    lines = ["| code | " + " | ".join(f"{m}: perplexity | KL" for m in models) + " |"]
    lines.append("|---" * (1 + 2 * len(models)) + "|")
    for code in CODES:
        cells = [f"{models[m][code]['perplexity']} | {models[m][code]['kl']}" for m in models]
        lines.append(f"| {code} | {' | '.join(cells)} |")
    lines += ["", "| data | LoRA | QLoRA | ratio |", "|---|---|---|---|"]
    for name, row in result["fine-tuning"].items():
        ratio = row["qlora"] / row["lora"]
        lines.append(f"| {name} | {row['lora']:.3f} | {row['qlora']:.3f} | {ratio:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("assets", type=Path)
    parser.add_argument("output", type=Path, nargs="?", default=Path("outputs/quality"))
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    assets, output = args.assets.resolve(), args.output.resolve()
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": platform.machine(),
        "versions": {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "numpy")},
        "perplexity": {
            "stories260k": perplexities(assets / "models/stories260k", stories),
            "quickstart": perplexities(QUICKSTART, documentation),
        },
        "fine-tuning": {
            name: {
                "lora": held_out(name, assets, output, False, args.steps),
                "qlora": held_out(name, assets, output, True, args.steps),
            }
            for name in (("instruction", "tinyshakespeare") if args.steps else ())
        },
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "quality.json").write_text(json.dumps(result, indent=2) + "\n")
    print(tables(result))


if __name__ == "__main__":
    main()
