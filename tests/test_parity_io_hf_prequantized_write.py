"""Quantized folders: transformers loads them with bitsandbytes, and itself writes the same."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import CONFIGS, tokens
from tiny_peers import PEERS_TALK, load_torch

import jlora
from jlora.io.hf import save_pretrained
from jlora.models import Model, init_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytestmark = PEERS_TALK

# bitsandbytes' CPU kernels require rows whose length is a multiple of the block size.
SIZES = {"llama": {"hidden_size": 64, "intermediate_size": 128}, "gpt2": {"n_embd": 64}}
FORMATS = {
    "NF4+DQ": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "FP4": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "int8": {"load_in_8bit": True},
}
EXTRA_FORMATS = {
    "blocks of 32": {"block_size": 32},
    "quantized head": {"include_modules": ["lm_head"]},
    "quantized head, int8": {"include_modules": ["lm_head"], "load_in_8bit": True},
    "some layers left out": {"llm_int8_skip_modules": ["down_proj", "q_proj"]},
}
CASES = [(name, form) for name in SIZES for form in FORMATS] + [
    ("llama", form) for form in EXTRA_FORMATS
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Name → a folder of random weights, exact in float16, to which bitsandbytes' int8 rounds."""
    folders = {}
    for name, sizes in SIZES.items():
        hf = {**CONFIGS[name], **sizes, "initializer_range": 0.15}
        model = Model.from_config(hf, "float32")
        params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), model)
        params = jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), params)
        folders[name] = tmp_path_factory.mktemp(name)
        save_pretrained(folders[name], model, params)
    return folders


@pytest.mark.parametrize(("name", "form"), CASES)
def test_transformers_loads_the_folder_and_computes_the_same_logits(dense, tmp_path, name, form):
    config = jlora.QuantConfig(**(FORMATS | EXTRA_FORMATS)[form])
    model, params = jlora.load_pretrained(dense[name], "float32", quantization=config)
    save_pretrained(tmp_path, model, params, max_shard_size="30KB", quantized=True)
    # In evaluation mode Linear4bit would rearrange its codes in place.
    torch_model = load_torch(tmp_path).train()
    for module in torch_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = tokens(model, 2, 24)
    got = np.asarray(model(params, ids))
    with torch.no_grad():
        want = torch_model(torch.tensor(ids)).logits.numpy()
    assert np.abs(want).max() > 1
    # float32 sums have another order, and a double-quantized scale may differ in its last bit.
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
    kinds = {type(module).__name__ for module in torch_model.modules()}
    assert ("Linear8bitLt" if config.load_in_8bit else "Linear4bit") in kinds
    quantized_head = "lm_head" in config.include_modules
    assert (type(torch_model.lm_head) is torch.nn.Linear) is not quantized_head


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("form", FORMATS)
def test_the_folder_matches_what_transformers_writes(dense, tmp_path, name, form):
    fields = FORMATS[form]
    torch_model = load_torch(
        dense[name],
        quantization_config=transformers.BitsAndBytesConfig(
            **fields, load_in_4bit="load_in_8bit" not in fields
        ),
    )
    torch_model.save_pretrained(tmp_path / "transformers")
    config = jlora.QuantConfig(**fields)
    model, params = jlora.load_pretrained(dense[name], "float32", quantization=config)
    save_pretrained(tmp_path / "jlora", model, params, quantized=True)
    written, want = (
        load_file(tmp_path / f / "model.safetensors") for f in ("jlora", "transformers")
    )
    assert written.keys() == want.keys()
    errors = []
    for key, value in want.items():
        got = written[key]
        assert (got.shape, got.dtype) == (value.shape, value.dtype), key
        if value.dtype == np.uint8 and key.endswith(".absmax"):
            errors.append(np.abs(got.astype(int) - value))
        elif ".nested_absmax" in key:  # depends on the offset
            assert np.abs(got - value).max() <= 2 * np.spacing(np.float32(1)), key
        elif ".quant_state." in key:
            assert_same_state(bytes(got), bytes(value))
        else:
            assert got.tobytes() == value.tobytes(), key
    if fields.get("bnb_4bit_use_double_quant"):
        # bitsandbytes' CPU kernel looks up the codes of absmax in a table of 65,536 entries, which
        # does not always give the nearest.
        errors = np.concatenate(errors)
        assert errors.max() <= 3 and np.mean(errors > 0) < 0.005 and errors.size > 1000
    got, want = (
        json.loads((tmp_path / f / "config.json").read_text())["quantization_config"]
        for f in ("jlora", "transformers")
    )
    assert got.pop("llm_int8_skip_modules") == ["lm_head"]  # transformers infers it when absent
    assert want.pop("llm_int8_skip_modules") is None
    assert got == want


def assert_same_state(got: bytes, want: bytes) -> None:
    """Equal, except for the last bit of the offset, which depends on the number of threads."""
    offsets = [json.loads(text).get("nested_offset", 0.0) for text in (got, want)]
    a, b = map(np.float32, offsets)
    assert abs(a - b) <= np.spacing(b)
    assert got == want.replace(repr(offsets[1]).encode(), repr(offsets[0]).encode())
