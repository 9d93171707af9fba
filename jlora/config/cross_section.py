"""What must be true between sections: see ``Config.check``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jlora.config.engine.faults import Fault

CLASSIFICATION = "classification"
"""The format of rows with classes."""


def together_faults(config: Any) -> Iterator[Fault]:
    """What several adapters in one run cannot have."""
    if not any(s.adapter for s in config.data.train or ()):
        return
    if not config.lora:
        fix = "add a lora section"
        yield Fault(("data.train", "lora"), "a full fine-tuning has no adapters to name", fix)
    refused = {
        "train.early_stopping_patience": "would stop all adapters at once",
        "train.fp16": "scales the loss of all adapters at once",
    }
    for key, cause in refused.items():
        if getattr(config.train, key.partition(".")[2]):
            yield Fault((key, "data.train"), cause, "leave it out, or train the adapters apart")
    if (config.train.optim or "").startswith("paged"):
        fix = f"use {config.train.optim.removeprefix('paged_').removesuffix('_32bit')}"
        yield Fault(("train.optim", "data.train"), "cannot page several adapters' moments", fix)
    if config.evaluate.exact_match:
        fix = "leave it out, and run jlora evaluate on each adapter's folder"
        yield Fault(("evaluate.exact_match", "data.train"), "is for one adapter", fix)


def first_value_faults(config: Any) -> Iterator[Fault]:
    """What a run cannot start from: it keeps no base for LoftQ, and reads no data for EVA."""
    lora, key, packing = config.lora, "lora.init_lora_weights", config.quantization
    if lora and lora.begins_with == "eva":
        fix = "make the adapter with jlora.eva, save it, and name its folder in lora.init_from"
        yield Fault((key,), "eva needs inputs of the model, which a run does not look at", fix)
    if lora is None or lora.begins_with != "loftq":
        return
    if packing is None or packing.load_in_8bit or packing.bnb_4bit_quant_type != "nf4":
        fix = "write quantization: {load_in_4bit: true}"
        yield Fault((key, "quantization"), "loftq needs a base quantized to nf4", fix)
    if lora.loftq_config.loftq_iter > 1:
        cause = "more than one iteration changes the base, which a run does not write"
        fix = "make base and adapter with jlora.loftq, save both, and name them"
        yield Fault(("lora.loftq_config.loftq_iter",), cause, fix)


def classification_faults(config: Any) -> Iterator[Fault]:
    """What contradicts the format of the rows, which says whether the model is a classifier."""
    formats = {s.format for s in (*(config.data.train or ()), *config.data.eval)} - {None}
    task, lora_key = config.lora and config.lora.task_type, "lora.task_type"
    if CLASSIFICATION not in formats:
        format = f"format: {CLASSIFICATION}"
        if task == "SEQ_CLS":
            yield Fault(
                (lora_key, "data"), "SEQ_CLS learns classes, and the rows have none", format
            )
        for key in ("num_labels", "id2label"):
            if getattr(config.model, key) is not None:
                yield Fault((f"model.{key}", "data"), "the rows have no classes", format)
        return
    if len(formats) > 1:
        others = ", ".join(sorted(formats - {CLASSIFICATION}))
        yield Fault(("data",), f"rows with classes are mixed with {others}", "train them apart")
    if config.lora and task != "SEQ_CLS":
        yield Fault((lora_key, "data"), f"is {task}, but the rows have classes", "write SEQ_CLS")
    if config.evaluate.exact_match:
        fix = "leave it out: accuracy and F1 are always reported"
        yield Fault(("evaluate.exact_match", "data"), "a classifier writes no replies", fix)
