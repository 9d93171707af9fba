"""Folders that transformers saved with bitsandbytes: jlora has the same bytes, weights, logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_peers import (
    BASES,
    FAST,
    IDS,
    PEERS_TALK,
    add_noise,
    assert_close,
    torch,
    transformers,
)

import jlora
from jlora.io.hf.names import checkpoint_tensors
from jlora.quant.nf4 import NF4Array
from jlora.quant.params import is_quantized
from jlora.tree import paths

bnb = pytest.importorskip("bitsandbytes")
pytestmark = PEERS_TALK

QWEN2 = transformers.Qwen2Config(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    initializer_range=0.06,
)  # fmt: skip
GPT2 = transformers.GPT2Config(
    **{**BASES["gpt2"].to_dict(), "n_embd": 64, "n_layer": 2}
    | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
)
CONFIGS = {"llama": BASES["llama"], "qwen2": QWEN2, "gpt2": GPT2}

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
DOUBLE = {"bnb_4bit_use_double_quant": True}
CASES = {
    "llama, nf4 with double quantization": ("llama", NF4 | DOUBLE),
    "llama, fp4": ("llama", FP4),
    "llama, blocks of 32": ("llama", NF4 | DOUBLE | {"block_size": 32}),
    "llama, some left out, bytes stored as bfloat16": (
        "llama",
        NF4 | {"bnb_4bit_quant_storage": "bfloat16", "llm_int8_skip_modules": ["o_proj"]},
    ),
    "llama, some left out in some layers": (
        "llama",
        NF4 | DOUBLE | {"llm_int8_skip_modules": ["model.layers.1.mlp", "2.self_attn.q_proj"]},
    ),
    "llama, a layer left out, 8 bits": (
        "llama",
        {"load_in_8bit": True, "llm_int8_skip_modules": ["model.layers.0", "lm_head"]},
    ),
    "llama, 8 bits": ("llama", {"load_in_8bit": True}),
    "qwen2, nf4": ("qwen2", NF4),
    "qwen2, fp4 with double quantization": ("qwen2", FP4 | DOUBLE),
    "gpt2, nf4 with double quantization": ("gpt2", NF4 | DOUBLE),
    "gpt2, 8 bits": ("gpt2", {"load_in_8bit": True}),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Name → a folder of the float32 model."""
    folders = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        add_noise(module)
        folders[name] = tmp_path_factory.mktemp(name)
        module.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def saved(request, dense, tmp_path_factory):
    """(bitsandbytes' model, the folder it was saved to, jlora's model, jlora's parameters)."""
    name, settings = request.param
    settings = dict(settings)
    block = settings.pop("block_size", 64)
    bnb_config = transformers.BitsAndBytesConfig(**settings, bnb_4bit_compute_dtype=torch.float32)
    bnb_model = transformers.AutoModelForCausalLM.from_pretrained(
        dense[name],
        quantization_config=bnb_config,
        dtype=torch.float32,
        attn_implementation="eager",
        device_map="cpu",
    )
    if block != 64:
        reblock(bnb_model, block)
    folder = tmp_path_factory.mktemp("quantized")
    bnb_model.save_pretrained(folder)
    return bnb_model, folder, *jlora.load_pretrained(folder, dtype="float32")


def reblock(model, block):
    """Quantizes again in blocks of another size, for which transformers has no setting."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            old = module.weight
            values = bnb.functional.dequantize_4bit(old.data, old.quant_state)
            settings = {"quant_type": old.quant_type, "compress_statistics": True}
            module.weight = bnb.nn.Params4bit(
                values, requires_grad=False, blocksize=block, **settings
            ).to("cpu")


def module_weights(model):
    """Weights [out, in] of all quantized modules by name, dequantized by bitsandbytes."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, bnb.nn.Linear4bit):
            found[name] = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            found[name] = bnb.functional.int8_vectorwise_dequant(weight.CB, weight.SCB)
    return {name: value.float().numpy() for name, value in found.items()}


def layer_of(leaf, tensor):
    if tensor.layer is None:
        return leaf
    return jax.tree.map(lambda x: x[tensor.layer], leaf)


def test_bytes_match_the_file_and_weights_match_bitsandbytes(saved):
    bnb_model, folder, model, params = saved
    file, weights = load_file(folder / "model.safetensors"), module_weights(bnb_model)
    for tensor in checkpoint_tensors(model):
        leaf = paths.get(params, tensor.path)
        module = tensor.name.removesuffix(".weight")
        assert is_quantized(leaf) == (module in weights), tensor.name
        if not is_quantized(leaf):
            continue
        layer = layer_of(leaf, tensor)
        if isinstance(layer, NF4Array):
            parts = {"": layer.codes, ".absmax": layer.absmax}
            if f"{tensor.name}.nested_absmax" in file:
                parts[".nested_absmax"] = layer.nested_absmax
            stored = {part: file[tensor.name + part] for part in parts}
            offset = bnb_model.get_submodule(module).weight.quant_state.offset
            assert offset is None or float(layer.nested_offset) == offset.item()
        else:
            parts = {"": layer.codes, "SCB": layer.absmax}
            stored = {"": file[tensor.name], "SCB": file[f"{module}.SCB"]}
        for part, value in parts.items():
            assert np.asarray(value).tobytes() == stored[part].tobytes(), (tensor.name, part)
        values = np.asarray(layer.dequantize())
        np.testing.assert_array_equal(values.T, weights.pop(module), err_msg=tensor.name)
    assert not weights


def test_logits_match_bitsandbytes(saved):
    """The tolerance covers sums of at most 128 float32 products in another order.

    In 8 bits bitsandbytes also rounds activations, which jlora does not: there the reference is
    the dense model with bitsandbytes' dequantized weights.
    """
    bnb_model, _, model, params = saved
    reference = bnb_model.train()  # in evaluation its forward pass rearranges the codes in place
    if bnb_model.config.quantization_config.load_in_8bit:
        reference = transformers.AutoModelForCausalLM.from_config(
            bnb_model.config, dtype=torch.float32, attn_implementation="eager"
        ).train()
        state = {k: v for k, v in bnb_model.state_dict().items() if v.is_floating_point()}
        for name, value in module_weights(bnb_model).items():
            transposed = reference.get_submodule(name).weight.shape != value.shape
            transposed |= "Conv1D" in type(reference.get_submodule(name)).__name__
            state[f"{name}.weight"] = torch.tensor(value.T if transposed else value)
        reference.load_state_dict({k: v for k, v in state.items() if not k.endswith(".SCB")})
    want = reference(input_ids=torch.tensor(IDS).long()).logits.detach().float().numpy()
    got = jax.jit(model, compiler_options=FAST)(params, jnp.asarray(IDS))
    assert_close(got, want, 1e-5)
