"""Compiles a run's training step for absent devices in its own process, and prints a description.

    python aot.py CONFIG.json TARGET DOCUMENTS

``CONFIG.json`` holds a model's ``config.json`` and the run's settings. JAX's plugin for the
target is needed, the device is not. Prints the object of ``plan --json`` with more keys:
``large``, the types of all arrays of the compiled step with at least as many elements as the base's
smallest stacked matrix; ``copied``, the types and layouts of all arrays that are copied;
``conditionals``, the number of conditionals; ``fused_adds``, of products by cuBLAS that add to an
array; ``unordered``, of scatters that may write to one place twice, in any order; and ``timed``, of
kernels that are chosen by timing where there is a device. DOCUMENTS is the most documents in a row.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
}


def compiled_for(
    target: str, model: dict, length: int, documents: int = 1, flags: str = "", **sections: dict
) -> dict:
    """The description of a run's compiled step on a target; ``flags`` are XLA's."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model))
        settings = {
            "model": {"name_or_path": folder},
            "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
            "data": {"train": [{"path": "unused", "format": "text"}], "max_length": length},
            "train": {
                "output_dir": "unused",
                "max_steps": 1,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 1,
            },
        }
        for name, values in sections.items():
            settings[name] = None if values is None else settings.get(name, {}) | values
        file = Path(folder) / "run.json"
        file.write_text(json.dumps(settings))
        run = subprocess.run(
            [sys.executable, __file__, str(file), target, str(documents)],
            capture_output=True,
            text=True,
            env=os.environ | {"XLA_FLAGS": flags},
        )
    assert not run.returncode, run.stderr[-3000:]
    return json.loads(run.stdout)


def main(file: str, name: str, documents: str) -> None:
    from jlora import config
    from jlora.plan.target import devices, parse_target, set_environment

    compile_target = parse_target(name)
    set_environment(compile_target)
    import jax

    from jlora.plan import forecast, hlo, hlo_text, report

    hlo_texts: list[str] = []
    work_of = hlo.work_of
    hlo.work_of = lambda text: hlo_texts.append(text) or work_of(text)
    settings = config.load(file, [])
    rows = forecast.Rows(settings.data.max_length, documents=int(documents))
    result = forecast.forecast(settings, None, rows, compile_target, devices(compile_target))
    kernels = [x for x in jax.tree.leaves(result.job.model.shapes) if len(x.shape) == 3]
    stacked = min(math.prod(x.shape) for x in kernels)
    types = {
        f"{dtype}[{dims}]"
        for one in hlo.Module(hlo_texts[0]).instructions()
        for dtype, dims in hlo_text.SHAPE.findall(one.type)
        if dims and math.prod(map(int, dims.split(","))) >= stacked
    }  # fmt: skip
    copies = (one for one in hlo.Module(hlo_texts[0]).instructions() if one.opcode == "copy")
    copied = sorted({one.type.partition(":")[0] for one in copies})
    scatters = [line for line in hlo_texts[0].splitlines() if " scatter(" in line]
    opcodes = [one.opcode for one in hlo.Module(hlo_texts[0]).instructions()]
    more = {
        "large": sorted(types),
        "copied": copied,
        "conditionals": opcodes.count("conditional"),
        "fused_adds": hlo_texts[0].count('"beta":1'),
        "unordered": sum("unique_indices=true" not in line for line in scatters),
        "timed": hlo_texts[0].count("native_emitter_backend_config"),
    }
    print(json.dumps(report.as_json(result, []) | more))


if __name__ == "__main__":
    main(*sys.argv[1:])
