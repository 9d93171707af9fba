"""MXFP4: values by the format's formula, and folders whose tensors do not match."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import build

from jlora.errors import DataError
from jlora.io.hf import load_pretrained, save_pretrained
from jlora.io.hf.mxfp4 import decode

NAME = "model.layers.0.mlp.experts.down_proj"


def value_of(bits):
    """E2M1: sign, exponent with bias 1, one bit of mantissa; exponent 0 is subnormal."""
    sign, exponent, mantissa = bits >> 3, bits >> 1 & 3, bits & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
    return -size if sign else size


def test_values_match_the_format():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 2, 16), dtype=np.uint8)
    scales = np.array([[127, 1], [100, 140], [254, 255]], np.uint8)
    got = np.asarray(decode(blocks, scales), np.float64)
    assert got.shape == (64, 3)
    for row, group in np.ndindex(3, 2):
        for i, byte in enumerate(blocks[row, group]):
            for half, bits in enumerate((int(byte) & 15, int(byte) >> 4)):
                want = value_of(bits) * 2.0 ** (int(scales[row, group]) - 127)
                have = got[32 * group + 2 * i + half, row]
                if scales[row, group] == 255:
                    assert np.isnan(have)
                elif abs(want) >= 2.0**-126 and abs(want) < 2.0**128:
                    assert have == want


@pytest.fixture
def folder(tmp_path):
    """A model's folder, and its tensors with MXFP4 experts, which the test writes there."""
    model, params = build("gpt_oss")
    *_, config = save_pretrained(tmp_path, model, params)
    hf = json.loads(config.read_text())
    config.write_text(json.dumps({**hf, "quantization_config": {"quant_method": "mxfp4"}}))
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [key for key in tensors if key.endswith(("experts.gate_up_proj", "down_proj"))]:
        experts, width, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = np.full((experts, rows, width // 32, 16), 0x21, np.uint8)
        tensors[f"{name}_scales"] = np.full((experts, rows, width // 32), 126, np.uint8)
    return tmp_path, tensors


def test_matrices_are_read_expert_by_expert(folder):
    path, tensors = folder
    tensors[f"{NAME}_scales"][1] = 128
    save_file(tensors, path / "model.safetensors")
    model, params = load_pretrained(path, dtype="float32")
    leaf = params["model"]["layers"]["mlp"]["experts"]["down_proj"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), model.shapes
    )
    pattern = np.tile([0.25, 0.5], 16)
    np.testing.assert_array_equal(leaf[0, 0], np.tile(pattern, (32, 1)))
    np.testing.assert_array_equal(leaf[0, 1], np.tile(4 * pattern, (32, 1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}_scales"), f"{NAME} is missing"),
        (
            lambda t: t.update({f"{NAME}_scales": np.ones((4, 32, 2), np.uint8)}),
            r"_blocks has shape \(4, 32, 1, 16\) and its scales \(4, 32, 2\)",
        ),
        (
            lambda t: t.update({f"{NAME}_scales": np.ones((4, 32, 1), np.float32)}),
            "_blocks is of another type than uint8",
        ),
        (
            lambda t: t.update(
                {f"{NAME}_blocks": np.ones((4, 31, 1, 16), np.uint8)}
                | {f"{NAME}_scales": np.ones((4, 31, 1), np.uint8)}
            ),
            r"down_proj has shape \[4, 32, 31\], expected \[4, 32, 32\]",
        ),
    ],
)
def test_parts_that_do_not_belong_together_are_named(folder, change, message):
    path, tensors = folder
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(DataError, match=message):
        load_pretrained(path)
