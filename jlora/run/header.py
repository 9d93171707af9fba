"""The run header: what will happen, before anything does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jlora.config import Config, TrainConfig, in_lines
from jlora.data import Prepared
from jlora.data.classification import listed
from jlora.distributed import sharding
from jlora.distributed.devices import describe_devices
from jlora.lora.targets import match_table
from jlora.lora.weight import is_weight_leaf
from jlora.models import Model
from jlora.ops.attention import Case, choose, cudnn
from jlora.quant.params import describe, is_quantized, settings_of
from jlora.run.job import Job
from jlora.run.progress import Plan
from jlora.training.optim import trainable_leaves, warmup_steps
from jlora.ui.console import Console, Rows

SECTIONS = ("model", "quantization", "lora", "data", "train", "mesh", "evaluate")
"""The settings that a run depends on."""


def show_header(
    console: Console, job: Job, plan: Plan, train: Prepared, held_out: Prepared | None
) -> None:
    """Prints model, matches, sizes, devices, data and how every setting was resolved."""
    sections: dict[str, Any] = {"model": _model(job, train.length)}
    if job.targets:
        sections["adapter"] = table(match_table(job.targets))
    sections["data"] = _data(train, held_out)
    sections["run"] = _run(job, plan)
    lines = in_lines(job.config)
    sections["settings"] = {name: lines[name] for name in SECTIONS}
    if job.mesh.size > 1:
        sections["layout"] = layout((job.frozen, job.trainable), job.mesh)
    console.header(f"jlora · {job.config.train.output_dir}", sections)
    for text in (*train.warnings, *(held_out.warnings if held_out else ())):
        console.warn(text)
    asked, computed = job.config.quantization, job.config.compute_dtype
    if asked and asked.bnb_4bit_compute_dtype != computed:
        console.warn(
            f"packed layers compute in {computed} like all others, "
            f"not in bnb_4bit_compute_dtype={asked.bnb_4bit_compute_dtype}"
        )


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree (or of its shapes), counted once however they are sharded."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def count(tree: Any) -> int:
    """Elements of all leaves; an NF4 leaf counts the parameters that it stands for."""
    leaves = jax.tree.leaves(tree, is_leaf=is_weight_leaf)
    return sum(leaf.size for leaf in leaves)


def layout(tree: Any, mesh: jax.sharding.Mesh) -> Rows:
    """Which axes split each kind of leaf, and what of it lies on one device."""
    names = ("leaves", "of kind", "split over", "in all", "on each device")
    rows = sharding.describe(tree, mesh)
    return Rows(
        names,
        [
            (r.leaves, r.kind, r.layout, size_text(r.total_bytes), size_text(r.device_bytes))
            for r in rows
        ],
    )


def attention(model: Model, platform: str, length: int) -> str:
    """Which attention computes rows of ``length`` tokens on a device's platform, and why."""
    case = Case(
        dtype=model.dtype,
        length=length,
        head_dim=model.config.head_dim,
        segments=True,
        softcap=model.config.attention_softcap is not None,
        sinks=model.config.sinks,
        capability=cudnn.capability(),
    )
    platform = "cuda" if platform == "gpu" else platform
    return ": ".join(choose(platform, case, model.attention))


def _model(job: Job, length: int) -> Mapping[str, Any]:
    config = job.config
    rows: dict[str, Any] = {
        "base": config.model.name_or_path,
        **sizes(config, job.base, job.trainable, job.initial),
        "attention": attention(job.model, job.mesh.devices.flat[0].platform, length),
    }
    if job.adapters:
        rows["adapters"] = f"{', '.join(job.adapters)}: trained together, each on its own rows"
    if names := config.model.id2label:
        rows["classes"] = f"{len(names)}: {listed(names)}"
    if job.model.config.prequantized and "quantization" in rows:
        rows["quantization"] += " (the base came packed)"
    return rows


