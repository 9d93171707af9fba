"""PEFT's ``adapter_config.json``: reading it into a LoraConfig and writing it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlora.config import LoraConfig
from jlora.config.adapter_folder import CONFIG_FILE
from jlora.errors import ConfigError, DataError
from jlora.files import storage_errors, write_atomic
from jlora.io.peft.other_tools import MLX_FILE, mlx_fields
from jlora.io.peft.tensors import TENSOR_FILE

OTHER_KEYS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "auto_mapping": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "inference_mode": True,
    "kasa_config": None,
    "layer_replication": None,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "peft_type": "LORA",
    "qalora_group_size": 16,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
"""PEFT's keys for features that jlora does not have → the value that means "not used"."""

IGNORED = {"auto_mapping", "inference_mode", "megatron_core", "peft_version", "runtime_config"}
IGNORED |= {"qalora_group_size"}
"""Keys without effect on a loaded LoRA adapter, whatever their value."""


def read_config(directory: str | Path) -> LoraConfig:
    """The LoraConfig in ``adapter_config.json``; see ``load_adapter`` for the errors."""
    file = Path(directory) / CONFIG_FILE
    if not file.is_file():
        raise DataError(
            f"no {CONFIG_FILE} here", where=str(directory), fix="give the folder of a PEFT adapter"
        )
    try:
        with storage_errors(file):
            raw = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"is not JSON: {error}", where=str(file)) from error
    if isinstance(raw, dict) and is_mlx(directory):
        return LoraConfig(**mlx_fields(raw, directory))
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        kind = raw.get("peft_type") if isinstance(raw, dict) else None
        raise DataError(f"is not a LoRA adapter (peft_type: {kind})", where=str(file))
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    used = [
        key
        for key, value in raw.items()
        if key not in known | IGNORED and value not in (None, False, {}, [], OTHER_KEYS.get(key))
    ]
    if used:
        raise ConfigError(f"uses {', '.join(used)}, which jlora does not support", where=str(file))
    # PEFT writes null for settings that are not used, some of which have another default here.
    fields = {k: v for k, v in raw.items() if k in known and v is not None}
    return LoraConfig(**fields)


def is_mlx(directory: str | Path) -> bool:
    """Whether the folder is mlx-lm's, by the name of its tensor file."""
    return (Path(directory) / MLX_FILE).is_file() and not (Path(directory) / TENSOR_FILE).is_file()


def write_config(directory: str | Path, config: LoraConfig) -> None:
    """Writes ``adapter_config.json`` as PEFT does; ``config`` must be in PEFT's form."""
    fields = {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    del fields["init_from"]
    # PEFT warns of settings for initial values that are not used.
    for kind, unused in (("loftq", {}), ("eva", None)):
        if config.init_lora_weights != kind:
            fields[f"{kind}_config"] = unused
    text = json.dumps({**OTHER_KEYS, **fields}, indent=2, sort_keys=True)
    write_atomic(Path(directory) / CONFIG_FILE, text)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return list(value) if isinstance(value, tuple) else value
