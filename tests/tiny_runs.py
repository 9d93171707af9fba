"""A tiny base model with data and settings, and training runs started as a user would."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import yaml
from tiny_tokenizer import tiny_tokenizer

from jlora import cli, config, train
from jlora.distributed import sharding
from jlora.io.hf import save_pretrained
from jlora.models import Model, init_params
from jlora.ui import metrics_log

LLAMA = {
    "model_type": "llama",
    "vocab_size": 336,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 5,
    "initializer_range": 0.1,
}
PACKAGE = Path(train.__file__).parent
ADAPTER = "adapter_model.safetensors"
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
THINGS = ("sun", "moon", "tree", "bird", "boat")


TARGETS = ["q_proj", "down_proj"]
"""One module of attention and one of the MLP: all seven take twice as long to compile."""
DENSE = ["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
QUANTIZED = {"load_in_4bit": True, "block_size": 32, "llm_int8_skip_modules": DENSE}
"""Only ``TARGETS`` are quantized: every quantized matrix is dequantized in each pass of a step, and
a step with all seven takes twice as long to compile. test_devices has steps with all."""


RANDOM_AND_TIMED = {
    "lora": {"lora_dropout": 0.1},
    "train": {"lr_scheduler_type": "linear"},
}
"""Settings by which a step depends on its number: what a run that resumes must reproduce, and what
several processes must share. Otherwise a step's program does not depend on the run's length: tests
whose runs differ only in length, logging and saving compile one."""


class Run(NamedTuple):
    """How a run ended."""

    code: int
    out: str
    err: str


OFF = "train.compilation_cache=false"
"""Otherwise the cache would stay enabled for all other tests of the process."""


class Place:
    """A folder with a model, data and an output folder, and ``settings`` with defaults."""

    def __init__(self, folder: Path, base: Path, cache: Path):
        self.folder, self.base, self.cache = folder, base, cache
        self.output = folder / "out"
        self.rows, self.held_out = base / "train.jsonl", base / "eval.jsonl"
        self.defaults: dict[str, dict[str, Any]] = {}
        self.program = ("-m", "jlora.train")

    def settings(self, **sections: Any) -> dict[str, Any]:
        """The settings, each section updated by ``sections``; None removes a section or value."""
        settings: dict[str, Any] = {
            "model": {"name_or_path": str(self.base), "dtype": "float32"},
            "lora": {"r": 4, "lora_alpha": 8, "target_modules": TARGETS},
            "data": {
                "train": [{"path": str(self.rows), "format": "messages"}],
                "eval": [{"path": str(self.held_out), "format": "messages"}],
                "max_length": 64,
            },
            "train": {
                "output_dir": str(self.output),
                "max_steps": 8,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "learning_rate": 1e-2,
                "lr_scheduler_type": "constant",
                "logging_steps": 2,
                "eval_steps": 4,
                "save_steps": 3,
            },
            "evaluate": {"max_new_tokens": 4, "samples": 1},
        }
        for changes in (self.defaults, sections):
            for name, values in changes.items():
                if values is None:
                    settings.pop(name)
                else:
                    settings[name] = settings.get(name, {}) | values
        return settings

    def settings_for_loss(self) -> None:
        """Turns off evaluation and replies in later settings: only training losses are logged."""
        self.defaults = {"data": {"eval": []}, "evaluate": {"samples": 0}}

    def write(self, **sections: Any) -> Path:
        """Writes ``settings`` to a file."""
        file = self.folder / "config.yaml"
        file.write_text(yaml.safe_dump(self.settings(**sections)))
        return file

    def start(self, *arguments: Any, **env: str) -> subprocess.Popen:
        """Starts ``program``, the command, on one CPU device."""
        command = [sys.executable, *self.program, *map(str, arguments)]
        variables = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",
            "XDG_CACHE_HOME": str(self.cache),
            "PYTHONPATH": os.pathsep.join(map(str, (self._site(), PACKAGE.parent))),
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=os.environ | variables | env, cwd=self.folder, **pipes)

    def _site(self) -> Path:
        """A folder whose sitecustomize hides torch; importing it takes half of a start."""
        file = self.cache / "site" / "sitecustomize.py"
        if not file.exists():
            file.parent.mkdir()
            file.write_text("import sys\nsys.modules['torch'] = None\n")
        return file.parent

    def command(self, *arguments: Any, **env: str) -> Run:
        """Starts the command and waits for its end."""
        process = self.start(*arguments, **env)
        out, err = process.communicate(timeout=300)
        return Run(process.returncode, out, err)

    def run(self, *overrides: str, devices: int = 1, **sections: Any) -> None:
        """Runs training in this process, on its first devices; errors are raised."""
        settings = config.load(self.write(**sections), [OFF, *overrides])
        mesh = functools.partial(sharding.make_mesh, devices=jax.devices()[:devices])
        with mock.patch.object(sharding, "make_mesh", mesh), standard_promotion():
            train.run(settings, Namespace(show_batch=False))

    def main(self, *arguments: str, **sections: Any) -> int:
        """Runs the command in this process if it ends before a step; returns its exit code."""
        return cli.main("train", [str(self.write(**sections)), OFF, *arguments])

    def log(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, without the speed."""
        lines = metrics_log.read_metrics(self.output / "metrics.jsonl")
        return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]

    def losses(self) -> list[float]:
        """The training losses."""
        return [line["loss"] for line in self.log() if "loss" in line]

    def checkpoints(self) -> list[int]:
        """The steps of the complete checkpoints."""
        found = (self.output / "checkpoints").glob("*/manifest.json")
        return sorted(int(file.parent.name) for file in found)

    def adapter(self) -> bytes:
        """The bytes of the adapter's file."""
        return (self.output / ADAPTER).read_bytes()


@contextmanager
def standard_promotion():
    """Sets the dtype promotion that optax needs, also in the thread that compiles a run's step."""
    before = jax.config.jax_numpy_dtype_promotion
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    try:
        yield
    finally:
        jax.config.update("jax_numpy_dtype_promotion", before)


NEW_TOKENS = ["<|tool|>", "<|end of tool|>"]


def make_base_with_new_tokens(folder: Path, tied: bool) -> Path:
    """A base without spare rows in its embedding, and rows with ``NEW_TOKENS``, which it lacks."""
    make_base(folder, vocab_size=len(tiny_tokenizer()), tie_word_embeddings=tied)
    rows = [chat(f"use {i}", f"<|tool|>{i}<|end of tool|>") for i in range(12)]
    write_rows(folder / "train.jsonl", rows)
    return folder


def make_base(folder: Path, **config: Any) -> Path:
    """A model folder with random weights, a tokenizer, and rows for training and evaluation."""
    model = Model.from_config(LLAMA | config, "float32")
    save_pretrained(folder, model, init_params(jax.random.key(0), model))
    tiny_tokenizer().save_pretrained(folder)
    rows = [chat(f"say {a} and {b}", f"{a}, {b}") for a in NUMBERS for b in THINGS]
    write_rows(folder / "train.jsonl", rows[:-9])
    write_rows(folder / "eval.jsonl", rows[-9:])
    return folder


def chat(prompt: str, reply: str) -> dict[str, Any]:
    """A row of the format ``messages``."""
    turns = [("user", prompt), ("assistant", reply)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes rows to a JSON-lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