def sizes(config: Config, frozen: Any, trainable: Any, initial: Any = None) -> dict[str, str]:
    """The method, how much of the model is trained, and what it takes; the trees may be shapes.

    ``initial`` is no part of the model, but takes memory.
    """
    moves = count(trainable_leaves(config.train, trainable))
    every = count(frozen) + count(trainable)
    packed = [x for x in jax.tree.leaves(frozen, is_leaf=is_quantized) if is_quantized(x)]
    kind = "full fine-tuning"
    if config.lora:
        kind = "QLoRA" if packed else "LoRA"
    rows = {
        "method": kind,
        "trainable": f"{moves:,} of {every:,} parameters ({moves / every:.2%})",
        "memory": f"{size_text(tree_bytes((frozen, initial)))} frozen, "
        f"{size_text(tree_bytes(trainable))} trainable",
        "types": f"weights {config.model.dtype}, computation {config.compute_dtype}",
    }
    if packed:
        kinds = dict.fromkeys(describe(settings_of(leaf)) for leaf in packed)
        rows["quantization"] = "; ".join(kinds)
    return rows


def _data(train: Prepared, held_out: Prepared | None) -> Rows:
    rows = []
    for role, prepared in (("train", train), ("eval", held_out)):
        for s in prepared.sources if prepared else ():
            role = f"{role}, {s.adapter}" if s.adapter else role
            rows.append((role, s.path, s.format, s.rows, s.packed_rows, s.tokens, s.target_tokens))
    names = ("", "source", "format", "rows", "packed", "tokens", "targets")
    return Rows(names, rows)


def _run(job: Job, plan: Plan) -> Mapping[str, Any]:
    settings, mesh = job.config.train, dict(job.mesh.shape)
    warm = warmup_steps(settings, plan.total_steps)
    return {
        "devices": describe_devices(),
        "mesh": " × ".join(f"{axis} {size}" for axis, size in mesh.items()),
        "batch": f"{plan.rows_per_step} rows a step ({settings.per_device_train_batch_size} a "
        f"device, {plan.accumulation} accumulated)",
        "steps": f"{plan.total_steps} ({plan.steps_per_epoch} an epoch)",
        "optimizer": f"{optimizer(settings)}, {settings.lr_scheduler_type} from "
        f"{settings.learning_rate:g} after {warm} warm-up steps, "
        f"weight decay {settings.weight_decay:g}, clip {settings.max_grad_norm}",
        "checkpointing": checkpointing(settings),
        "seed": settings.seed,
    }


def optimizer(settings: TrainConfig) -> str:
    """The optimizer's name, with LoRA+ and LoRA-FA if they are on."""
    ratio = settings.loraplus_lr_ratio
    plus = [f"LoRA+ (B learns {ratio:g} times as fast)"] if ratio else []
    return " with ".join([settings.optim, *plus, *["LoRA-FA"] * settings.lorafa])


def checkpointing(settings: TrainConfig) -> str:
    """Whether layers are computed again, and where their inputs are kept."""
    if settings.activation_offloading:
        return "on, layers' inputs in the host's memory"
    return "on" if settings.gradient_checkpointing else "off"


def table(rows: Sequence[Mapping[str, Any]]) -> Rows:
    """Rows with the same names, as a table."""
    names = list(rows[0])
    return Rows(names, [[_text(row[name]) for name in names] for row in rows])


def size_text(n: int) -> str:
    """Bytes for people: ``12.5 MiB``."""
    unit, power = next(
        u for u in (("GiB", 30), ("MiB", 20), ("KiB", 10)) if n >= 2 ** u[1] or u[1] == 10
    )
    return f"{n / 2**power:,.1f} {unit}"


def shape_text(shape: Sequence[int]) -> str:
    """A shape for people: ``4096 × 14336``."""
    return " × ".join(map(str, shape))


def _text(value: Any) -> Any:
    return shape_text(value) if isinstance(value, tuple) else value
