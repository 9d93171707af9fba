"""How other programs compute a module's scale from a PEFT folder, and which of them go wrong.

PEFT applies ``rank_pattern``, ``alpha_pattern`` and ``use_rslora`` module by module. Programs that
serve adapters do less:

===========  =====================================================================
vLLM         alpha / r, or alpha / √r with rsLoRA, the same for all modules
SGLang       alpha / r, the same for all modules
llama.cpp    alpha divided by the rank of the module's own tensors
===========  =====================================================================

(``vllm/lora/peft_helper.py``, ``sglang/srt/lora/lora.py``, ``llama-adapter.h``: ``get_scale``.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jlora.io.peft.conversion import to_peft_form
from jlora.lora import DELTA, EMBEDDING_DELTA, Adapter
from jlora.lora.targets import rank_of, scaling_of
from jlora.tree import paths

Scale = Callable[[Mapping[str, Any], int], float]
"""The scale, given ``adapter_config.json`` and the rank of the module's tensors."""


def _vllm(config: Mapping[str, Any], rank: int) -> float:
    del rank
    r = config["r"]
    return config["lora_alpha"] / (math.sqrt(r) if config["use_rslora"] else r)


def _sglang(config: Mapping[str, Any], rank: int) -> float:
    del rank
    return config["lora_alpha"] / config["r"]


def _llama_cpp(config: Mapping[str, Any], rank: int) -> float:
    return config["lora_alpha"] / rank


CONSUMERS: dict[str, Scale] = {"vLLM": _vllm, "SGLang": _sglang, "llama.cpp": _llama_cpp}


def misreadings(adapter: Adapter) -> list[str]:
    """Messages: which programs misread the folder of the adapter, which may be abstract.

    They concern scales only: a program that reads another scale gives other logits without a word.
    """
    whole = jax.eval_shape(to_peft_form, adapter)
    raw = {key: getattr(whole.config, key) for key in ("r", "lora_alpha", "use_rslora")}
    ranks = {
        name: r
        for leaf in paths.leaves(whole.weights)
        if leaf.kind in (DELTA[0], EMBEDDING_DELTA[0]) and len(leaf.shape) == 2
        for name in leaf.modules()
        if (r := rank_of(whole.config, name))
    }
    by_modules: dict[tuple[str, ...], list[str]] = {}
    for consumer, scale in CONSUMERS.items():
        wrong = tuple(
            name
            for name, r in ranks.items()
            if not math.isclose(scale(raw, r), scaling_of(whole.config, name), rel_tol=1e-6)
        )
        if wrong:
            by_modules.setdefault(wrong, []).append(consumer)
    return [
        f"{_listed(consumers)} would apply another scale than PEFT to {len(wrong)} of "
        f"{len(ranks)} modules, such as {wrong[0]}: rank_pattern, alpha_pattern and rsLoRA are not "
        "read there; one r and lora_alpha for all modules, without rsLoRA, is read by all"
        for wrong, consumers in by_modules.items()
    ]


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
