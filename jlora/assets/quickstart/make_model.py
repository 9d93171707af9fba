"""Makes the quickstart's base model from nothing but Python's own standard library.

    python -m jlora.assets.quickstart.make_model outputs/quickstart-base

  1. corpus/     text and chat rows from the library's documentation      (``corpus.py``)
  2. init/       tokenizer, config.json and random weights                (``tokenizer.py``)
  3. run/        full fine-tuning by jlora's own training loop            (``base.yaml``)
  4. model/      the result in bfloat16, with its tokenizer

Copy ``model/`` over the packaged one to replace it. Run the same command again after an
interruption: training goes on from its last checkpoint. Weights and tokenizer depend on the
interpreter, whose documentation they were made from; the packaged ones come from the version that
their ``README.md`` names.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from jlora.assets.quickstart import corpus, tokenizer

HERE = Path(__file__).parent

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": None,
    "eos_token_id": tokenizer.SPECIAL.index(tokenizer.END),
    "pad_token_id": tokenizer.SPECIAL.index(tokenizer.PAD),
}

CARD = """\
# jlora quickstart model

{parameters:,} parameters, Llama architecture, bfloat16. Trained from random weights by jlora's full
fine-tuning on the documentation in the standard library of Python {version} (docstrings, comments,
language reference; Python Software Foundation License) and on questions made from it. It knows the
chat template and how to copy; it is a test piece, not an assistant.

Made by `python -m jlora.assets.quickstart.make_model`.
"""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make_corpus(folder: Path) -> None:
    """Writes text.jsonl and chat.jsonl."""
    for name, rows in zip(("text", "chat"), corpus.rows(), strict=True):
        corpus.write_jsonl(folder / f"{name}.jsonl", rows)


def strings(folder: Path) -> Iterator[str]:
    """All text of the corpus, in order."""
    for name in ("text", "chat"):
        for line in (folder / f"{name}.jsonl").open(encoding="utf-8"):
            row = json.loads(line)
            yield from [row["text"]] if "text" in row else [m["content"] for m in row["messages"]]


def make_init(folder: Path, corpus_folder: Path) -> None:
    """Writes a model folder with a tokenizer for the corpus and random weights."""
    import jax

    from jlora import models
    from jlora.io import hf

    tokens = tokenizer.train_tokenizer(strings(corpus_folder), CONFIG["vocab_size"])
    tokenizer.save_tokenizer(folder, tokens, CONFIG["max_position_embeddings"])
    model = models.Model.from_config(CONFIG, dtype="float32")
    hf.save_pretrained(folder, model, models.init_params(jax.random.key(0), model))


def train_base(work: Path, overrides: list[str]) -> None:
    """Full fine-tuning in a process of its own, with relative paths seen from ``work``."""
    command = [sys.executable, "-m", "jlora.train", str(HERE / "base.yaml"), *overrides]
    subprocess.run(command, cwd=work, check=True, env={**os.environ, "PYTHONPATH": _package_root()})


def make_model(folder: Path, trained: Path, init: Path) -> None:
    """Writes the trained weights in bfloat16, the tokenizer and a card."""
    import jax

    from jlora.io import hf

    model, params = hf.load_pretrained(str(trained), dtype="bfloat16")
    hf.save_pretrained(folder, model, params)
    for name in TOKENIZER_FILES:
        shutil.copyfile(init / name, folder / name)
    count = sum(int(leaf.size) for leaf in jax.tree.leaves(params))
    card = CARD.format(parameters=count, version=platform.python_version())
    (folder / "README.md").write_text(card, encoding="utf-8")


def _package_root() -> str:
    """Where ``jlora`` is imported from, which another working directory must not change."""
    return os.pathsep.join(filter(None, (str(HERE.parents[2]), os.environ.get("PYTHONPATH"))))


def main() -> None:
    """Goes through the four steps of the module's header."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", type=Path, help="folder for everything, such as outputs/base")
    parser.add_argument("overrides", nargs="*", help="settings over base.yaml, section.key=value")
    args = parser.parse_args()
    work = args.work.resolve()
    make_corpus(work / "corpus")
    make_init(work / "init", work / "corpus")
    train_base(work, args.overrides)
    make_model(work / "model", work / "run", work / "init")
    print(f"the model is in {args.work / 'model'}")


if __name__ == "__main__":
    main()
