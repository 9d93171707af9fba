"""The Llama that the benchmarks use, with random weights: in jlora and in transformers.

Imports are inside the functions: a worker process imports torch or jax, never both.
"""

from __future__ import annotations

import os
from typing import Any

VOCAB = 8192
METHODS = {"lora": "LoRA", "qlora": "QLoRA, checkpointing", "full": "full"}


def shape(width: int = 768, layers: int = 8) -> dict[str, Any]:
    """A ``config.json``: 63 million parameters, or another width or depth with heads of 64."""
    heads = width // 64
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": width,
        "intermediate_size": width * 8 // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 3,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }


def linear_parameters(hf: dict[str, Any]) -> int:
    """Number of weights in linear layers and the head: each costs 2 FLOPs per token and pass."""
    width, inner = hf["hidden_size"], hf["intermediate_size"]
    shared = width * hf["num_key_value_heads"] / hf["num_attention_heads"]
    layer = width * (2 * width + 2 * shared + 3 * inner)
    return int(hf["num_hidden_layers"] * layer + width * hf["vocab_size"])


def quantize(params: Any) -> Any:
    """NF4 with double quantization, as ``jlora train`` quantizes a base."""
    import jlora

    return jlora.quantize(params, jlora.QuantConfig())


def jlora_model(hf: dict[str, Any], dtype: str = "bfloat16", **options: Any) -> tuple[Any, Any]:
    """jlora's model and its parameters."""
    import jax

    from jlora.models import Model, init_params

    model = Model.from_config(hf, dtype, **options)
    return model, jax.jit(init_params, static_argnums=1)(jax.random.key(0), model)


def torch_threads() -> Any:
    """torch with one thread per core, which is its default on most machines."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    return torch


def torch_device() -> str:
    """The device that torch computes on."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def transformers_model(hf: dict[str, Any], dtype: str = "bfloat16") -> Any:
    """transformers' model with its fused attention, on torch's device."""
    torch = torch_threads()
    import transformers

    config = transformers.LlamaConfig(**{k: v for k, v in hf.items() if k != "model_type"})
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    return model.to(torch_device())


def quantize_torch_model(model: Any) -> Any:
    """The model with bitsandbytes' layers in place of its linear layers, except the head."""
    import bitsandbytes as bnb
    import torch

    options = {"compress_statistics": True, "quant_type": "nf4", "quant_storage": torch.uint8}
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            quantized = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                **options,
            )
            quantized.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, **options)
            model.set_submodule(name, quantized.to(module.weight.device))
    model.is_loaded_in_4bit = True
    return model
