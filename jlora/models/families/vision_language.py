"""Language models inside multimodal ones: gemma3, mistral3, qwen2_vl, qwen2_5_vl and qwen3_vl.

The model is the text tower of transformers' ``…ForConditionalGeneration``; its settings are in
``text_config``. Modules are below ``model.language_model``, as in that class, and logits are those
of rows without images. Tensors of the vision tower are never held in memory; ``io.hf.write`` copies
them from the folder that the model was read from.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jlora.models.config import DecoderConfig
from jlora.models.config_reader import ConfigReader
from jlora.models.families import gemma, llama, qwen
from jlora.models.family import Family

QWEN2_VL = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "max_window_layers": 80,
    "rope_theta": 1_000_000.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
"""Defaults of transformers' Qwen2VLTextConfig and Qwen2_5_VLTextConfig."""

QWEN3_VL = {
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 128000,
    "rope_theta": 500_000.0,
}
"""Those of Qwen3VLTextConfig that differ from Qwen3Config's."""


def _text_tower(
    text: Family, types: Sequence[str], flat: bool, defaults: Mapping[str, Any]
) -> Callable[[ConfigReader], DecoderConfig]:
    """Reads ``text_config`` as ``text`` does.

    Args:
      text: the family of the language model.
      types: its possible ``model_type``s in ``text_config``.
      flat: the text settings of old files may be beside ``vision_config``.
      defaults: of the text settings, where they differ from the family's.
    """

    def read(keys: ConfigReader) -> DecoderConfig:
        given = keys.get("text_config", keys.hf if flat else None)
        if not isinstance(given, Mapping):
            raise keys.fail("text_config", f"must be an object, not {given!r}")
        kind = types[0] if given is keys.hf else given.get("model_type", types[0])
        if kind not in types:
            fix = f"supported within {keys.hf['model_type']}: {' and '.join(types)}"
            raise keys.fail("text_config", f"model_type {kind!r} is not supported", fix)
        inner = {**defaults, **given, "model_type": kind}
        if (tied := keys.hf.get("tie_word_embeddings")) is not None:
            # transformers before release 5 wrote Qwen's into text_config; the other one then has
            # its default, false.
            inner["tie_word_embeddings"] = tied or (flat and given.get("tie_word_embeddings", tied))
        # As in transformers' GenerationConfig.from_model_config: Gemma 3 has the token that ends a
        # turn (106) there only.
        for key in ("bos_token_id", "eos_token_id"):
            if keys.hf.get(key) is not None:
                inner[key] = keys.hf[key]
        for section in ("rope_scaling", "rope_parameters"):
            inner[section] = _rope_of_text(given.get(section))
        where = keys.where if given is keys.hf else f"{keys.where}: text_config"
        return dataclasses.replace(
            text.read(ConfigReader(inner, where)),
            model_type=keys.hf["model_type"],
            hf_json=json.dumps(dict(keys.hf), sort_keys=True),
        )

    return read


def _rope_of_text(settings: Any) -> Any:
    """Rope settings for text, whose three positions (Qwen's ``mrope``) are equal."""
    if not isinstance(settings, dict):
        return settings
    names = [key for key in ("rope_type", "type") if settings.get(key) == "mrope"]
    return {**settings, **dict.fromkeys(names, "default")}


VISION = r"(model\.)?(vision_tower|multi_modal_projector|visual)\..*"
LLAVA_FILES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
"""Names in files of the models that are built as Llava is."""

QWEN_FILES = {"model.language_model.": "model."}


def _family(
    text: Family,
    architecture: str,
    files: Mapping[str, str],
    *types: str,
    flat: bool = False,
    defaults: Mapping[str, Any] | None = None,
) -> Family:
    return Family(
        read=_text_tower(text, types, flat, defaults or {}),
        architecture=f"{architecture}ForConditionalGeneration",
        names={**text.names, "model": "model.language_model"},
        prefixes=files,
        other_tensors=VISION,
    )


_GEMMA3, _MISTRAL = gemma.FAMILIES["gemma3_text"], llama.FAMILIES["mistral"]
_QWEN2, _QWEN3 = qwen.FAMILIES["qwen2"], qwen.FAMILIES["qwen3"]

FAMILIES = {
    "gemma3": _family(_GEMMA3, "Gemma3", LLAVA_FILES, "gemma3_text"),
    "mistral3": _family(_MISTRAL, "Mistral3", LLAVA_FILES, "mistral"),
    "qwen2_vl": _family(
        _QWEN2, "Qwen2VL", QWEN_FILES, "qwen2_vl_text", "qwen2_vl", flat=True, defaults=QWEN2_VL
    ),
    "qwen2_5_vl": _family(
        _QWEN2,
        "Qwen2_5_VL",
        QWEN_FILES,
        "qwen2_5_vl_text",
        "qwen2_5_vl",
        flat=True,
        defaults=QWEN2_VL,
    ),
    "qwen3_vl": _family(_QWEN3, "Qwen3VL", {}, "qwen3_vl_text", defaults=QWEN3_VL),
}
