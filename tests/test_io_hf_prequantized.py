"""Prequantized folders: what is read and refused, and what the commands do with them."""

import importlib
import json
import re
import shutil
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_results
from safetensors.numpy import load_file, save_file
from tiny_models import build, tokens
from tiny_quantized import as_bytes, parts, quantize_folder
from tiny_runs import DENSE, Place

import jlora
from jlora.config import LoraConfig, MeshConfig, QuantConfig
from jlora.distributed import sharding
from jlora.errors import ConfigError, DataError
from jlora.io import peft as adapter_io
from jlora.io.hf import folder as hf_folder
from jlora.io.hf import load_pretrained, save_pretrained
from jlora.io.hf.names import checkpoint_tensors
from jlora.quant.codebooks import DYNAMIC_MAP
from jlora.quant.nf4 import quantize
from jlora.quant.params import is_quantized
from jlora.tree import paths

NF4 = QuantConfig(block_size=32)
UP = "model.layers.1.mlp.up_proj.weight"
STATE = f"{UP}.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A quantized llama folder, which tests must not change, and its parameters."""
    folder = tmp_path_factory.mktemp("made") / "m"
    save_pretrained(folder, *build("llama"))
    return folder, quantize_folder(folder, NF4)


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the quantized folder."""
    return shutil.copytree(made[0], tmp_path / "m")


def edit(folder, change):
    """Applies ``change(tensors)`` to ``model.safetensors``."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def fault(folder) -> str:
    with pytest.raises(DataError) as caught:
        load_pretrained(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", QuantConfig()),  # rows of half a block
        pytest.param(
            "llama",
            QuantConfig(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False),
            marks=pytest.mark.slow,
        ),
        ("llama", QuantConfig(load_in_8bit=True, llm_int8_skip_modules=("o_proj",))),
        pytest.param(
            "llama",
            QuantConfig(include_modules=("lm_head", "embed_tokens")),
            marks=pytest.mark.slow,
        ),
        ("gpt2", QuantConfig(block_size=32)),
    ],
)
def test_a_prequantized_folder_is_read_without_loss(tmp_path, name, config):
    save_pretrained(tmp_path, *build(name))
    want = quantize_folder(tmp_path, config, dtype="bfloat16")
    read = load_pretrained(tmp_path, dtype="bfloat16")[1]
    same(read, want)
    same(load_pretrained(tmp_path, dtype="bfloat16", quantization=config)[1], want)
    assert sum(map(is_quantized, dict(paths.walk(read)).values())) >= 4


def test_checkpoints_of_the_base_model_alone_are_read(folder, made):
    edit(folder, lambda t: [t.update({k.removeprefix("model."): t.pop(k)}) for k in list(t)])
    same(load_pretrained(folder, dtype="float32")[1], made[1])


def test_quantized_tensors_and_the_configuration_must_agree(folder):
    hf = json.loads((folder / "config.json").read_text())
    del hf["quantization_config"]
    (folder / "config.json").write_text(json.dumps(hf))
    assert "up_proj.weight.absmax is not part of this model (2×)" in fault(folder)
    plain = folder.parent / "plain"
    save_pretrained(plain, *build("llama"))
    hf["quantization_config"] = {"load_in_8bit": True}
    (plain / "config.json").write_text(json.dumps(hf))
    assert "quantization_config is in config.json, but no tensor is quantized" in fault(plain)


def test_all_faults_are_listed_at_once(folder, monkeypatch):
    other = "model.layers.{}.mlp.down_proj.weight"
    gate = "model.layers.0.mlp.gate_proj.weight"

    def spoil(t):
        for i in range(2):
            del t[f"{other.format(i)}.quant_map"]
        t[f"{UP}.absmax"] = t[f"{UP}.absmax"][:-1]
        t[f"{UP}.nested_absmax"] = t[f"{UP}.nested_absmax"].astype(np.float16)
        t[f"{UP}.extra_map"] = np.zeros(2, np.float32)
        t[UP] = t[UP][1:]
        del t[f"{gate}.quant_state.bitsandbytes__nf4"]
        t["model.norm.weight.absmax"] = np.zeros(2, np.float32)
        t["model.layers.0.extra.SCB"] = np.zeros(2, np.float32)
        del t["model.layers.0.self_attn.q_proj.weight"]

    edit(folder, spoil)
    seen = []
    monkeypatch.setattr(hf_folder.Shards, "read", spy(seen.append))
    text = fault(folder)
    for line in (
        "model.layers.*.mlp.down_proj.weight.quant_map is missing (2×)",
        f"{UP}.absmax has shape [47], expected [48]",
        f"{UP}.nested_absmax is of type F16, expected F32",
        f"{UP}.extra_map is not part of this model",
        f"{UP} holds 767 bytes, expected 768",
        f"{gate}.quant_state.bitsandbytes__nf4 is missing",
        "model.norm.weight.absmax is not part of this model",
        "model.layers.0.extra.SCB is not part of this model",
        "model.layers.0.self_attn.q_proj.weight is missing",
    ):
        assert f"\n  {line}" in text, line
    assert max(value.nbytes for value in seen) <= 1024  # only tables and JSON texts


