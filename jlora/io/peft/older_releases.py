"""Adapter files written by earlier releases of PEFT.

====================  ======================================================================
0.5 and before        biases of adapted layers are ``q_proj.bias``, later ``q_proj.base_layer.bias``
0.6 to 0.17, at least  with ``bias="lora_only"`` the trained biases are not in the file at all
====================  ======================================================================

With transformers 4, Mixtral's mixture was ``block_sparse_moe``, now ``mlp`` (its experts:
``linear_experts``). ``adapter_config.json`` has only gained keys; an absent key has its default.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from jlora.config import LoraConfig
from jlora.errors import DataError

BASE_BIAS = ".base_layer.bias"


def rename_old_tensors(
    tensors: dict[str, np.ndarray], expected: Collection[str], config: LoraConfig, file: Path
) -> dict[str, np.ndarray]:
    """The tensors with the names of the newest release; ``expected`` are the adapter's names.

    Raises:
      DataError: the release that wrote the file lost the biases it had trained.
    """
    biases = [name for name in expected if name.endswith(BASE_BIAS)]
    old = {name.replace(BASE_BIAS, ".bias"): name for name in biases}
    old |= {name.replace(".mlp.", ".block_sparse_moe."): name for name in expected}
    named = {old.get(name, name): value for name, value in tensors.items()}
    others = set(expected) - set(biases)
    if config.bias == "lora_only" and biases and named.keys() == others:
        raise DataError(
            f"the biases that were trained are not in the file ({len(biases)} tensors, such as "
            f"{biases[0]}): some releases of PEFT lost them when they saved",
            where=str(file),
            fix='to use the adapter without them, as PEFT does, write "bias": "none" in '
            "adapter_config.json",
        )
    return named
