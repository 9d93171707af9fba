"""The settings that the folder of a PEFT adapter implies, which has no settings file of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

from jlora.config.engine.schema import DTYPE_ALIASES, DType
from jlora.errors import DataError, StorageError

CONFIG_FILE = "adapter_config.json"
TOKENIZER = "tokenizer_config.json"
"""By this file AutoPeftModel recognises that an adapter has a tokenizer of its own."""

CHAT_TEMPLATE = "chat_template.jinja"


def settings_of_adapter(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """``adapter_config.json`` and its settings; None if the folder holds no adapter.

    The base model is the one that it names (mlx-lm's key is ``model``), in the data type of its own
    ``config.json`` where it is a local folder. The tokenizer is the folder's, if it has one: tokens
    may have been added for the adapter. ``data.train`` is required, but not read:
    its format is how ``jlora generate`` writes prompts. How the adapter computes is not repeated in
    ``lora``: whoever loads it reads the file.

    Raises DataError if the file is not a JSON object.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        return None
    adapter = _json_object(file)
    template = folder / CHAT_TEMPLATE
    name = adapter.get("base_model_name_or_path") or adapter.get("model")
    model = {
        "name_or_path": name,
        "revision": adapter.get("revision"),
        "dtype": _dtype(name),
        "tokenizer_name_or_path": str(folder) if (folder / TOKENIZER).is_file() else None,
    }
    kept = ("lora_dropout", "task_type", "base_model_name_or_path", "revision")
    is_classifier = adapter.get("task_type") == "SEQ_CLS"
    row_format = "classification" if is_classifier else "messages"
    data = {
        "train": [{"path": str(folder), "format": row_format}],
        "chat_template": str(template) if template.is_file() else None,
    }
    return file, {
        "model": _without_nulls(model),
        "lora": _without_nulls({key: adapter.get(key) for key in kept}),
        "data": _without_nulls(data),
        "train": {"output_dir": str(folder)},
    }


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _json_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", where=str(file)) from error
    except ValueError as error:
        raise DataError(f"is not JSON: {error}", where=str(file)) from error
    if not isinstance(value, dict):
        raise DataError("must hold a JSON object", where=str(file))
    return value


def _dtype(base: Any) -> str | None:
    """The data type in the ``config.json`` of a base that is a local folder."""
    file = Path(str(base)).expanduser() / "config.json"
    if base is None or not file.is_file():
        return None
    settings = _json_object(file)
    inner = settings.get("text_config")  # of a multimodal model
    for part in (settings, inner if isinstance(inner, dict) else {}):
        name = str(part.get("dtype") or part.get("torch_dtype"))
        name = DTYPE_ALIASES.get(name, name)
        if name in get_args(DType):
            return name
    return None
