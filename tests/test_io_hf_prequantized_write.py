"""The quantized folder, key by key, compared with the format; transformers is not needed."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import build

import jlora
from jlora.config import MeshConfig, QuantConfig
from jlora.distributed import sharding
from jlora.errors import ConfigError
from jlora.io.hf import save_pretrained
from jlora.io.hf.prequantized_write import quantization_config, quantized_tensors
from jlora.quant import int8, nf4
from jlora.quant import params as quantization
from jlora.quant.codebooks import DYNAMIC_MAP, FP4, NF4

PLAIN = {"bnb_4bit_use_double_quant": False}
Q = "model.layers.1.self_attn.q_proj"


@functools.cache
def quantized(name="llama", **fields):
    """A tiny model and its parameters, quantized."""
    model, params = build(name)
    return model, quantization.quantize_params(params, QuantConfig(**fields))


def shapes(name="llama", dtype="float32", **fields):
    """A quantized model and its parameters' shapes, without arrays."""
    model, params = build(name, dtype)
    config = QuantConfig(**fields)
    return model, jax.eval_shape(lambda p: quantization.quantize_params(p, config), params)


def written(folder, model, params, **options):
    """The tensors of all shards and the config of the folder just written."""
    files = save_pretrained(folder, model, params, quantized=True, **options)
    tensors = {}
    for file in files:
        tensors |= load_file(file) if file.suffix == ".safetensors" else {}
    return tensors, json.loads((folder / "config.json").read_text())


def matrix():
    """[2, 64]: one block of 2 and -2, and one of zeros."""
    return jnp.stack([jnp.tile(jnp.array([2.0, -2.0]), 32), jnp.zeros(64)])


def on_host(leaf):
    return jax.tree.map(np.asarray, leaf)


def assert_tensors(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert (got[name].shape, got[name].dtype) == (value.shape, value.dtype), name
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_four_bits_have_codes_scales_tables_and_a_text():
    state = b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [2, 64]}'
    want = {
        "m.weight": np.array([[0xF0]] * 32 + [[0x77]] * 32, np.uint8),  # codes 15, 0 and 7, 7
        "m.weight.absmax": np.array([2, 0], np.float32),
        "m.weight.quant_map": NF4,
        "m.weight.quant_state.bitsandbytes__nf4": np.frombuffer(state, np.uint8),
    }
    assert_tensors(
        quantized_tensors("m", on_host(nf4.quantize(matrix(), double_quant=False))), want
    )


def test_double_quantization_has_a_second_level():
    state = (
        b'{"quant_type": "fp4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 64], '
        b'"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 1.0}'
    )
    want = {
        "m.weight": np.array([[0x3B]] * 32 + [[0x00]] * 32, np.uint8),
        "m.weight.absmax": np.array([255, 0], np.uint8),  # 2 and 0, minus their mean
        "m.weight.quant_map": FP4,
        "m.weight.nested_absmax": np.array([1], np.float32),
        "m.weight.nested_quant_map": DYNAMIC_MAP,
        "m.weight.quant_state.bitsandbytes__fp4": np.frombuffer(state, np.uint8),
    }
    leaf = nf4.quantize(matrix().astype(jnp.bfloat16), quant_type="fp4")
    assert_tensors(quantized_tensors("m", on_host(leaf)), want)


def test_eight_bits_have_codes_scales_and_the_rows_order():
    want = {
        "m.weight": np.array([[127, -127] * 32, [0] * 64], np.int8),
        "m.SCB": np.array([2, 0], np.float32),
        "m.weight_format": np.zeros((), np.uint8),
    }
    assert_tensors(quantized_tensors("m", on_host(int8.quantize(matrix()))), want)


@pytest.mark.parametrize(
    ("name", "module", "shape"),
    [
        ("llama", "model.layers.{}.self_attn.k_proj", (16, 32)),
        ("llama", "model.layers.{}.mlp.down_proj", (32, 48)),
        ("gpt2", "transformer.h.{}.mlp.c_fc", (128, 32)),  # the dense kernel is [32, 128]
    ],
)
def test_each_layer_of_a_stack_is_written_as_one_matrix(tmp_path, name, module, shape):
    model, params = quantized(name)
    tensors, _ = written(tmp_path, model, params)
    *nodes, last = module.replace(".{}", "").split(".")
    dense = build(name)[1]
    for node in (*nodes, last, "kernel"):
        dense = dense[node]
    for i in range(2):
        want = quantized_tensors(module.format(i), on_host(nf4.quantize(dense[i].T)))
        assert_tensors({k: v for k, v in tensors.items() if k in want}, want)
        text = bytes(tensors[f"{module.format(i)}.weight.quant_state.bitsandbytes__nf4"])
        assert json.loads(text)["shape"] == list(shape)


