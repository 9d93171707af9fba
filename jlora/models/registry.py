"""The supported families by ``model_type``, and parsing of a ``config.json``."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jlora.errors import ConfigError, did_you_mean
from jlora.models.config import DecoderConfig
from jlora.models.config_reader import ConfigReader
from jlora.models.families import (
    cohere,
    gemma,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    llama,
    moe,
    olmo2,
    opt,
    phi,
    qwen,
    smollm3,
    stablelm,
    starcoder2,
    vision_language,
)
from jlora.models.family import CLASSIFIER, Family
from jlora.models.other_types import what_is

FAMILIES: dict[str, Family] = {
    **llama.FAMILIES,
    **qwen.FAMILIES,
    **gemma.FAMILIES,
    **phi.FAMILIES,
    **gpt2.FAMILIES,
    **gpt_neox.FAMILIES,
    **opt.FAMILIES,
    **starcoder2.FAMILIES,
    **olmo2.FAMILIES,
    **smollm3.FAMILIES,
    **stablelm.FAMILIES,
    **granite.FAMILIES,
    **cohere.FAMILIES,
    **moe.FAMILIES,
    **gpt_oss.FAMILIES,
    **vision_language.FAMILIES,
}


def family_of(config: DecoderConfig) -> Family:
    """The family of a configuration."""
    return FAMILIES[config.model_type]


def parse_config(hf: Mapping[str, Any], *, where: str = "config.json") -> DecoderConfig:
    """The DecoderConfig for the contents of a ``config.json``.

    Raises ConfigError for an unknown ``model_type``, a missing or malformed value and a setting
    that is not supported; ``where`` is the file named in errors.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        kind = what_is(hf)
        remote = " (auto_map points to code of its own, which jlora never runs)"
        raise ConfigError(
            f"model_type {model_type!r} is not supported{f': it is {kind}' if kind else ''}"
            f"{remote if 'auto_map' in hf else ''}",
            where=f"{where}: model_type",
            fix=_misspelt(str(model_type)) or f"supported: {', '.join(FAMILIES)}",
        )
    keys = ConfigReader(hf, where)
    _check_quantization_method(keys, FAMILIES[model_type])
    keys.only("is_encoder_decoder", False)
    keys.only("add_cross_attention", False)
    return dataclasses.replace(FAMILIES[model_type].read(keys), num_labels=_num_labels(keys))


def _misspelt(model_type: str) -> str | None:
    """A remedy if it is the misspelt name of a family: another number is another model."""
    # What the other keys of config.json show is true of families with a misspelt name, too.
    if what_is({"model_type": model_type}) is not None:
        return None
    numbers = re.findall(r"\d+", model_type)
    alike = [name for name in FAMILIES if re.findall(r"\d+", name) == numbers]
    return did_you_mean(model_type, alike)


def as_classifier(
    config: DecoderConfig,
    num_labels: int,
    id2label: Sequence[str] | None = None,
    pad_token_id: int | None = None,
) -> DecoderConfig:
    """The configuration, ``config.json`` included, with a score head of ``num_labels`` classes.

    Args:
      config: a language model's, or a classifier's with the same number of classes.
      num_labels: the number of classes.
      id2label: their names; None keeps a classifier's names, or uses ``LABEL_0`` and so on.
      pad_token_id: written to ``config.json``: transformers classifies a row at its last token
        that is not padding.

    Raises ConfigError when the model has another number of classes.
    """
    if config.num_labels not in (None, num_labels):
        raise ConfigError(
            f"is {num_labels}, but the model has {config.num_labels} classes: "
            f"{', '.join(config.id2label[:10])}",
            where="model.num_labels",
            fix="leave it out, or start from a language model",
        )
    # transformers counts the names in id2label; a num_labels beside them could contradict it.
    hf = {k: v for k, v in config.hf.items() if k not in ("num_labels", "problem_type")}
    config = dataclasses.replace(config, num_labels=num_labels)
    names = config.id2label if id2label is None else id2label
    hf["architectures"] = [family_of(config).classifier]
    hf["id2label"] = {str(i): label for i, label in enumerate(names)}
    hf["label2id"] = {label: i for i, label in enumerate(names)}
    if pad_token_id is not None:
        hf["pad_token_id"] = pad_token_id
    return dataclasses.replace(config, hf_json=json.dumps(hf, sort_keys=True))


def _num_labels(keys: ConfigReader) -> int | None:
    """The number of classes of a transformers ``…ForSequenceClassification``; else None.

    Raises ConfigError for regression and multi-label classifiers.
    """
    names = keys.hf.get("architectures")
    if not isinstance(names, list) or not any(str(name).endswith(CLASSIFIER) for name in names):
        return None
    keys.only("problem_type", "single_label_classification")
    names = keys.hf.get("id2label")
    # Two: transformers' default, which it does not write to config.json.
    number = len(names) if isinstance(names, dict) else keys.number("num_labels", 2)
    if number < 2:
        raise keys.fail("num_labels", "one label is regression, which is not supported")
    return number


def _check_quantization_method(keys: ConfigReader, model_family: Family) -> None:
    """ConfigError for weights quantized by a method that the family does not support."""
    settings = keys.hf.get("quantization_config")
    if settings is None:
        return
    settings = settings if isinstance(settings, dict) else {}
    # Early releases of transformers wrote no quant_method.
    old = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    method = settings.get("quant_method", "bitsandbytes" if old else None)
    if method not in model_family.quant_methods:
        raise keys.fail(
            "quantization_config",
            f"the weights are already quantized, by {method!r}; only "
            f"{' and '.join(model_family.quant_methods)} is supported for {keys.hf['model_type']}",
            "name the model in 16 bits, and quantize it here with the section quantization",
        )
