"""Tiny random transformers models, PEFT adapters on them, and both as loaded by jlora.

Every case is a PEFT config. Its adapter has random A and B, is made by peft, and is loaded from the
folder that peft saved, so that both sides have the same values.
"""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.io import peft as adapter_io

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
torch_files = pytest.importorskip("safetensors.torch")

PEERS_TALK = [
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor.s. have invalid shape:UserWarning"),
]
"""Ignores the peers' warnings about each other, GPT-2 and heads; their other warnings are errors.

peft 0.21 warns that patterns match nothing when they match a bare parameter, and that the biases of
lora_bias are damaged.
"""

LLAMA = transformers.LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    attention_bias=True, tie_word_embeddings=False, initializer_range=0.06,
)  # fmt: skip
GPT2 = transformers.GPT2Config(
    vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=32, initializer_range=0.06,
    bos_token_id=0, eos_token_id=0,
)  # fmt: skip
GEMMA2 = transformers.Gemma2Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=16,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, sliding_window=5,
    attn_logit_softcapping=2.0, final_logit_softcapping=3.0, initializer_range=0.1,
)  # fmt: skip
MOE = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32,
    "num_experts_per_tok": 2, "initializer_range": 0.1,
}  # fmt: skip
QWEN3_MOE = transformers.Qwen3MoeConfig(
    **MOE, intermediate_size=48, moe_intermediate_size=48, num_experts=4, decoder_sparse_step=1
)
MIXTRAL = transformers.MixtralConfig(**MOE, intermediate_size=48, num_local_experts=4)
GPT_OSS = transformers.GptOssConfig(**MOE, intermediate_size=32, num_local_experts=4)
PHI3 = transformers.Phi3Config(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    initializer_range=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
BASES = {
    "llama": LLAMA,
    "phi3": PHI3,
    "gpt2": GPT2,
    "gemma2": GEMMA2,
    "qwen3_moe": QWEN3_MOE,
    "gpt_oss": GPT_OSS,
    "mixtral": MIXTRAL,
}
FAST = {"xla_backend_optimization_level": 0}
"""Compiles in half the time; each program runs once."""

IDS = np.random.default_rng(0).integers(0, 64, (2, 12), dtype=np.int32)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "default targets": ("llama", {}),
    "two suffixes": ("llama", {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 16}),
    "all-linear": ("llama", {"target_modules": "all-linear", "r": 4}),
    "rsLoRA": ("llama", {"r": 4, "lora_alpha": 3, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "target_modules": ["q_proj", "o_proj", "up_proj"],
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "up_proj": 6, "q_proj": 3},
            "alpha_pattern": {"q_proj": 5, r"model\.layers\.[02]\.mlp\.up_proj": 2.5},
        },
    ),
    "rsLoRA with patterns": (
        "llama",
        {"use_rslora": True, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 5}},
    ),
    "a list of layers": ("llama", {"target_modules": ["v_proj"], "layers_to_transform": [0, 2]}),
    "one layer": (
        "llama",
        {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": 1, "r": 2},
    ),
    "layers by pattern": (
        "llama",
        {"target_modules": ["k_proj"], "layers_to_transform": [2], "layers_pattern": "layers"},
    ),
    "full names": (
        "llama",
        {"target_modules": ["model.layers.1.mlp.up_proj", "layers.0.self_attn.o_proj"]},
    ),
    "excluded names": (
        "llama",
        {"target_modules": "all-linear", "exclude_modules": ["layers.1.mlp.up_proj", "q_proj"]},
    ),
    "excluded by expression": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*q_proj"},
    ),
    "an expression": ("llama", {"target_modules": r".*layers\.(0|2)\..*\.(gate|k)_proj"}),
    "all biases": ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
    "its biases": ("llama", {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"}),
    "its biases in some layers": (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "bias": "lora_only"},
    ),
    "modules to save": (
        "llama",
        {"target_modules": "all-linear", "modules_to_save": ["lm_head", "norm", "embed_tokens"]},
    ),
    "the output head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "a saved module with parts": (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp"]},
    ),
    "modules to save in some layers": (
        "llama",
        {
            "target_modules": ["q_proj", "up_proj"],
            "modules_to_save": ["layers.1.mlp.up_proj", "layers.2.input_layernorm"],
        },
    ),
    "fan_in_fan_out said of Linear": ("llama", {"fan_in_fan_out": True}),
    "gpt2's default targets": ("gpt2", {}),
    "gemma2, all-linear": ("gemma2", {"target_modules": "all-linear", "r": 3}),
    "gpt2, all-linear": ("gpt2", {"target_modules": "all-linear", "r": 3}),
    "gpt2, fan_in_fan_out": (
        "gpt2",
        {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True, "lora_alpha": 4},
    ),
    "gpt2, all biases": (
        "gpt2",
        {"target_modules": ["c_fc"], "layers_to_transform": [0, 1], "bias": "all"},
    ),
    "gpt2, modules to save": (
        "gpt2",
        {"target_modules": r".*attn\.\w+_(attn|proj)", "modules_to_save": ["ln_f", "c_fc"]},
    ),
    "DoRA": ("llama", {"target_modules": "all-linear", "use_dora": True, "lora_alpha": 12}),
    "DoRA in some layers": (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj"],
            "layers_to_transform": [0, 2],
            "rank_pattern": {"q_proj": 3},
            "use_dora": True,
            "use_rslora": True,
        },
    ),
    "gpt2, DoRA": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "use_dora": True}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "r": 3}),
    "embeddings by expression": ("llama", {"target_modules": r".*(embed_tokens|v_proj)"}),
    "embeddings, DoRA": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "gpt2's tied embeddings": ("gpt2", {"target_modules": ["wte", "c_attn"]}),
    "LoRA with a bias": ("llama", {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [9, 1, 63]}),
    "tokens of a named embedding": (
        "llama",
        {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [5, 2]}},
    ),
    "gpt2, tokens of tied embeddings": (
        "gpt2",
        {"target_modules": ["c_attn"], "trainable_token_indices": [7, 3]},
    ),
    "experts": (
        "qwen3_moe",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
            "r": 3,
            "rank_pattern": {r"layers\.1\.mlp\.experts\.down_proj": 2},
            "alpha_pattern": {"gate_up_proj": 5},
        },
    ),
    "experts in full": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "modules_to_save": ["experts", "layers.1.mlp.gate"]},
    ),
    "gpt_oss's experts in full": (
        "gpt_oss",
        {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp"]},
    ),
    "one matrix of experts": (
        "qwen3_moe",
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
    ),
    "a router": ("qwen3_moe", {"target_modules": ["gate", "q_proj"], "r": 3, "lora_alpha": 6}),
    "gpt_oss's router": (
        "gpt_oss",
        {"target_modules": ["v_proj"], "target_parameters": ["router.weight"]},
    ),
    "mixtral's experts and router by their old names": (
        "mixtral",
        {"target_modules": ["w1", "w2", "w3", "gate", "q_proj"], "r": 2, "lora_alpha": 5},
    ),
    "gpt_oss's experts": (
        "gpt_oss",
        {
            "target_modules": ["v_proj"],
            "target_parameters": ["experts.gate_up_proj", "layers.1.mlp.experts.down_proj"],
            "r": 4,
        },
    ),
}
NUMBERS = [
    name
    for name in CASES
    if name
    not in (
        "two suffixes",
        "all biases",
        "rsLoRA with patterns",
        "one layer",
        "layers by pattern",
        "full names",
        "excluded by expression",
        "fan_in_fan_out said of Linear",
        "gpt2, all-linear",
        "embeddings by expression",
        "tokens of a named embedding",
        "one matrix of experts",
    )
]
"""The cases that differ in computation; the others differ only in names."""