def test_the_rest_of_the_folder_is_as_without_quantization(tmp_path):
    model, params = quantized()
    tensors, config = written(tmp_path / "quantized", model, params)
    save_pretrained(tmp_path / "dense", model, params)
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    unquantized = {name: value for name, value in dense.items() if "_proj" not in name}
    assert_tensors({k: v for k, v in tensors.items() if "_proj" not in k}, unquantized)
    assert config.pop("quantization_config") == quantization_config(model, params)
    assert config == json.loads((tmp_path / "dense" / "config.json").read_text())


BITSANDBYTES = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": ["lm_head"],
    "llm_int8_threshold": 6.0,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}
EIGHT = {
    "_load_in_4bit": False,
    "_load_in_8bit": True,
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "load_in_4bit": False,
    "load_in_8bit": True,
}
DOWN = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]


@pytest.mark.parametrize(
    ("name", "fields", "want"),
    [
        ("llama", {}, {}),
        ("llama", PLAIN, {"bnb_4bit_use_double_quant": False}),
        ("llama", {"bnb_4bit_quant_type": "fp4"}, {"bnb_4bit_quant_type": "fp4"}),
        ("llama", {"load_in_8bit": True}, EIGHT),
        ("llama", {"block_size": 32}, {}),  # recorded in the quant state, not in BitsAndBytesConfig
        ("llama", {"include_modules": ["lm_head"]}, {"llm_int8_skip_modules": []}),
        (
            "llama",
            {"llm_int8_skip_modules": ["down_proj"]},
            {"llm_int8_skip_modules": [*DOWN, "lm_head"]},
        ),
        ("llama-rope", {}, {}),  # tied, but transformers has a linear head nevertheless
        ("gpt2", {}, {}),
    ],
)
def test_config_json_says_what_is_quantized_and_how(name, fields, want):
    got = quantization_config(*shapes(name, **fields))
    got["llm_int8_skip_modules"].sort(key=lambda module: (module == "lm_head", module))
    assert got == BITSANDBYTES | want


def test_the_compute_dtype_is_the_models():
    config = quantization_config(*shapes(dtype="bfloat16"))
    assert config["bnb_4bit_compute_dtype"] == "bfloat16"


def test_shards_keep_a_matrix_together_and_their_size(tmp_path):
    model, params = quantized()
    tensors, _ = written(tmp_path / "one", model, params)
    limit = 12_000
    files = save_pretrained(tmp_path, model, params, max_shard_size=limit, quantized=True)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    shards = [load_file(file) for file in files if file.suffix == ".safetensors"]
    assert len(shards) > 2
    assert all(sum(v.nbytes for v in s.values()) <= limit or len(s) == 1 for s in shards)
    assert_tensors({name: value for shard in shards for name, value in shard.items()}, tensors)
    parts = {file for name, file in index["weight_map"].items() if name.startswith(f"{Q}.")}
    assert len(parts) == 1


@pytest.mark.parametrize("fields", [{}, {"load_in_8bit": True}])
def test_sharded_leaves_are_written_in_full(tmp_path, fields):
    model, params = quantized(**fields)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    placed = sharding.place(params, sharding.shardings(params, mesh))
    got, _ = written(tmp_path / "placed", model, placed)
    assert_tensors(got, written(tmp_path / "whole", model, params)[0])


def replaced(params, leaf):
    """The tree with ``leaf`` as q_proj's kernel."""
    layers = params["model"]["layers"]
    attention = layers["self_attn"] | {"q_proj": {"kernel": leaf}}
    model = params["model"] | {"layers": layers | {"self_attn": attention}}
    return params | {"model": model}


def kernel(params):
    return params["model"]["layers"]["self_attn"]["q_proj"]["kernel"]


def along_the_inputs(params):
    leaf = jax.eval_shape(jax.vmap(nf4.quantize), kernel(build("llama")[1]))
    return replaced(params, leaf)


def in_two_formats(params):
    return replaced(params, kernel(shapes(load_in_8bit=True)[1]))


def adapted(params):
    config = jlora.LoraConfig(target_modules=["q_proj"])
    return jlora.attach(params, jlora.init_adapter(jax.random.key(0), params, config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (along_the_inputs, r"self_attn\.q_proj: quantized as \(in, out\)"),
        (in_two_formats, "one quantization format"),
        (adapted, r"self_attn\.q_proj: layers with an adapter"),
        (lambda _: build("llama")[1], "no parameter is quantized"),
        (
            lambda _: shapes(include_modules=["embed_tokens"])[1],
            r"model\.embed_tokens: transformers cannot load a quantized embedding",
        ),
    ],
)
def test_what_transformers_cannot_load_is_refused(tmp_path, change, message):
    model, params = shapes()
    with pytest.raises(ConfigError, match=message):
        save_pretrained(tmp_path, model, change(params), quantized=True)
    assert not list(tmp_path.iterdir())
