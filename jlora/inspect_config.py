"""``jlora inspect CONFIG``: what a run would train, from the base's ``config.json`` alone."""

from jlora import cli

if __name__ == "__main__":  # settings are checked before the imports below, which take seconds
    cli.leave(cli.main("inspect"))

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jlora.config import Config, LoraConfig
from jlora.errors import ConfigError
from jlora.io.peft import embeddings_to_save, file_bytes
from jlora.lora.targets import (
    Target,
    across_runs,
    find_targets,
    is_replaced,
    match_table,
    replaced_leaves,
    scaling_of,
)
from jlora.models import Model
from jlora.quant.params import is_quantized, quant_config_of, quantize_params, scheme_text
from jlora.run import header
from jlora.run.abstract_job import abstract_adapter, abstract_model
from jlora.run.label_names import with_label_names
from jlora.run.new_tokens import new_tokens_text, untrained_rows
from jlora.run.open_tokenizer import open_with_new_tokens
from jlora.training.optim import check_optimizer, make_optimizer
from jlora.tree import paths
from jlora.ui.console import Console, HeaderTable

main = functools.partial(cli.main, "inspect")


def run(config: Config, options: argparse.Namespace) -> None:
    """Shows which modules are adapted, trained in full or quantized, and sizes; loads no weights.

    Raises:
      ConfigError: patterns of ``lora`` and ``quantization`` match nothing; all of them are listed.
    """
    del options
    jax.config.update("jax_platforms", "cpu")  # nothing is computed: do not occupy an accelerator
    console = Console()
    check_optimizer(config.train)
    config, _ = with_label_names(config)
    tokenizer = None
    if config.is_classification or config.model.new_tokens:
        config, tokenizer = open_with_new_tokens(config, console)
    model = abstract_model(config, tokenizer)
    dtype = config.model.dtype if config.lora else "float32"  # full fine-tuning trains in float32
    shapes = dataclasses.replace(model, dtype=dtype).shapes
    base, adapter, targets = _abstract_trees(config, shapes)
    sections: dict[str, Any] = {"model": _summary(config, model, tokenizer, base, adapter)}
    if targets:
        sections["adapter"] = _target_table(targets, adapter.config)
    if adapter is not None and (rows := _replaced_table(base, adapter.config)).rows:
        sections["trained in full"] = rows
    if config.quantization:
        sections["base"] = _base_table(base)
    console.header(f"jlora · {config.model.name_or_path}", sections)
    if adapter is not None:
        for text in untrained_rows(config, adapter.config, tokenizer, model):
            console.warn(text)


def _abstract_trees(config: Config, shapes: Any) -> tuple[Any, Any, list[Target]]:
    """Shapes of the base, quantized if asked, and of its adapter (None in full fine-tuning)."""
    faults: list[ConfigError] = []

    def attempt(work: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return work()
        except ConfigError as fault:
            faults.append(fault)
            return otherwise

    if (asked := config.quantization) is not None:
        quantize = functools.partial(quantize_params, config=asked)
        shapes = attempt(lambda: jax.eval_shape(quantize, shapes), shapes)
    adapter, targets = None, []
    if config.lora is not None:
        adapter = attempt(lambda: abstract_adapter(config, shapes), None)
    if len(faults) > 1:
        raise ConfigError("\n".join(map(str, faults)))
    if faults:
        raise faults[0]
    if adapter is not None:
        adapter = dataclasses.replace(adapter, initial=None)
        _, targets = find_targets(shapes, adapter.config)
    return shapes, adapter, targets


def _summary(
    config: Config, model: Model, tokenizer: Any, base: Any, adapter: Any
) -> Mapping[str, Any]:
    trainable = base if adapter is None else adapter
    frozen = {} if adapter is None else base
    architecture = model.config
    rows = {
        "base": config.model.name_or_path,
        "architecture": f"{architecture.model_type}: {architecture.num_hidden_layers} layers, "
        f"hidden size {architecture.hidden_size}, vocabulary {architecture.vocab_size:,}",
        **header.sizes(config, frozen, trainable),
    }
    if config.model.new_tokens:
        rows["new tokens"] = new_tokens_text(config, tokenizer, model)
    if adapter is None:
        rows["trains"] = "all parameters, in float32"
    else:
        tables = jax.eval_shape(lambda b: embeddings_to_save(model, b, adapter.config), base)
        rows["adapter file"] = header.size_text(file_bytes(adapter, tables))
    if architecture.prequantized:
        method = architecture.quant_method
        rows["quantization"] = f"the base is already quantized ({method}): it takes less than this"
    optimizer = make_optimizer(config.train, 1, trainable)
    with jax.numpy_dtype_promotion("standard"):  # optax does not promote strictly
        state = jax.eval_shape(optimizer.init, trainable)
    text = header.size_text(header.tree_bytes(state))
    rows["optimizer"] = f"{header.optimizer_text(config.train)}, {text} of state"
    return rows


def _target_table(targets: list[Target], config: LoraConfig) -> HeaderTable:
    """The run header's table of targets, with the scale of each delta."""
    rows, targets = [], across_runs(targets)
    for target, row in zip(targets, match_table(targets), strict=True):
        used = [name for name, r in zip(target.names, target.ranks, strict=True) if r]
        scales = sorted({scaling_of(config, name) for name in used})
        ends = dict.fromkeys((scales[0], scales[-1]))
        trained = row.pop("parameters")
        scale = "–".join(f"{scale:g}" for scale in ends)
        rows.append({**row, "scale": scale, "parameters": trained})
    return header.table(rows)


def _replaced_table(base: Any, config: LoraConfig) -> HeaderTable:
    """The leaves that are trained in full beside the adapter: biases, ``modules_to_save``."""
    rows = []
    for leaf in replaced_leaves(base, config):
        layers = sum(is_replaced(config, name, leaf.kind) for name in leaf.modules())
        size = layers * math.prod(leaf.shape)
        rows.append((f"{leaf.module()}.{leaf.kind}", layers, header.shape_text(leaf.shape), size))
    return HeaderTable(("leaf", "layers", "shape", "parameters"), rows)


def _base_table(base: Any) -> HeaderTable:
    """The format of every matrix of the base in memory, and its size."""
    rows = []
    for leaf in paths.leaves(base):
        if len(leaf.shape) > 1:
            name = f"{leaf.module()}.{leaf.kind}" if leaf.kind in paths.EXPERTS else leaf.module()
            if is_quantized(leaf.value):
                dtype = scheme_text(quant_config_of(leaf.value)).split()[0]
            else:
                dtype = leaf.value.dtype.name
            size = header.size_text(header.tree_bytes(leaf.value))
            rows.append((name, leaf.layers or 1, header.shape_text(leaf.shape), dtype, size))
    return HeaderTable(("module", "layers", "shape", "format", "size"), rows)