@dataclasses.dataclass
class Base:
    """One base model: as a torch module, as a folder, and as loaded by jlora."""

    module: Any
    folder: Path
    model: Any
    params: dict


def load_torch(folder: Path, auto: Any = transformers.AutoModelForCausalLM, **options: Any) -> Any:
    """transformers' model of a folder; asserts that no tensor is missing or unexpected."""
    model, info = auto.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        **options,
    )
    assert not any(info.values()), info
    return model.eval()


def add_noise(module: Any) -> None:
    """Changes norms and biases, whose initial values do not show whether they are used."""
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim == 1:
                weight.add_(0.2 * torch.randn_like(weight))


def make_base(name: str, folder: Path) -> Base:
    """A random model, with random norms and biases too."""
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(
        BASES[name], attn_implementation="eager", dtype=torch.float32
    ).eval()
    add_noise(module)
    module.save_pretrained(folder)
    model, params = jlora.load_pretrained(folder, dtype="float32")
    return Base(module, folder, model, params)


def both_bases(tmp_path_factory: Any) -> dict[str, Base]:
    return {name: make_base(name, tmp_path_factory.mktemp(name)) for name in BASES}


def make_peft(base: Base, fields: dict, module: Any = None, seed: int = 1) -> Any:
    """peft's model for a config, with random trainable parameters."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", **fields)
    model = peft.get_peft_model(copy.deepcopy(base.module) if module is None else module, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                size = 0.15 if "lora_" in name else 0.05
                weight.add_(size * torch.randn_like(weight))
    return model.eval()


def torch_logits(model: Any, ids: np.ndarray = IDS) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids).long()).logits.float().numpy()


def jlora_logits(base: Base, params: dict, adapter: Any = None, ids: np.ndarray = IDS) -> Any:
    if adapter is not None:
        params = jlora.attach(params, adapter)
    return np.asarray(jax.jit(base.model, compiler_options=FAST)(params, jnp.asarray(ids)))


def assert_close(got: Any, want: Any, bound: float, name: str = "") -> None:
    """Equal up to ``bound`` of the largest expected value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, name
    np.testing.assert_allclose(
        got, want, rtol=0, atol=bound * np.abs(want).max() + 1e-12, err_msg=name
    )


def compare(base: Base, peft_model: Any, adapter: Any) -> None:
    """Compares logits, and every gradient of a function of them, to 1e-5 of the largest value."""

    def loss(adapter):
        logits = base.model(jlora.attach(base.params, adapter), jnp.asarray(IDS))
        return jnp.sum(jnp.sin(logits)), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST)(
        adapter
    )
    out = peft_model(input_ids=torch.tensor(IDS).long()).logits
    assert_close(logits, out.detach().numpy(), 1e-5)
    moved = np.abs(torch_logits(base.module) - out.detach().numpy()).max()
    assert moved > 1e-3 * np.abs(logits).max(), "the adapter has no effect"

    out.sin().sum().backward()
    trained = {n: p.grad for n, p in peft_model.named_parameters() if p.requires_grad}
    want = peft.get_peft_model_state_dict(peft_model, trained, save_embedding_layers=False)
    got = adapter_io.to_peft_tensors(dataclasses.replace(grads, initial=None))
    assert set(got) == set(want)
    for key, value in want.items():
        assert_close(got[key], value.numpy(), 1e-5, key)
