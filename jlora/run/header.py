"""The run header: what a run will do, shown before it does anything."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jlora.config import Config, TrainConfig, in_lines
from jlora.data import Prepared
from jlora.data.labelled_texts import first_ten
from jlora.distributed import sharding
from jlora.distributed.devices import describe_devices, unused_gpus
from jlora.distributed.mesh import platform_of
from jlora.io.peft import misreadings
from jlora.lora.targets import match_table
from jlora.lora.weight import is_weight_leaf
from jlora.models import Model
from jlora.ops.attention import Case, choose, cudnn
from jlora.quant.params import is_quantized, quant_config_of, scheme_text
from jlora.run.data_summary import data_warnings, sources_table
from jlora.run.job import Job
from jlora.run.new_tokens import new_tokens_text, untrained_rows
from jlora.run.step_counts import StepCounts
from jlora.training.optim import trainable_leaves, warmup_steps
from jlora.ui.console import Console, HeaderTable

SECTIONS = ("model", "quantization", "lora", "data", "train", "mesh", "evaluate")
"""The sections of the settings that a training run reads."""


def show_header(
    console: Console, job: Job, counts: StepCounts, train: Prepared, held_out: Prepared | None
) -> None:
    """Shows the model, the adapted modules, data, devices and every setting as it was resolved."""
    sections: dict[str, Any] = {"model": _model(job, train)}
    if job.targets:
        sections["adapter"] = table(match_table(job.targets))
    rows = {"train": [train], "eval": [held_out] if held_out else []}
    sections["data"] = sources_table(rows)
    sections["run"] = _run(job, counts)
    lines = in_lines(job.config)
    sections["settings"] = {name: lines[name] for name in SECTIONS}
    if job.mesh.size > 1:
        sections["layout"] = layout((job.frozen, job.trainable), job.mesh)
    console.header(f"jlora · {job.config.train.output_dir}", sections)
    if text := unused_gpus():
        console.warn(text)
    positions = job.model.config.max_position_embeddings
    for text in data_warnings([*rows["train"], *rows["eval"]], positions):
        console.warn(text)
    if job.config.lora:
        adapter = dataclasses.replace(job.trainable, initial=job.initial)
        if job.adapters:  # all alike
            adapter = jax.eval_shape(functools.partial(jax.tree.map, lambda x: x[0]), adapter)
        for text in misreadings(adapter):
            console.warn(text)
        for text in untrained_rows(job.config, adapter.config, job.tokenizer, job.model):
            console.warn(text)
    asked, compute_dtype = job.config.quantization, job.config.compute_dtype
    if asked and asked.bnb_4bit_compute_dtype != compute_dtype:
        console.warn(
            f"quantized layers compute in {compute_dtype} like all others, "
            f"not in bnb_4bit_compute_dtype={asked.bnb_4bit_compute_dtype}"
        )


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree (or of its shapes); replicas on other devices do not count."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def count_parameters(tree: Any) -> int:
    """Elements of all leaves; for a quantized leaf those of the matrix, not of its codes."""
    leaves = jax.tree.leaves(tree, is_leaf=is_weight_leaf)
    return sum(leaf.size for leaf in leaves)


def layout(tree: Any, mesh: jax.sharding.Mesh) -> HeaderTable:
    """How each kind of leaf is sharded: the mesh axes that split it, and its bytes on a device."""
    names = ("leaves", "kind", "split over", "total size", "per device")
    rows = sharding.describe(tree, mesh)
    return HeaderTable(
        names,
        [
            (r.leaves, r.kind, r.layout, size_text(r.total_bytes), size_text(r.device_bytes))
            for r in rows
        ],
    )


def attention_text(model: Model, platform: str, length: int, documents: int) -> str:
    """The attention implementation for rows of ``length`` tokens and so many documents, and why."""
    case = Case(
        dtype=model.dtype,
        length=length,
        head_dim=model.config.head_dim,
        documents=documents,
        softcap=model.config.attention_softcap is not None,
        sinks=model.config.sinks,
        capability=model.gpu_capability or cudnn.capability(),
        gpu_is_absent=model.gpu_capability is not None,
    )
    # Devices say "gpu", programs are lowered for "cuda".
    platform = "cuda" if platform == "gpu" else platform
    return ": ".join(choose(platform, case, model.attention))


def _model(job: Job, train: Prepared) -> Mapping[str, Any]:
    config, platform = job.config, platform_of(job.mesh)
    rows: dict[str, Any] = {
        "base": config.model.name_or_path,
        **sizes(config, job.base, job.trainable, job.initial),
        "attention": attention_text(job.model, platform, train.length, train.packed.documents),
    }
    if job.adapters:
        rows["adapters"] = f"{', '.join(job.adapters)} (trained together, each on its own rows)"
    if config.model.new_tokens:
        rows["new tokens"] = new_tokens_text(config, job.tokenizer, job.model)
    if names := config.model.id2label:
        rows["classes"] = f"{len(names)}: {first_ten(names)}"
    if job.model.config.prequantized and "quantization" in rows:
        rows["quantization"] += " (the base model is already quantized)"
    return rows


def sizes(config: Config, frozen: Any, trainable: Any, initial: Any = None) -> dict[str, str]:
    """The method, the share of parameters that is trained, memory and dtypes, as rows of text.

    The trees may be shapes. ``initial`` adds to the memory but not to the parameters.
    """
    trained = count_parameters(trainable_leaves(config.train, trainable))
    total = count_parameters(frozen) + count_parameters(trainable)
    leaves = jax.tree.leaves(frozen, is_leaf=is_quantized)
    quantized = [leaf for leaf in leaves if is_quantized(leaf)]
    method = "full fine-tuning"
    if config.lora:
        method = "QLoRA" if quantized else "LoRA"
    rows = {
        "method": method,
        "trainable": f"{trained:,} of {total:,} parameters ({trained / total:.2%})",
        "memory": f"{size_text(tree_bytes((frozen, initial)))} frozen, "
        f"{size_text(tree_bytes(trainable))} trainable",
        "dtypes": f"weights {config.model.dtype}, compute {config.compute_dtype}",
    }
    if quantized:
        formats = dict.fromkeys(scheme_text(quant_config_of(leaf)) for leaf in quantized)
        rows["quantization"] = "; ".join(formats)
    return rows


def _run(job: Job, counts: StepCounts) -> Mapping[str, Any]:
    settings, mesh = job.config.train, dict(job.mesh.shape)
    warm = warmup_steps(settings, counts.total_steps)
    return {
        "devices": describe_devices(),
        "mesh": " × ".join(f"{axis} {size}" for axis, size in mesh.items()),
        "batch": f"{counts.rows_per_step} rows per step "
        f"({settings.per_device_train_batch_size} per device, "
        f"gradient accumulation {counts.accumulation})",
        "steps": f"{counts.total_steps} ({round(counts.steps_per_epoch, 2):,} per epoch)",
        "optimizer": f"{optimizer_text(settings)}, "
        f"learning rate {settings.learning_rate:g} ({settings.lr_scheduler_type}, {warm} warm-up "
        f"steps), weight decay {settings.weight_decay:g}, gradient clipping "
        f"{settings.max_grad_norm}",
        "gradient checkpointing": checkpointing_text(settings),
        "seed": settings.seed,
        "resume": resume_text(settings, platform_of(job.mesh)),
    }


def optimizer_text(settings: TrainConfig) -> str:
    """The optimizer's name, with LoRA+ and LoRA-FA if they are on."""
    ratio = settings.loraplus_lr_ratio
    plus = [f"LoRA+ (B's learning rate is {ratio:g} times A's)"] if ratio else []
    return " with ".join([settings.optim, *plus, *["LoRA-FA"] * settings.lorafa])