def spy(see, original=hf_folder.Shards.read):
    def read(self, name):
        value = original(self, name)
        see(value)
        return value

    return read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [48, 64]}, r"says shape \[48, 64\], expected \[48, 32\]"),
        ({"shape": [10**30, 10**30]}, r"says shape \[1000.*expected \[48, 32\]"),
        ({"blocksize": 64}, "absmax has shape"),
        ({"blocksize": 48}, "says blocksize 48, which is not valid"),
        ({"blocksize": 32.0}, "says blocksize 32.0"),
        ({"blocksize": [32]}, r"says blocksize \[32\]"),
        ({"quant_type": "fp4"}, 'says quant_type "fp4"'),
        ({"nested_blocksize": 0}, "says nested_blocksize 0"),
        ({"nested_offset": float("nan")}, "says nested_offset NaN"),
        ({"nested_offset": 10**400}, "says nested_offset 1000"),
        ({"nested_offset": None}, "says nested_offset null"),
        ({"nested_dtype": "float16"}, 'says nested_dtype "float16"'),
    ],
)
def test_the_values_of_a_quant_state_are_checked(folder, changes, message):
    def change(t):
        t[STATE] = as_bytes(json.loads(t[STATE].tobytes()) | changes)

    edit(folder, change)
    with pytest.raises(DataError, match=f"layers.1.mlp.up_proj.*{message}"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (as_bytes([1]), "does not hold a JSON object"),
        (np.full(4000, ord("["), np.uint8), "does not hold a JSON object"),
        (np.full(40, 255, np.uint8), "does not hold a JSON object"),
        (np.zeros(5000, np.uint8), r"is U8 \[5000\], expected the bytes of a short text"),
        (np.zeros(10, np.float32), r"is F32 \[10\], expected the bytes of a short text"),
    ],
)
def test_an_invalid_quant_state_is_refused(folder, value, message):
    edit(folder, lambda t: t.update({STATE: value}))
    with pytest.raises(DataError, match=f"{STATE} {message}"):
        load_pretrained(folder)


def test_another_four_bit_code_is_refused(folder):
    edit(folder, lambda t: t.update({f"{UP}.quant_map": np.linspace(-1, 1, 16, dtype="f4")}))
    assert f"{UP}.quant_map is not bitsandbytes' table of nf4" in fault(folder)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("weight_format", np.uint8(2), "is 2: only 0, row after row, is supported"),
        ("SCB", np.zeros(3, np.float32), r"has shape \[3\], expected \[48\]"),
        ("SCB", None, "is missing"),
        ("weight.absmax", np.zeros(3, np.float32), "is not part of this model"),
        ("weight", np.zeros((32, 48), np.int8), r"has shape \[32, 48\], expected \[48, 32\]"),
    ],
)
def test_faults_in_eight_bits(tmp_path, part, value, message):
    save_pretrained(tmp_path, *build("llama"))
    quantize_folder(tmp_path, QuantConfig(load_in_8bit=True))
    name = UP.replace("weight", part)
    edit(tmp_path, lambda t: t.pop(name) if value is None else t.update({name: np.asarray(value)}))
    assert f"\n  {name} " in (text := fault(tmp_path))
    assert re.search(message, text)


