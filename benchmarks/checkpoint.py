"""The cost of a checkpoint, compared with ``torch.save`` of the same values.

    python benchmarks/checkpoint.py [--ranks 4,16,64] [--what wait,save,restore]

The adapter and the optimizer's moments of the 63-million-parameter Llama are saved and restored in
float32, with LoRA on every linear layer. jlora writes orbax's checkpoint and a manifest with a
digest of every leaf and file, which restoring verifies. "wait" is the time for which training
stands still (the state is copied, a thread writes it), "save" the time until all is on the disk.
The checkpoint before is deleted after that, which is not counted: it is off the step's path.
``torch.save`` writes one file without digests; "synced" adds the fsync. The results also hold the
bytes on disk. Needs the extra ``parity``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import llama
import paired

RUN = {"identity": {}, "base_fingerprint": "none"}


def _bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def jlora_unit(what: str, rank: int) -> Any:
    """A run's ``Checkpoints.save``, ``checkpoint.save``, or ``checkpoint.restore``."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import jlora
    from jlora.config import TrainConfig
    from jlora.io import checkpoint
    from jlora.models import Model, init_params
    from jlora.run.checkpoints import Checkpoints
    from jlora.run.progress import Progress
    from jlora.training.state import init_state

    model = Model.from_config(llama.shape(), "bfloat16")
    config = jlora.LoraConfig(r=rank, target_modules="all-linear")

    def initial() -> Any:
        base = init_params(jax.random.key(0), model)
        adapter = jlora.init_adapter(jax.random.key(1), base, config)
        return init_state(adapter, optax.adamw(1e-4))

    state = jax.eval_shape(initial)
    draw = np.random.default_rng(0).standard_normal  # zeros would be compressed
    state = jax.tree.map(lambda x: jnp.asarray(draw(x.shape)).astype(x.dtype), state)
    tree = {"state": state}
    folder = Path(tempfile.mkdtemp())
    settings = TrainConfig(output_dir=str(folder), save_total_limit=1)
    checkpoints = Checkpoints(folder, settings, **RUN)
    step = 0

    def wait() -> dict[str, float]:
        nonlocal step
        step, start = step + 1, time.perf_counter()
        checkpoints.save(state, Progress(step=step))
        seconds = time.perf_counter() - start
        checkpoints.wait()
        return {"seconds": seconds}

    def save() -> dict[str, float]:
        nonlocal step
        step, start = step + 1, time.perf_counter()
        checkpoint.save(folder, step, tree, {}, **RUN)
        seconds = time.perf_counter() - start
        shutil.rmtree(folder / str(step - 1), ignore_errors=True)
        return {"seconds": seconds, "bytes": _bytes(folder / str(step))}

    def restore() -> dict[str, float]:
        jax.block_until_ready(checkpoint.restore(folder, step, tree, **RUN)[0])
        return {}

    if what == "restore":
        save()
    return _with_cleanup({"wait": wait, "save": save, "restore": restore}[what], folder)


def torch_unit(what: str, rank: int, synced: bool) -> Any:
    """``torch.save`` and ``torch.load`` of tensors of the same sizes in three dicts."""
    torch = llama.torch_threads()
    hf = llama.shape()
    width, inner = hf["hidden_size"], hf["intermediate_size"]
    shared = width * hf["num_key_value_heads"] // hf["num_attention_heads"]
    attention = [(width, width), (width, shared), (width, shared), (width, width)]
    layer = [*attention, (width, inner), (width, inner), (inner, width)]
    tree = {
        kind: {
            f"{index}.{number}.{ab}": torch.randn(size, rank)
            for index in range(hf["num_hidden_layers"])
            for number, sizes in enumerate(layer)
            for ab, size in zip("AB", sizes, strict=True)
        }
        for kind in ("adapter", "mu", "nu")
    }
    folder = Path(tempfile.mkdtemp())
    path = folder / "checkpoint.pt"

    def save() -> dict[str, float]:
        with path.open("wb") as file:
            torch.save(tree, file)
            if synced:
                file.flush()
                os.fsync(file.fileno())
        return {"bytes": _bytes(path)}

    def restore() -> dict[str, float]:
        torch.load(path)
        return {}

    if what == "restore":
        save()
    return _with_cleanup(restore if what == "restore" else save, folder)


def _with_cleanup(unit: Any, folder: Path) -> Any:
    """The unit; its folder is deleted when the process ends."""
    import atexit

    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return unit


def main() -> None:
    """Measures waiting, saving and restoring for each rank."""
    parser = paired.arguments(__doc__)
    parser.add_argument("--ranks", default="4,16,64")
    parser.add_argument("--what", default="wait,save,restore")
    args = parser.parse_args()
    for what in args.what.split(","):
        points = {}
        for rank in map(int, args.ranks.split(",")):
            arguments = {"what": what, "rank": rank}
            variants = {"torch": False}
            if what != "restore":
                variants["torch, synced"] = True
            points[rank] = [
                paired.Contestant("jlora", "checkpoint:jlora_unit", arguments),
                *(
                    paired.Contestant(
                        name, "checkpoint:torch_unit", {**arguments, "synced": synced}
                    )
                    for name, synced in variants.items()
                ),
            ]
        peers = list(variants)
        paired.compare(f"checkpoint-{what}", "rank", points, args, peers=peers, memory=False)


if __name__ == "__main__":
    main()
