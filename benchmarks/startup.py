"""Start-up: imports, ``--help``, a mistake in the settings, and the time to the first step.

    python benchmarks/startup.py commands
    python benchmarks/startup.py first-step [--layers 4,16]

Every unit is a new process. "First step" is ``python -m jlora.train`` on the 63-million-parameter
Llama (or one of another depth) in bfloat16 with LoRA r 16, until the line of the first step is in
``metrics.jsonl``: once with an empty compilation cache, once with the cache of an earlier run. Its
peer is a script with transformers and peft that reads the same folder and rows, and does one step
without a trainer. Needs the extra ``parity``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import llama
import paired

ROOT = Path(__file__).parent.parent
PACKAGED = ROOT / "jlora/assets/quickstart"
BATCH, LENGTH = 8, 256
COMMANDS = {
    "import": {"jlora": "import jlora", "peft": "import peft"},
    "import what training uses": {
        "jlora": "import jlora.train",
        "peft": "from transformers import AutoModelForCausalLM; from peft import get_peft_model",
    },
    "--help": {"jlora": "-m jlora --help"},
    "train --help": {"jlora": "-m jlora.train --help"},
    "a mistake in the settings": {"jlora": "-m jlora.train nowhere.yaml"},
}


def command_unit(text: str) -> Any:
    """Runs a Python program, or a module's name and arguments, in a new process."""
    arguments = text.split() if text.startswith("-m ") else ["-c", text]

    def unit() -> dict[str, float]:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
        return {"exit_code": done.returncode}

    return unit


def write(folder: str, layers: int) -> Any:
    """Writes a model with the quickstart's tokenizer; the returned unit does nothing."""
    import shutil

    from jlora.io.hf import save_pretrained

    save_pretrained(folder, *llama.jlora_model(llama.shape(layers=layers)))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(PACKAGED / "model" / name, folder)
    return dict


def jlora_unit(folder: str, cached: bool) -> Any:
    """Times ``jlora train`` until its first step is logged."""
    import yaml

    rows = {"path": str(PACKAGED / "data/train.jsonl"), "format": "messages"}
    settings = {
        "model": {"name_or_path": folder, "dtype": "bfloat16"},
        "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "lora_dropout": 0.0},
        "data": {"train": [rows], "max_length": LENGTH},
        "train": {
            "max_steps": 1,
            "logging_steps": 1,
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
        },
    }
    shared_cache = tempfile.mkdtemp()

    def unit() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as place:
            settings["train"]["output_dir"] = f"{place}/out"
            (file := Path(place) / "config.yaml").write_text(yaml.safe_dump(settings))
            cache = {"XDG_CACHE_HOME": shared_cache if cached else f"{place}/cache"}
            command = [sys.executable, "-m", "jlora.train", str(file)]
            return _until(command, Path(place) / "out/metrics.jsonl", cache)

    return unit


def peft_unit(folder: str) -> Any:
    """Times the script below until its step is done."""

    def unit() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as place:
            program = "import startup, sys; startup.peft_script(*sys.argv[1:])"
            done = f"{place}/done"
            return _until([sys.executable, "-c", program, folder, done], Path(done), {})

    return unit


def peft_script(folder: str, done: str) -> None:
    """Tokenizes, packs, loads, and does one step."""
    torch = llama.torch_threads()
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = []
    for line in (PACKAGED / "data/train.jsonl").read_text().splitlines():
        chat = json.loads(line)["messages"]
        ids += tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    config = peft.LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config).to(llama.torch_device()).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    rows = torch.tensor(ids[: BATCH * LENGTH], device=llama.torch_device()).view(BATCH, LENGTH)
    with torch.autocast(llama.torch_device(), torch.bfloat16):
        loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    optimizer.step()
    Path(done).write_text(f'{{"loss": {loss.item()}}}\n')


def _until(command: list[str], file: Path, environment: dict[str, str]) -> dict[str, float]:
    """Seconds until a process has written a line to a file, and the loss in that line."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL
    )
    while not (file.exists() and file.read_text().endswith("\n")):
        if process.poll() is not None:
            raise RuntimeError(f"exit code {process.returncode} before the first step")
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    process.wait()
    return {"seconds": seconds, "loss": json.loads(file.read_text().splitlines()[0])["loss"]}


def main() -> None:
    """Measures the commands or the first step."""
    parser = paired.arguments(__doc__, repeats=3)
    parser.add_argument("what", choices=["commands", "first-step"])
    parser.add_argument("--layers", default="4,16")
    args = parser.parse_args()
    if args.what == "commands":
        points = {
            what: [
                paired.Contestant(who, "startup:command_unit", {"text": text})
                for who, text in programs.items()
            ]
            for what, programs in COMMANDS.items()
        }
        paired.compare("startup-commands", "what", points, args)
        return
    with tempfile.TemporaryDirectory() as place:
        points = {}
        for layers in map(int, args.layers.split(",")):
            arguments = {"folder": f"{place}/{layers}"}
            writing = paired.Contestant("writing", "startup:write", {**arguments, "layers": layers})
            paired.Worker(writing).end()
            variants = {"jlora": True, "jlora, empty cache": False}
            points[layers] = [
                *(
                    paired.Contestant(name, "startup:jlora_unit", {**arguments, "cached": cached})
                    for name, cached in variants.items()
                ),
                paired.Contestant("peft", "startup:peft_unit", arguments),
            ]
        paired.compare("startup-first-step", "layers", points, args, peers=["peft"])


if __name__ == "__main__":
    main()
