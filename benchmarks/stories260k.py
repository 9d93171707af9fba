"""LoRA on stories260k, compared with peft's held-out loss for the same recipe.

    python benchmarks/stories260k.py ASSETS [OUTPUT]

ASSETS is a folder with ``models/stories260k`` and ``data``. Two data sets, 300 steps of 16 blocks
of 128 tokens, r 8, alpha 16, all linear layers, AdamW 5e-3 with linear decay, float32. peft's
figures (one seed, untuned) are 1.818 and 3.082 nats a token; jlora must be within 2 % of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

PEFT = {"instruction": 1.818, "tinyshakespeare": 3.082}
"""Held-out loss of peft with this recipe, nats a token."""

CONFIG = """\
model: {{name_or_path: {assets}/models/stories260k, dtype: float32}}
lora: {{r: 8, lora_alpha: 16, target_modules: all-linear}}
data:
  train: [{{path: {work}/{name}-train.txt, format: text}}]
  eval: [{{path: {work}/{name}-heldout.txt, format: text}}]
  max_length: 128
train:
  output_dir: {work}/{name}
  max_steps: 300
  per_device_train_batch_size: 16
  per_device_eval_batch_size: 50
  gradient_accumulation_steps: 1
  learning_rate: 5.0e-3
  lr_scheduler_type: linear
  warmup_ratio: 0.0
  weight_decay: 0.01
  gradient_checkpointing: false
  eval_steps: null
  save_steps: null
  seed: 0
evaluate: {{samples: 0}}
"""


def texts(name: str, data: Path) -> tuple[str, str]:
    """Training and held-out text, the same as for peft."""
    if name == "tinyshakespeare":
        text = (data / "tinyshakespeare.txt").read_text()
        return text[:300_000], text[-40_000:]
    rows = [_row(r) for r in json.loads((data / "instruction.json").read_text())]
    cut = len(rows) * 9 // 10
    return "".join(rows[:cut]), "".join(rows[cut:])


def _row(row: dict[str, str]) -> str:
    given = f"### Input:\n{row['input']}\n" if row.get("input") else ""
    task, answer = row["instruction"], row["output"]
    return f"### Instruction:\n{task}\n{given}### Response:\n{answer}\n\n"


def held_out_loss(name: str, assets: Path, work: Path) -> float:
    """The run's last eval_loss."""
    work.mkdir(parents=True, exist_ok=True)
    for part, text in zip(("train", "heldout"), texts(name, assets / "data"), strict=True):
        (work / f"{name}-{part}.txt").write_text(text)
    config = work / f"{name}.yaml"
    config.write_text(CONFIG.format(assets=assets, work=work, name=name))
    command = [sys.executable, "-m", "jlora.train", str(config), "train.resume=never"]
    subprocess.run(command, check=True)
    lines = map(json.loads, (work / name / "metrics.jsonl").read_text().splitlines())
    return [line["eval_loss"] for line in lines if "eval_loss" in line][-1]


def main() -> None:
    """Runs both data sets and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("assets", type=Path)
    parser.add_argument("output", type=Path, nargs="?", default=Path("outputs/stories260k"))
    args = parser.parse_args()
    for name, peft in PEFT.items():
        loss = held_out_loss(name, args.assets.resolve(), args.output.resolve())
        print(f"{name}: jlora {loss:.3f}, peft {peft:.3f}, ratio {loss / peft:.3f}")


if __name__ == "__main__":
    main()
