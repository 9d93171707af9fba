"""LoRA compared with peft on tiny models: names, logits, gradients, merged and initial weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_peers import (
    CASES,
    IDS,
    NUMBERS,
    PEERS_TALK,
    assert_close,
    both_bases,
    compare,
    copy,
    jlora_logits,
    make_peft,
    peft,
    torch,
    torch_logits,
    transformers,
)

import jlora
from jlora.errors import ConfigError
from jlora.io import peft as adapter_io
from jlora.lora.targets import find_targets
from jlora.ops.dot import dots

pytestmark = PEERS_TALK


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return both_bases(tmp_path_factory)


@pytest.fixture
def case(bases, name, tmp_path):
    """(base, peft's model, the same adapter read by jlora)."""
    base, fields = bases[CASES[name][0]], CASES[name][1]
    peft_model = make_peft(base, fields)
    peft_model.save_pretrained(tmp_path / "peft")
    return base, peft_model, jlora.load_adapter(tmp_path / "peft", base.params)


@pytest.mark.parametrize("name", CASES)
def test_adapted_modules_match_peft(bases, name):
    base, fields = bases[CASES[name][0]], CASES[name][1]
    peft_model = peft.get_peft_model(copy.deepcopy(base.module), peft.LoraConfig(**fields))
    config, targets = find_targets(base.params, jlora.LoraConfig(**fields))
    jlora_names = [n for t in targets for n, r in zip(t.names, t.ranks, strict=True) if r]
    peft_names = [*peft_model.targeted_module_names, *peft_model.targeted_parameter_names]
    assert sorted(jlora_names) == sorted(peft_names)
    resolved, _ = find_targets(base.params, config)
    assert resolved == config, "resolving a resolved config does not change it"


@pytest.mark.parametrize("name", NUMBERS)
def test_logits_gradients_and_merged_weights_match_peft(case, name, tmp_path):
    base, peft_model, adapter = case
    compare(base, peft_model, adapter)
    if name == "gpt2's tied embeddings":  # peft's merge changes the head, too
        return
    peft_model.merge_and_unload().save_pretrained(tmp_path / "want")
    merged = load_file(tmp_path / "want" / "model.safetensors")
    jlora.save_pretrained(tmp_path / "merged", base.model, jlora.merge(base.params, adapter))
    for key, value in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert_close(value, merged[key], 1e-5, key)


@pytest.mark.parametrize(
    "name",
    ["all-linear", "DoRA in some layers", "gpt2, DoRA", "embeddings, DoRA", "LoRA with a bias",
     "gpt2, tokens of tied embeddings", "experts"],
)  # fmt: skip
def test_a_quantized_base_gives_the_results_of_its_dequantized_weights(bases, name, tmp_path):
    """peft gets jlora's dequantized weights, since bitsandbytes rounds a few of them otherwise."""
    base, fields = bases[CASES[name][0]], CASES[name][1]
    table = "wte" if CASES[name][0] == "gpt2" else "embed_tokens"
    settings = jlora.QuantConfig(block_size=32, include_modules=[table])
    quantized = jlora.quantize(base.params, settings)
    jlora.save_pretrained(tmp_path / "base", base.model, quantized)
    module = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
    )
    peft_model = make_peft(base, fields, module)
    peft_model.save_pretrained(tmp_path / "peft")
    adapter = jlora.load_adapter(tmp_path / "peft", quantized)
    quantized_base = dataclasses.replace(base, module=copy.deepcopy(base.module), params=quantized)
    compare(quantized_base, peft_model, adapter)


@pytest.mark.parametrize("kind", [True, "gaussian", False])
@pytest.mark.parametrize("target", ["linear", "linear, with biases", "embedding", "experts"])
def test_initial_values_have_pefts_distribution(bases, kind, target):
    base = bases["qwen3_moe" if target == "experts" else "llama"]
    fields: dict[str, Any] = {"r": 32, "init_lora_weights": kind}
    fields |= {
        "linear": {"target_modules": ["q_proj", "down_proj"]},
        "linear, with biases": {"target_modules": ["q_proj"], "lora_bias": True},
        "embedding": {"target_modules": ["embed_tokens"]},
        "experts": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    }[target]
    if fields.get("lora_bias") and kind == "gaussian":
        with pytest.raises(ConfigError, match="lora_bias"):
            jlora.LoraConfig(**fields)
        return
    torch.manual_seed(0)
    peft_model = peft.get_peft_model(copy.deepcopy(base.module), peft.LoraConfig(**fields))
    want = peft.get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    adapter = jlora.init_adapter(jax.random.key(0), base.params, jlora.LoraConfig(**fields))
    got = adapter_io.to_peft_tensors(adapter)
    assert set(got) == set(want)
    for key, tensor in want.items():
        value, size = tensor.numpy(), tensor.numel()
        np.testing.assert_allclose(got[key].std(), value.std(), rtol=6 / np.sqrt(size), atol=1e-9)
        assert abs(got[key].mean()) <= 4 * value.std() / np.sqrt(size)
        if not tensor.any():
            assert not got[key].any()
        elif kind != "gaussian" and target != "embedding" and size > 1000:
            # Both reach the bounds of a uniform distribution.
            np.testing.assert_allclose(np.abs(got[key]).max(), np.abs(value).max(), rtol=0.02)


