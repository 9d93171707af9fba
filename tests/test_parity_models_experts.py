"""Mixtures of experts compared with transformers and peft: their files, logits, all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIGS
from tiny_peers import FAST, PEERS_TALK, Base, assert_close, make_peft, peft, torch, transformers

import jlora
from jlora.io import peft as adapter_io
from jlora.lora.targets import find_targets
from jlora.models.registry import family_of
from jlora.tree import paths

pytestmark = PEERS_TALK
IDS = np.random.default_rng(0).integers(3, 61, (2, 12), dtype=np.int32)
LINEAR_LAYERS = {
    "mixtral": ["k_proj", "o_proj", "q_proj", "v_proj"],
    "qwen2_moe": [
        *("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj"),
        *("shared_expert_gate", "up_proj", "v_proj"),
    ],
    "qwen3_moe": ["k_proj", "o_proj", "q_proj", "v_proj"],
    "gpt_oss": ["k_proj", "o_proj", "q_proj", "v_proj"],
}
"""The linear layers of each model: routers and experts are bare parameters in transformers.

For two of these models peft's all-linear adds those parameters, as its ``target_parameters``.
"""


def make_module(name):
    """A random model of transformers, in which every parameter affects the logits."""
    torch.manual_seed(0)
    hf = {k: v for k, v in CONFIGS[name].items() if k != "model_type"}
    config = transformers.AutoConfig.for_model(name, **hf, initializer_range=0.15)
    module = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return module


@pytest.mark.parametrize("name", LINEAR_LAYERS)
def test_logits_and_gradients_match_transformers_and_peft(name, tmp_path):
    module = make_module(name)
    module.save_pretrained(tmp_path / "base")
    base = Base(module, tmp_path, *jlora.load_pretrained(tmp_path / "base", dtype="float32"))
    peft_model = make_peft(base, {"target_modules": LINEAR_LAYERS[name], "r": 3})
    peft_model.save_pretrained(tmp_path / "peft")
    adapter = jlora.load_adapter(tmp_path / "peft", base.params)
    _, targets = find_targets(base.params, jlora.LoraConfig(target_modules="all-linear"))
    assert sorted({t.path[-1] for t in targets}) == LINEAR_LAYERS[name]

    def loss(adapter, params):
        logits = base.model(jlora.attach(params, adapter), jnp.asarray(IDS))
        return jnp.sum(jnp.sin(logits)), logits

    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, logits), (adapter_grads, base_grads) = jax.jit(gradient, compiler_options=FAST)(
        adapter, base.params
    )
    peft_model.requires_grad_(True)
    out = peft_model(input_ids=torch.tensor(IDS).long()).logits
    out.sin().sum().backward()
    assert_close(logits, out.detach().numpy(), 1e-5)

    gradients = {key: weight.grad for key, weight in peft_model.named_parameters()}
    want = peft.get_peft_model_state_dict(
        peft_model, {k: g for k, g in gradients.items() if "lora" in k}, save_embedding_layers=False
    )
    got = adapter_io.to_peft_tensors(adapter_grads)
    assert set(got) == set(want) and want
    for key, value in want.items():
        assert_close(got[key], value.numpy(), 2e-5, key)
    for leaf in paths.leaves(base_grads):
        for layer in [None] if leaf.layers is None else range(leaf.layers):
            value = leaf.value if layer is None else leaf.value[layer]
            key = f"base_model.model.{leaf.module(layer)}"
            torch_name = paths.TORCH_NAMES.get(leaf.kind, leaf.kind)
            grad = gradients.get(
                f"{key}.{torch_name}", gradients.get(f"{key}.base_layer.{torch_name}")
            )
            want_grad = grad.numpy()
            transposed = leaf.kind in ("kernel", *family_of(base.model.config).flipped)
            assert_close(value.swapaxes(-1, -2) if transposed else value, want_grad, 2e-5, key)