@pytest.mark.parametrize("nested_block", [256, 20])
def test_foreign_double_quantization_is_undone(folder, made, nested_block):
    """One layer with other constants leaves no layer with 8-bit scales. NumPy rounds both steps."""
    table = DYNAMIC_MAP if nested_block == 20 else np.linspace(-1, 1, 256, dtype=np.float32)
    scale = np.array([0.25, 0.5, 0.125], np.float32)[: -(-48 // nested_block)]

    def change(t):
        t[f"{UP}.nested_quant_map"], t[f"{UP}.nested_absmax"] = table, scale
        state = json.loads(t[STATE].tobytes()) | {"nested_blocksize": nested_block}
        t[STATE] = as_bytes(state)

    edit(folder, change)
    leaf = load_pretrained(folder, dtype="float32", quantization=NF4)[1]["model"]["layers"]
    leaf, before = leaf["mlp"]["up_proj"]["kernel"], made[1]["model"]["layers"]
    before = before["mlp"]["up_proj"]["kernel"]
    assert leaf.nested_absmax is None and leaf.nested_offset is None
    codes, offset = np.asarray(before.absmax), np.asarray(before.nested_offset)
    first = DYNAMIC_MAP[codes[0]] * np.asarray(before.nested_absmax)[0, 0] + offset[0]
    spread = np.repeat(scale, nested_block)[:48].reshape(codes[1].shape)
    want = np.stack([first, table[codes[1]] * spread + offset[1]])
    assert want.dtype == np.float32 == leaf.absmax.dtype
    np.testing.assert_array_equal(leaf.absmax, want)
    np.testing.assert_array_equal(leaf.codes, before.codes)
    np.testing.assert_array_equal(leaf.dequantize()[0], before.dequantize()[0])


def remove(t, weight):
    for name in [n for n in t if n == weight or n.startswith(f"{weight}.")]:
        del t[name]


def test_layers_quantized_in_different_formats_are_refused(folder):
    quantized = parts(
        UP, jax.tree.map(np.array, quantize(jnp.ones((48, 32)), 32, quant_type="fp4"))
    )

    def change(t):
        remove(t, UP)
        t.update(quantized)

    edit(folder, change)
    text = fault(folder)
    assert f"{UP} is fp4 with double quantization, blocks of 32" in text
    assert "but model.layers.0.mlp.up_proj.weight is nf4 with" in text
    assert "all layers must be quantized alike" in text


def by_name(model, params):
    """The tensors of a file, dense, by name."""
    dense = paths.map_leaves(lambda _, x: x.dequantize() if is_quantized(x) else x, params)
    return {
        t.name: np.asarray(paths.get(dense, t.path)[t.index]) for t in checkpoint_tensors(model)
    }


@pytest.fixture
def uneven(folder, made):
    """A folder whose second layer has a dense matrix, and its tensors by name."""
    dense = np.random.default_rng(3).normal(size=(48, 32)).astype(np.float32)

    def change(t):
        remove(t, UP)
        t[UP] = dense

    edit(folder, change)
    want = by_name(build("llama")[0], made[1])
    return folder, {**want, UP: dense.T}


def test_a_matrix_may_be_quantized_in_some_layers_only(uneven, tmp_path):
    """Such layers are not stacked together; nothing else is dequantized, and all is written."""
    folder, want = uneven
    model, params = load_pretrained(folder, dtype="float32")
    layers = params["model"]["layers"]
    assert layers.keys() == {"0-0", "1-1"}
    assert is_quantized(layers["0-0"]["mlp"]["up_proj"]["kernel"])
    assert isinstance(layers["1-1"]["mlp"]["up_proj"]["kernel"], jax.Array)
    assert is_quantized(layers["1-1"]["mlp"]["gate_proj"]["kernel"])
    same(by_name(model, params), want)
    save_pretrained(tmp_path / "quantized", model, params, quantized=True)
    again, again_params = load_pretrained(tmp_path / "quantized", dtype="float32")
    same(again_params, params)
    assert again.config.runs == model.config.runs
    save_pretrained(tmp_path / "dense", model, params)
    uniform, uniform_params = load_pretrained(tmp_path / "dense", dtype="float32")
    same(by_name(uniform, uniform_params), want)
    ids = tokens(model, 2, 12)
    logits = uniform(uniform_params, ids)
    np.testing.assert_allclose(model(params, ids), logits, atol=1e-5 * np.abs(logits).max())


def test_an_adapter_does_not_depend_on_which_layers_are_stacked(uneven, tmp_path):
    """Trained on unevenly quantized layers, it is recognised and used on the dense base."""
    model, params = load_pretrained(uneven[0], dtype="float32")
    save_pretrained(tmp_path / "dense", model, params)
    uniform, uniform_params = load_pretrained(tmp_path / "dense", dtype="float32")
    config = LoraConfig(target_modules=["up_proj", "q_proj"], layers_to_transform=[1])
    adapter = jlora.init_adapter(jax.random.key(0), params, config)
    adapter.weights["model"]["layers"]["1-1"]["mlp"]["up_proj"]["lora_B"] += 0.1
    record = adapter_io.base_record(params, adapter.config)
    jlora.save_adapter(tmp_path / "adapter", adapter, record)
    loaded = jlora.load_adapter(tmp_path / "adapter", uniform_params)
    ids = tokens(model, 2, 12)
    want = uniform(jlora.attach(uniform_params, loaded), ids)
    got = model(jlora.attach(params, adapter), ids)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    assert np.abs(want - uniform(uniform_params, ids)).max() > 0.1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (QuantConfig(), "nf4 with double quantization, blocks of 64, but .* blocks of 32"),
        (QuantConfig(block_size=32, bnb_4bit_quant_type="fp4"), "fp4 with .* it is nf4 with"),
        (QuantConfig(block_size=32, bnb_4bit_use_double_quant=False), "nf4, blocks of 32, but"),
        (QuantConfig(load_in_8bit=True), "int8, but .* it is nf4 with"),
        (
            QuantConfig(block_size=32, llm_int8_skip_modules=("up_proj",)),
            "up_proj.weight not quantized, but .* it is nf4",
        ),
        (
            QuantConfig(block_size=32, include_modules=("lm_head",)),
            "lm_head.weight nf4 .* it is not quantized",
        ),
    ],
)
def test_a_section_that_contradicts_the_folder_is_refused(made, asked, message):
    with pytest.raises(ConfigError, match=f"quantization: asks for .*{message}") as caught:
        load_pretrained(made[0], quantization=asked)
    assert "leave the section out" in str(caught.value)


