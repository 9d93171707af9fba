"""A complete training run compared with a torch loop over peft, which then loads the adapter."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny_tokenizer

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import jax  # noqa: E402

import jlora  # noqa: E402
from jlora import config as settings  # noqa: E402
from jlora import data  # noqa: E402
from jlora.run.open_tokenizer import open_tokenizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries warn about each other
STEPS = 20

TEXT = """
model: {{name_or_path: {model}, dtype: float32}}
lora: {{r: 8, lora_alpha: 16, target_modules: {targets}, init_from: {init}}}
data:
  train: [{{path: {rows}, format: prompt_completion}}]
  max_length: 64
  packing: false
  shuffle: false
train:
  output_dir: {out}
  max_steps: {steps}
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 2
  learning_rate: 2.0e-3
  lr_scheduler_type: cosine
  warmup_steps: 3
  weight_decay: 0.01
  max_grad_norm: 0.5
  gradient_checkpointing: true
  logging_steps: 1
  save_steps: null
"""


def torch_losses(model, config, batches):
    """The loop of transformers' Trainer: token-weighted accumulation, clipping, AdamW, cosine."""
    t = config.train
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=t.learning_rate, weight_decay=t.weight_decay)
    scheduler = transformers.get_scheduler(
        "cosine", optimizer, num_warmup_steps=t.warmup_steps, num_training_steps=len(batches)
    )
    losses = []
    for batch in batches:
        count = int((batch["labels"] != -100).sum())
        total = 0.0
        for ids, labels, segments in zip(
            batch["input_ids"], batch["labels"], batch["segment_ids"], strict=True
        ):
            mask = torch.tensor(segments != 0).long()
            logits = model(input_ids=torch.tensor(ids).long(), attention_mask=mask).logits
            loss = torch.nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]),
                torch.tensor(labels).long().reshape(-1),
                reduction="sum",
                ignore_index=-100,
            )
            (loss / count).backward()
            total += float(loss) / count
        torch.nn.utils.clip_grad_norm_(weights, t.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize(
    ("name", "targets", "saved"),
    [
        ("stories260k", "all-linear", ["embed_tokens"]),  # the head is tied to it
        ("slm4096-gpt2", "[c_attn, c_proj]", None),
    ],
)
def test_twenty_losses_and_the_adapter_match_peft(tmp_path, assets, name, targets, saved):
    folder, out = assets / "models" / name, tmp_path / "out"
    rows = [
        {"prompt": f"say {w}: ", "completion": f"the word is {w} and not {w[::-1]}"}
        for w in ("one", "two", "three", "lovely", "green", "house", "a", "boat", "stone")
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    modules = "all-linear" if targets == "all-linear" else ["c_attn", "c_proj"]
    fields = {"target_modules": modules, "modules_to_save": saved, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=16, **fields))
    model.save_pretrained(tmp_path / "init")
    file = tmp_path / "config.yaml"
    file.write_text(
        TEXT.format(
            model=folder, targets=targets, init=tmp_path / "init", rows=tmp_path / "rows.json",
            out=out, steps=STEPS,
        )
    )  # fmt: skip
    config = settings.load(file)
    prepared = data.prepare(config.data.train, open_tokenizer(config), config.data)
    order = prepared.order(4, config.train.seed, shuffle=False)
    batches = [data.batch_at(prepared, order, step, 2) for step in range(STEPS)]
    assert any((b["segment_ids"] == 0).all(-1).any() for b in batches), "a batch must be partial"
    # In evaluation mode, since jlora applies no dropout in the base; GPT-2 would in training mode.
    expected = torch_losses(model.eval(), config, batches)

    command = [sys.executable, "-m", "jlora.train", str(file)]
    subprocess.run(command, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == STEPS and losses[-1] < 0.9 * losses[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-4)

    fresh = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(fresh, out).eval()
    ids = np.random.default_rng(0).integers(0, 50, (2, 32))
    with torch.no_grad():
        want = loaded(torch.tensor(ids)).logits.numpy()
    jlora_model, params = jlora.load_pretrained(str(folder), dtype="float32")
    adapter = jlora.load_adapter(out, params)
    got = np.asarray(jax.jit(jlora_model)(jlora.attach(params, adapter), ids.astype(np.int32)))
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize("assistant_only_loss", [True, False])
def test_losses_match_where_tokens_straddle_the_border_of_a_completion(
    tmp_path, assets, assistant_only_loss
):
    """The tokenizer merges over line breaks; the oracle's ids are made here, row by row."""
    steps, base, out = 6, tmp_path / "base", tmp_path / "out"
    base.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(assets / "models" / "stories260k" / name, base)
    tokenizer = tiny_tokenizer.merging_tokenizer()
    tokenizer.save_pretrained(base)
    words = ("hat", "hello", "house", "he said", "hen", "how many", "a", "the boat")
    rows = [{"prompt": f"write {w} t\n", "completion": f"\n{w} and more"} for w in words]
    rows += [{"prompt": f"say {w}\n", "completion": w[::-1]} for w in words[:4]]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    torch.manual_seed(0)
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path / "init")
    file = tmp_path / "config.yaml"
    text = TEXT.format(
        model=base, targets="all-linear", init=tmp_path / "init", rows=tmp_path / "rows.json",
        out=out, steps=steps,
    )  # fmt: skip
    only = str(assistant_only_loss).lower()
    file.write_text(text.replace("  packing", f"  assistant_only_loss: {only}\n  packing"))
    config = settings.load(file)

    def ids_and_labels(row):
        def ids(text):
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        prompt, whole = ids(row["prompt"]), ids(row["prompt"] + row["completion"])
        mid = len(ids("x"))  # "x" is merged with nothing
        found = [*prompt, *ids("x" + row["completion"])[mid:]] if assistant_only_loss else whole
        found.append(tokenizer.eos_token_id)
        learned = [i >= len(prompt) or not assistant_only_loss for i in range(len(found))]
        labels = [t if m else -100 for t, m in zip(found, learned, strict=True)]
        return np.array(found[:-1]), np.array(labels[1:])

    batches = []
    for step in range(steps):
        batch = {k: np.zeros((2, 2, 64), int) for k in ("input_ids", "labels", "segment_ids")}
        batch["labels"] -= 100
        for i in range(4):
            found, labels = ids_and_labels(rows[(4 * step + i) % len(rows)])
            at = (i // 2, i % 2, slice(0, len(found)))
            batch["input_ids"][at], batch["labels"][at] = found, labels
            batch["segment_ids"][at] = 1
        batches.append(batch)
    expected = torch_losses(model.eval(), config, batches)
    command = [sys.executable, "-m", "jlora.train", str(file)]
    subprocess.run(command, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