def checkpointing_text(settings: TrainConfig) -> str:
    """Whether layers are rematerialised, and where their inputs are saved."""
    if settings.gradient_checkpointing == "auto":
        return "auto: off if the compiled step then fits"
    if settings.activation_offloading:
        return "on, layer inputs offloaded to host memory"
    return "on" if settings.gradient_checkpointing else "off"


def resume_text(settings: TrainConfig, platform: str) -> str:
    """What a run that is interrupted and resumed has in common with one that is not."""
    if platform != "gpu":
        return "the result is identical byte for byte"
    if settings.full_determinism:
        return "the result is identical byte for byte: deterministic kernels, none chosen by timing"
    chosen = "at every start"
    if settings.compilation_cache:
        chosen = "once, and kept in the compilation cache"
    return (
        "the result is equal up to rounding: kernels may add in any order, and the fastest are "
        f"chosen {chosen} (train.full_determinism=true: byte for byte)"
    )


def table(rows: Sequence[Mapping[str, Any]]) -> HeaderTable:
    """Mappings with the same keys, as a table."""
    names = list(rows[0])
    return HeaderTable(names, [[_text(row[name]) for name in names] for row in rows])


def size_text(n: int) -> str:
    """A number of bytes as text: ``12.5 MiB``."""
    unit, power = next(
        u for u in (("GiB", 30), ("MiB", 20), ("KiB", 10)) if n >= 2 ** u[1] or u[1] == 10
    )
    return f"{n / 2**power:,.1f} {unit}"


def shape_text(shape: Sequence[int]) -> str:
    """A shape as text: ``4096 × 14336``."""
    return " × ".join(map(str, shape))


def _text(value: Any) -> Any:
    return shape_text(value) if isinstance(value, tuple) else value