def test_other_ways_to_quantize_are_refused(folder):
    hf = json.loads((folder / "config.json").read_text())
    hf["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ConfigError, match=r"quantization_config: .*already quantized, by 'gptq'"):
        load_pretrained(folder)


def test_quantized_parameters_are_placed_on_a_mesh(made):
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model, placed = load_pretrained(made[0], "float32", mesh=mesh)
    same(placed, made[1])
    want = jax.tree.leaves(sharding.shardings(made[1], mesh))
    assert [leaf.sharding for leaf in jax.tree.leaves(placed)] == want
    kernel = placed["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert not kernel.codes.sharding.is_fully_replicated
    ids = tokens(model, 2, 8)
    np.testing.assert_allclose(model(placed, ids), model(made[1], ids), atol=1e-5)


def test_one_dense_matrix_at_a_time_is_in_memory_while_quantizing(tmp_path, monkeypatch):
    save_pretrained(
        tmp_path, *build("gpt2", "bfloat16")
    )  # without a cast: the tensor that is read is the one quantized
    live, counts = [], []

    def see(value):
        live[:] = [ref for ref in live if ref() is not None]
        live.append(weakref.ref(value))
        counts.append(len(live))

    monkeypatch.setattr(hf_folder.Shards, "read", spy(see))
    load_pretrained(tmp_path, dtype="bfloat16", quantization=NF4)
    assert len(counts) > 20 and max(counts) == 1


def test_saving_writes_dense_weights_and_no_quantization_config(made, tmp_path):
    model, params = load_pretrained(made[0], dtype="float32")
    save_pretrained(tmp_path, model, params)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    dense = paths.map_leaves(lambda _, x: x.dequantize() if is_quantized(x) else x, params)
    same(load_pretrained(tmp_path, dtype="float32")[1], dense)


@pytest.fixture
def quantized_base(place, tmp_path, request):
    """A place whose base is quantized as settings would quantize the other place's."""
    base = shutil.copytree(place.base, tmp_path / "quantized")
    quantize_folder(base, getattr(request, "param", QuantConfig()))
    other = Place(tmp_path / "other", base, place.cache)
    other.folder.mkdir()
    return other


@pytest.mark.parametrize(
    "quantized_base", [QuantConfig(llm_int8_skip_modules=DENSE)], indirect=True, ids=["in part"]
)
def test_training_on_a_prequantized_folder_equals_quantizing_at_load(place, quantized_base, capsys):
    train = {"max_steps": 2, "logging_steps": 1, "optim": "sgd", "learning_rate": 1.0}
    settings = {"bnb_4bit_compute_dtype": "float32", "llm_int8_skip_modules": DENSE}
    for where, sections in ((place, {"quantization": settings}), (quantized_base, {})):
        where.settings_for_loss()
        where.run(train=train, **sections)
    shown = capsys.readouterr().out
    assert shown.count("QLoRA") == 2 and shown.count("the base model is already quantized") == 1
    assert quantized_base.losses() == place.losses() and len(place.losses()) == 2
    assert quantized_base.adapter() == place.adapter()


def test_a_prequantized_base_is_not_trained_in_full(quantized_base):
    with pytest.raises(ConfigError, match="cannot be trained in full"):
        quantized_base.run(lora=None)


@pytest.mark.slow
def test_a_prequantized_base_has_no_original_to_merge_into(quantized_base, result):
    quantized_base.output = result.output
    merge = importlib.import_module("jlora.merge")
    out = {"output_dir": str(quantized_base.folder / "merged")}
    with pytest.raises(ConfigError, match=r"merge.base: the base model is already quantized"):
        tiny_results.run(quantized_base, merge, merge={"base": "original", **out})
    tiny_results.run(quantized_base, merge, merge=out, train={"bf16": False})
    model, params = load_pretrained(out["output_dir"], dtype="float32")
    place = Place(quantized_base.folder, result.base, result.cache)
    place.output = result.output
    want = tiny_results.logits(*tiny_results.trained(place, quantized=True))
    np.testing.assert_allclose(tiny_results.logits(model, params), want, atol=1e-4)
