"""8-bit moments compared with bitsandbytes on the CPU, and 8-bit AdamW's loss on a real model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_runs import write_rows

torch = pytest.importorskip("torch")
bitsandbytes = pytest.importorskip("bitsandbytes")

from bitsandbytes.backends.cpu import ops  # noqa: E402
from bitsandbytes.functional import create_dynamic_map  # noqa: E402

from jlora.training.optim import eight_bit  # noqa: E402

QUANTIZE = torch.ops.bitsandbytes.quantize_blockwise
DEQUANTIZE = torch.ops.bitsandbytes.dequantize_blockwise


def nearest(values, code, absmax_out, out, blocksize):
    """bitsandbytes' float64 kernel, which finds the nearest code. The float32 kernel reads it from
    a table of 65,536 entries, which is too coarse for small values."""
    codes, absmax = QUANTIZE(values.double(), code, blocksize)
    out.copy_(codes)
    absmax_out.copy_(absmax)


def test_the_code_tables_match_bitsandbytes():
    np.testing.assert_array_equal(eight_bit.UNSIGNED_MAP, create_dynamic_map(signed=False).numpy())
    np.testing.assert_array_equal(eight_bit.DYNAMIC_MAP, create_dynamic_map(signed=True).numpy())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(3, 64, 16), (2, 8, 512), (33, 131), (5000,)])
def test_codes_and_absmax_match_bitsandbytes(shape, signed):
    rng = np.random.default_rng(0)
    tails = np.exp(3 * rng.standard_normal(shape))
    x = (rng.standard_normal(shape) * tails).astype(np.float32)
    x.reshape(-1)[:256] = 0  # a block of zeros
    x = x if signed else np.square(x)
    code = create_dynamic_map(signed=signed)
    codes, absmax = QUANTIZE(torch.tensor(x.astype(np.float64)), code, 256)
    quantized = eight_bit.quantize_blockwise(jnp.asarray(x), signed)
    rounded_away = (codes.numpy() == 0) & (x > 0) if not signed else np.zeros(shape, bool)
    zeros = x.reshape(-1) == 0
    expected = np.where(rounded_away, 1, codes.numpy())
    np.testing.assert_array_equal(
        np.asarray(quantized.codes).reshape(-1)[~zeros], expected.reshape(-1)[~zeros]
    )
    np.testing.assert_array_equal(np.asarray(quantized.absmax).reshape(-1), absmax.numpy())
    want = DEQUANTIZE(torch.tensor(np.asarray(quantized.codes)), absmax, code, 256, torch.float32)
    np.testing.assert_array_equal(eight_bit.dequantize_blockwise(quantized), want.numpy())
    assert not np.asarray(eight_bit.dequantize_blockwise(quantized)).reshape(-1)[:256].any()


@pytest.mark.parametrize(
    ("bnb_optimizer", "core"),
    [
        (bitsandbytes.optim.AdamW8bit, optax.scale_by_adam(0.9, 0.95, 1e-8)),
        (bitsandbytes.optim.Lion8bit, optax.scale_by_lion(0.9, 0.95)),
    ],
    ids=["adamw", "lion"],
)
def test_twenty_steps_match_bitsandbytes(bnb_optimizer, core, monkeypatch):
    monkeypatch.setattr(ops, "_quant_blockwise_fp32_direct", nearest)
    rng = np.random.default_rng(0)
    start = rng.standard_normal((64, 128)).astype(np.float32)
    weight = torch.nn.Parameter(torch.tensor(start))
    reference = bnb_optimizer([weight], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = optax.chain(
        eight_bit.eight_bit(core),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(1e-2),
    )
    params = jnp.asarray(start)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for _ in range(20):
        gradient = rng.standard_normal(start.shape).astype(np.float32)
        weight.grad = torch.tensor(gradient)
        reference.step()
        with jax.numpy_dtype_promotion("standard"):  # optax does not promote strictly
            updates, state = update(jnp.asarray(gradient), state, params)
        params = params + updates
    # A value between two codes may get either, depending on the last bit of a sum; few do.
    close = np.isclose(params, weight.detach().numpy(), rtol=0, atol=2e-6)
    assert close.mean() > 0.999, close.mean()
    codes, bnb_codes = state[0].mu.codes, reference.state[weight]["state1"].numpy()
    differences = np.abs(np.asarray(codes).astype(int) - bnb_codes)
    assert (differences > 0).mean() < 1e-3 and differences.max() <= 1
    assert np.abs(np.asarray(params) - start).mean() > 0.03


@pytest.mark.filterwarnings("ignore")
def test_the_loss_of_8_bit_adamw_follows_that_of_32_bit_on_stories260k(place, assets):
    instructions = json.loads((assets / "data" / "instruction.json").read_text())
    texts = [f"{row['instruction']}\n{row['output']}\n\n" for row in instructions]
    rows = [{"text": text} for text in texts]
    train = write_rows(place.folder / "train.jsonl", rows[:900])
    held_out = write_rows(place.folder / "eval.jsonl", rows[1000:1060])
    sections = {
        "model": {"name_or_path": str(assets / "models" / "stories260k")},
        "lora": {"r": 32, "lora_alpha": 64, "lora_dropout": 0.0},
        "data": {
            "train": [{"path": str(train), "format": "text"}],
            "eval": [{"path": str(held_out), "format": "text"}],
            "max_length": 64,
        },
        "evaluate": {"samples": 0},
    }
    run = {
        "max_steps": 40,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 3e-3,
        "gradient_checkpointing": False,
        "logging_steps": 5,
        "eval_steps": None,
        "save_steps": None,
    }
    logs = {}
    for optim in ("adamw", "adamw_8bit"):
        place.output = place.folder / optim
        place.run(train=run | {"optim": optim, "output_dir": str(place.output)}, **sections)
        logs[optim] = place.log()
    losses = {k: [line["loss"] for line in log if "loss" in line] for k, log in logs.items()}
    held = {k: next(x["eval_loss"] for x in log if "eval_loss" in x) for k, log in logs.items()}
    assert losses["adamw"][-1] < 0.7 * losses["adamw"][0]
    np.testing.assert_allclose(losses["adamw_8bit"], losses["adamw"], rtol=0.01)
    assert held["adamw_8bit"] == pytest.approx(held["adamw"], rel=0.01)
    assert held["adamw_8bit"] != held["adamw"]
