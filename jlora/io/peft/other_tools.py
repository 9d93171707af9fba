"""Adapters by other tools: names with prefixes, and the files of mlx-lm.

=================  =========================================================================
``_orig_mod.``     a model that ``torch.compile`` wrapped
``module.``        one that DistributedDataParallel wrapped
``.default``       the adapter's name, which PEFT leaves out of its files
``model.``         once more, or once less, than PEFT's ``base_model.model.``
mlx-lm             ``adapters.safetensors``: ``lora_a`` (in, r), ``lora_b`` (r, out), ``scale``
=================  =========================================================================

torchtune's ``adapter_model.safetensors`` has PEFT's names and order of rows. Not read are its own
tensors (``layers.0.attn.q_proj.lora_a.weight``), in which the rows of queries and keys are in an
order that depends on the head's size, and what it writes of DoRA: its ``adapter_config.json`` does
not say ``use_dora``, and magnitudes of queries and keys keep its own order of rows.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from jlora.config import LoraConfig
from jlora.config.adapter_folder import CONFIG_FILE
from jlora.errors import ConfigError, DataError
from jlora.files import storage_errors
from jlora.io.peft.tensors import PREFIX

MLX_FILE = "adapters.safetensors"
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that wrappers of torch modules insert."""

LEAVES = (
    "lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|trainable_tokens_delta"
)
"""In a torch model these are followed by the adapter's name, such as ``default``."""

LEADING = ("base_model", "module", "model")
"""First parts of names that tools add or leave out."""


# By torchtune's source (commit bd2a0fc), which was not run.
TORCHTUNE = re.compile(r"(.*\.)?(attn|mlp)\.\w+\.(lora_a\.weight|lora_b\.weight|magnitude)")
"""Its own names of an adapter's tensors."""


def check_not_torchtune(names: Collection[str], config: LoraConfig, file: Path) -> None:
    """DataError for what torchtune writes in a form that has lost its meaning."""
    own = [name for name in names if TORCHTUNE.fullmatch(name)]
    if own:
        raise DataError(
            f"its tensors have torchtune's own names, such as {own[0]}: rows of queries and keys "
            "are in another order there",
            where=str(file),
            fix="take the adapter_model.safetensors that torchtune writes for PEFT",
        )
    magnitudes = [name for name in names if "lora_magnitude_vector" in name]
    if magnitudes and not config.use_dora:
        raise DataError(
            f"it has magnitudes of DoRA ({len(magnitudes)}, such as {magnitudes[0]}), but "
            f"{CONFIG_FILE} does not say use_dora",
            where=str(file),
            fix=f'write "use_dora": true in {CONFIG_FILE}; not if torchtune wrote the adapter and '
            "q_proj or k_proj have magnitudes: their rows are in another order than those of B",
        )


class AdapterNamesWarning(UserWarning):
    """The tensors of an adapter had other names than PEFT's, and were recognised."""


def with_peft_names(
    tensors: Mapping[str, Any], expected: Collection[str], file: Path
) -> dict[str, Any]:
    """The tensors (or shapes) under the ``expected`` names that they have without known prefixes.

    A warning says what was renamed. Names that are not recognised stay.

    Raises:
      DataError: two tensors would have the same name.
    """
    short = {core_of(name): name for name in expected}
    renamed, changed = {}, {}
    for name, value in tensors.items():
        new = name if name in expected else short.get(core_of(name), name)
        if new in renamed:
            raise DataError(
                f"{new} is there under two names",
                where=str(file),
                fix="keep one of them",
            )
        renamed[new] = value
        if new != name:
            changed[name] = new
    if changed:
        old, new = next(iter(changed.items()))
        warnings.warn(
            f"{file}: {len(changed)} tensors have names of another tool: {old} is read as {new}",
            AdapterNamesWarning,
            stacklevel=4,
        )
    return renamed


def core_of(name: str) -> tuple[str, ...]:
    """The parts of a tensor's or a module's name without those that tools add."""
    name = re.sub(rf"\.({LEAVES})\.(?!weight$|bias$)[^.]+(?=\.|$)", r".\1", name)
    name = re.sub(r"\.modules_to_save\.[^.]+(?=\.weight$|\.bias$)", "", name)
    # In PEFT's model the magnitude became the weight of a layer; in its files it kept its name.
    name = name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
    parts = [p for p in name.split(".") if p not in WRAPPERS]
    while parts and parts[0] in LEADING:
        parts.pop(0)
    return tuple(parts)


def mlx_fields(raw: Mapping[str, Any], directory: str | Path) -> dict[str, Any]:
    """The fields of a LoraConfig for a folder of mlx-lm, whose ``adapter_config.json`` is ``raw``.

    mlx-lm's scale multiplies A @ B as it is: alpha is rank times scale.

    Raises:
      ConfigError: it is not an adapter of LoRA or DoRA, or one of experts.
      DataError: the folder has mlx-lm's tensors, but not its settings.
    """
    kind, settings = raw.get("fine_tune_type", "lora"), raw.get("lora_parameters")
    file = Path(directory) / MLX_FILE
    with storage_errors(file), safetensors.safe_open(file, "numpy") as f:
        shapes = {name: f.get_slice(name).get_shape() for name in f.keys()}  # noqa: SIM118
    odd = [name for name, shape in shapes.items() if len(shape) > 2]
    if kind not in ("lora", "dora") or odd:
        cause = f"mlx-lm's {odd[0]} is of experts" if odd else f"mlx-lm's fine_tune_type: {kind}"
        raise ConfigError(f"{cause}, which jlora does not read", where=str(file))
    if not isinstance(settings, Mapping) or not {"rank", "scale"} <= settings.keys():
        raise DataError(
            f"{MLX_FILE} is mlx-lm's, but the settings are not: lora_parameters is missing or "
            "incomplete",
            where=str(directory),
        )
    rank, scale = settings["rank"], settings["scale"]
    return {
        "r": rank,
        "lora_alpha": rank * scale,
        "lora_dropout": settings.get("dropout", 0.0),
        "target_modules": sorted(name[:-7] for name in shapes if name.endswith(".lora_a")),
        "use_dora": kind == "dora",
    }


def from_mlx(tensors: Mapping[str, np.ndarray], expected: Collection[str]) -> dict[str, np.ndarray]:
    """mlx-lm's tensors with PEFT's names, and in torch's orientation."""
    found = {}
    for name, value in tensors.items():
        module, _, last = name.rpartition(".")
        ends = {
            "lora_a": ("lora_A.weight", "lora_embedding_A"),
            "lora_b": ("lora_B.weight", "lora_embedding_B"),
            "m": ("lora_magnitude_vector",),
        }.get(last, (last,))
        names = [f"{PREFIX}{module}.{end}" for end in ends]
        found[next((n for n in names if n in expected), names[0])] = value.T
    return found