def test_dora_magnitudes_and_token_rows_start_at_the_bases_values(bases):
    base = bases["llama"]
    fields: dict[str, Any] = {"target_modules": ["q_proj"], "use_dora": True}
    fields["trainable_token_indices"] = [3, 1]
    peft_model = peft.get_peft_model(copy.deepcopy(base.module), peft.LoraConfig(**fields))
    want = peft.get_peft_model_state_dict(peft_model)
    adapter = jlora.init_adapter(jax.random.key(0), base.params, jlora.LoraConfig(**fields))
    got = adapter_io.to_peft_tensors(adapter)
    assert set(got) == set(want)
    for key, value in want.items():
        if "lora_A" not in key:
            assert_close(got[key], value.numpy(), 1e-6, key)
    assert_close(jlora_logits(base, base.params, adapter), torch_logits(base.module), 1e-5)


def test_qlora_matches_bitsandbytes_and_peft(bases, tmp_path):
    """The codes of absmax differ in up to 0.23 % of blocks, everything else only by rounding.

    So the tolerance is relative to what quantization changes in the logits: 2 % of it.
    """
    pytest.importorskip("bitsandbytes")
    base = bases["llama"]
    quantization = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }
    bnb_model = transformers.AutoModelForCausalLM.from_pretrained(
        base.folder,
        quantization_config=transformers.BitsAndBytesConfig(
            **quantization, bnb_4bit_compute_dtype=torch.float32
        ),
        dtype=torch.float32,
        attn_implementation="eager",
        device_map="cpu",
    )
    peft_model = make_peft(base, {"target_modules": "all-linear"}, bnb_model)
    peft_model.train()  # in evaluation mode its forward pass rearranges the codes
    peft_model.save_pretrained(tmp_path)
    want = peft_model(input_ids=torch.tensor(IDS).long()).logits.detach().numpy()

    settings = jlora.QuantConfig(**quantization, bnb_4bit_compute_dtype="float32")
    _, params = jlora.load_pretrained(base.folder, dtype="float32", quantization=settings)
    adapter = jlora.load_adapter(tmp_path, params)
    got = jlora_logits(base, params, adapter)
    quantization_change = np.abs(jlora_logits(base, base.params, adapter) - want).max()
    assert quantization_change > 0.05 * np.abs(want).max()
    assert np.abs(got - want).max() < 0.02 * quantization_change


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_has_pefts_mean_and_variance(bases, use_dora, tmp_path):
    """Of the outputs of one module for one input, over many draws; torch draws its own masks.

    The means of n draws differ by √(2 Var / n), the variances by √(2 (m₄ - Var²) / n): both may by
    five times as much. PEFT draws a mask for each module, jlora one for all that read one input;
    the distribution of each module's outputs is the same.
    """
    base, n, projections = bases["llama"], 20_000, ("q_proj", "k_proj", "v_proj")
    fields = {"r": 4, "target_modules": [*projections], "lora_dropout": 0.1, "use_dora": use_dora}
    peft_model = make_peft(base, fields)
    attention = peft_model.base_model.model.model.layers[0].self_attn.train()
    x = np.random.default_rng(0).normal(size=64).astype(np.float32)
    torch.manual_seed(0)
    rows = torch.from_numpy(np.tile(x, (n, 1)))
    with torch.no_grad():
        want = [np.float64(getattr(attention, name)(rows).numpy()) for name in projections]

    peft_model.save_pretrained(tmp_path)
    adapter = jlora.load_adapter(tmp_path, base.params)
    attached = jlora.attach(base.params, adapter, dropout_key=jax.random.key(0))
    layer = attached["model"]["layers"]["self_attn"]
    kernels = [jax.tree.map(lambda a: a[0], layer[name]["kernel"]) for name in projections]
    biases = [base.params["model"]["layers"]["self_attn"][name]["bias"][0] for name in projections]
    got = [
        np.float64(y + bias)
        for y, bias in zip(dots(jnp.asarray(np.tile(x, (n, 1))), kernels), biases, strict=True)
    ]
    for one, other in zip(got, want, strict=True):
        variances = one.var(0), other.var(0)
        assert min(map(np.min, variances)) > 0
        error = np.sqrt(sum(variances) / n)
        np.testing.assert_array_less(np.abs(one.mean(0) - other.mean(0)), 5 * error + 1e-6)
        fourth = [
            ((y - y.mean(0)) ** 4).mean(0) - v**2
            for y, v in zip((one, other), variances, strict=True)
        ]
        error = np.sqrt(sum(fourth) / n)
        np.testing.assert_array_less(np.abs(variances[0] - variances[1]), 5 * error)
