"""The run header: what will happen, before anything does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from jlora import runtime, sharding
from jlora.config import TrainConfig, in_lines
from jlora.console import Console, Rows
from jlora.data import Prepared
from jlora.data.classification import listed
from jlora.job import Job
from jlora.models import Model
from jlora.models.attention import Case, choose, cudnn
from jlora.optim import moving, warmup_steps
from jlora.progress import Plan
from jlora.quantization import describe, is_packed, settings_of
from jlora.targets import match_table

SECTIONS = ("model", "quantization", "lora", "data", "train", "mesh", "evaluate")
"""The settings that a run depends on."""


def show_header(
    console: Console, job: Job, plan: Plan, train: Prepared, held_out: Prepared | None
) -> None:
    """Prints model, matches, sizes, devices, data and how every setting was resolved."""
    sections: dict[str, Any] = {"model": _model(job, train.length)}
    if job.targets:
        rows = match_table(job.targets)
        names = list(rows[0])
        sections["adapter"] = Rows(names, [[_text(row[n]) for n in names] for row in rows])
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
    """Bytes of all arrays of a tree, counted once however they are sharded."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def count(tree: Any) -> int:
    """Elements of all leaves; an NF4 leaf counts the parameters that it stands for."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "dequantize"))
    return sum(leaf.size for leaf in leaves)


def layout(tree: Any, mesh: jax.sharding.Mesh) -> Rows:
    """Which axes split each kind of leaf, and what of it lies on one device."""
    names = ("leaves", "of kind", "split over", "in all", "on each device")
    rows = sharding.describe(tree, mesh)
    return Rows(
        names,
        [(r.leaves, r.kind, r.layout, _size(r.total_bytes), _size(r.device_bytes)) for r in rows],
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
    trainable = count(moving(config.train, job.trainable))
    frozen = count(job.frozen) + count(job.trainable) - trainable
    packed = [x for x in jax.tree.leaves(job.frozen, is_leaf=is_packed) if is_packed(x)]
    kind = "full fine-tuning"
    if config.lora:
        kind = "QLoRA" if packed else "LoRA"
    rows: dict[str, Any] = {
        "base": config.model.name_or_path,
        "method": kind,
        "trainable": f"{trainable:,} of {trainable + frozen:,} parameters "
        f"({trainable / (trainable + frozen):.2%})",
        "memory": f"{_size(tree_bytes(job.frozen))} frozen, "
        f"{_size(tree_bytes(job.trainable))} trainable",
        "types": f"weights {config.model.dtype}, computation {config.compute_dtype}",
        "attention": attention(job.model, job.mesh.devices.flat[0].platform, length),
    }
    if names := config.model.id2label:
        rows["classes"] = f"{len(names)}: {listed(names)}"
    if packed:
        came = " (the base came packed)" if job.model.config.prequantized else ""
        kinds = dict.fromkeys(describe(settings_of(leaf)) for leaf in packed)
        rows["quantization"] = "; ".join(kinds) + came
    return rows


def _data(train: Prepared, held_out: Prepared | None) -> Rows:
    rows = []
    for role, prepared in (("train", train), ("eval", held_out)):
        for s in prepared.sources if prepared else ():
            rows.append((role, s.path, s.format, s.rows, s.packed_rows, s.tokens, s.target_tokens))
    names = ("", "source", "format", "rows", "packed", "tokens", "targets")
    return Rows(names, rows)


def _run(job: Job, plan: Plan) -> Mapping[str, Any]:
    settings, mesh = job.config.train, dict(job.mesh.shape)
    warm = warmup_steps(settings, plan.total_steps)
    return {
        "devices": runtime.describe_devices(),
        "mesh": " × ".join(f"{axis} {size}" for axis, size in mesh.items()),
        "batch": f"{plan.rows_per_step} rows a step ({settings.per_device_train_batch_size} a "
        f"device, {plan.accumulation} accumulated)",
        "steps": f"{plan.total_steps} ({plan.steps_per_epoch} an epoch)",
        "optimizer": f"{optimizer(settings)}, {settings.lr_scheduler_type} from "
        f"{settings.learning_rate:g} after {warm} warm-up steps, "
        f"weight decay {settings.weight_decay:g}, clip {settings.max_grad_norm}",
        "checkpointing": "on" if settings.gradient_checkpointing else "off",
        "seed": settings.seed,
    }


def optimizer(settings: TrainConfig) -> str:
    """The optimizer's name, with LoRA+ and LoRA-FA if they are on."""
    ratio = settings.loraplus_lr_ratio
    plus = [f"LoRA+ (B learns {ratio:g} times as fast)"] if ratio else []
    return " with ".join([settings.optim, *plus, *["LoRA-FA"] * settings.lorafa])


def _size(n: int) -> str:
    unit, power = next(
        u for u in (("GiB", 30), ("MiB", 20), ("KiB", 10)) if n >= 2 ** u[1] or u[1] == 10
    )
    return f"{n / 2**power:,.1f} {unit}"


def _text(value: Any) -> Any:
    return " × ".join(map(str, value)) if isinstance(value, tuple) else value
