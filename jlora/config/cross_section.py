"""Contradictions between sections, which ``Config.check`` reports."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jlora.config.engine.faults import Fault

CLASSIFICATION = "classification"
"""Value of ``data.train.0.format`` for rows with classes."""


def multi_adapter_faults(config: Any) -> Iterator[Fault]:
    """Settings that a multi-adapter run does not support."""
    if not any(source.adapter for source in config.data.train or ()):
        return
    if not config.lora:
        cause = "data.train names adapters, but full fine-tuning has none"
        yield Fault(("data.train", "lora"), cause, "add a lora section")
    # One decision would be made for all adapters from what happens to any of them.
    unsupported = {
        "train.early_stopping_patience": "would stop all adapters at once",
        "train.fp16": "would share one loss scale between all adapters",
    }
    for key, cause in unsupported.items():
        if getattr(config.train, key.partition(".")[2]):
            fix = "leave it out, or train the adapters in separate runs"
            yield Fault((key, "data.train"), cause, fix)
    if (config.train.optim or "").startswith("paged"):
        fix = f"use {config.train.optim.removeprefix('paged_').removesuffix('_32bit')}"
        cause = "paged optimizers do not support several adapters"
        yield Fault(("train.optim", "data.train"), cause, fix)
    if config.evaluate.exact_match:
        cause = "does not support several adapters"
        fix = "leave it out, and run jlora evaluate on the folder of each adapter"
        yield Fault(("evaluate.exact_match", "data.train"), cause, fix)


def exact_match_faults(config: Any) -> Iterator[Fault]:
    """``evaluate.exact_match`` without rows that have replies.

    Classifiers and several adapters are left to the other rules, which refuse it with any rows.
    """
    key = "evaluate.exact_match"
    sources = (*(config.data.train or ()), *config.data.eval)
    is_refused = any(s.adapter or s.format == CLASSIFICATION for s in sources)
    if is_refused or not config.evaluate.exact_match:
        return
    if not config.data.eval:
        fix = "name held-out rows in data.eval, or leave it out"
        yield Fault((key, "data.eval"), "needs held-out rows", fix)
    elif all(source.format == "text" for source in config.data.eval):
        fix = "name held-out rows with replies, or leave it out"
        yield Fault((key, "data.eval"), "rows of format text have no replies", fix)


def initialization_faults(config: Any) -> Iterator[Fault]:
    """Values of ``init_lora_weights`` that a run does not support.

    EVA needs activations before training, and further LoftQ rounds change the base: a run neither
    computes the first nor writes the second.
    """
    lora, key, quantization = config.lora, "lora.init_lora_weights", config.quantization
    if lora and lora.effective_init == "eva":
        cause = "eva needs inputs of the model, which a run does not compute"
        fix = "make the adapter with jlora.eva, save it, and name its folder in lora.init_from"
        yield Fault((key,), cause, fix)
    if lora is None or lora.effective_init != "loftq":
        return
    is_nf4 = (
        quantization and not quantization.load_in_8bit and quantization.bnb_4bit_quant_type == "nf4"
    )
    if not is_nf4:
        fix = "write quantization: {load_in_4bit: true}"
        yield Fault((key, "quantization"), "loftq needs a base quantized to nf4", fix)
    if lora.loftq_config.loftq_iter > 1:
        cause = "more than one round changes the base, which a run does not write"
        fix = "make base and adapter with jlora.loftq, save both, and name them"
        yield Fault(("lora.loftq_config.loftq_iter",), cause, fix)


def classification_faults(config: Any) -> Iterator[Fault]:
    """Settings that contradict the format of the rows, which decides what kind of model it is."""
    formats = {s.format for s in (*(config.data.train or ()), *config.data.eval)} - {None}
    task, task_key = config.lora and config.lora.task_type, "lora.task_type"
    if CLASSIFICATION not in formats:
        if task == "SEQ_CLS":
            cause = "SEQ_CLS trains a classifier, but the rows have no classes"
            yield Fault((task_key, "data"), cause, f"use format: {CLASSIFICATION}")
        for key in ("num_labels", "id2label"):
            if getattr(config.model, key) is not None:
                yield Fault((f"model.{key}", "data"), "the rows have no classes", "leave it out")
        return
    if len(formats) > 1:
        others = ", ".join(sorted(formats - {CLASSIFICATION}))
        cause = f"rows with classes are mixed with {others}"
        yield Fault(("data",), cause, "train on them in separate runs")
    if config.lora and task != "SEQ_CLS":
        yield Fault((task_key, "data"), f"is {task}, but the rows have classes", "write SEQ_CLS")
    if config.evaluate.exact_match:
        cause = "a classifier generates no replies"
        fix = "leave it out: accuracy and F1 are always reported"
        yield Fault(("evaluate.exact_match", "data"), cause, fix)
