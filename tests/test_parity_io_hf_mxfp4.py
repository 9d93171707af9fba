"""MXFP4 compared with transformers: decoded values, and the logits of a model folder."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import LENGTH, build, run, tokens

import jlora
from jlora.io.hf.mxfp4 import decode

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def test_decoded_values_match_transformers():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 6, 4, 16), dtype=np.uint8)
    scales = rng.integers(100, 150, (3, 6, 4), dtype=np.uint8)
    want = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
    got = np.stack([decode(*parts) for parts in zip(blocks, scales, strict=True)])
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got.astype(np.float32), want.float().numpy())


def test_logits_of_an_mxfp4_folder_match_transformers(tmp_path):
    model, params = build("gpt_oss")
    *_, config = jlora.save_pretrained(tmp_path, model, params)
    tensors = load_file(tmp_path / "model.safetensors")
    rng = np.random.default_rng(0)
    for name in [key for key in tensors if key.endswith(("experts.gate_up_proj", "down_proj"))]:
        experts, width, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = rng.integers(0, 256, (experts, rows, width // 32, 16), np.uint8)
        tensors[f"{name}_scales"] = rng.integers(122, 125, (experts, rows, width // 32), np.uint8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    hf = json.loads(config.read_text())
    hf["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    config.write_text(json.dumps(hf))

    mxfp4_config = transformers.Mxfp4Config(dequantize=True)
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager", quantization_config=mxfp4_config
    )
    model, params = jlora.load_pretrained(tmp_path, dtype="float32")
    ids = tokens(model, 2, LENGTH)
    with torch.no_grad():
        want = torch_model.eval().float()(torch.tensor(ids)).logits.numpy()
    got = run(model, params, ids)
    assert np.abs(want).max() > 1
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()

    jlora.save_pretrained(tmp_path / "dense", model, params)
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        np.testing.assert_array_equal(reloaded.eval()(torch.tensor(ids)).logits.numpy(), want)
