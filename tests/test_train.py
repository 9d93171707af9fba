"""Training as the settings say it: what is learned, logged, kept and written."""

import functools
import html
import json
import logging
import math
from unittest import mock

import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load
from tiny_runs import Place

import jlora
from jlora import config, data, train
from jlora.io.peft import to_peft_tensors
from jlora.run import train_step
from jlora.run.open_job import open_job
from jlora.run.open_tokenizer import open_tokenizer
from jlora.tree import paths
from jlora.ui import metrics_log


@pytest.fixture(scope="module")
def epochs(tmp_path_factory, tiny_base, tiny_cache):
    """A finished run of two epochs, whose last batches are partial, and what jax compiled."""
    place = Place(tmp_path_factory.mktemp("epochs"), tiny_base, tiny_cache)
    compiled: list[str] = []

    class Note(logging.Handler):
        def emit(self, record):
            compiled.append(record.getMessage())

    logger, note = logging.getLogger("jax"), Note()
    logger.addHandler(note)
    jax.config.update("jax_log_compiles", True)  # in all threads
    try:
        place.run(train={"max_steps": -1, "num_train_epochs": 2, "save_total_limit": 2})
    finally:
        jax.config.update("jax_log_compiles", False)
        logger.removeHandler(note)
    return place, [line for line in compiled if line.startswith("Compiling jit(")]


def test_a_run_leaves_what_the_contract_names(epochs):
    place, _ = epochs
    left = {path.name for path in place.output.iterdir()}
    assert left >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "config.yaml", "metrics.jsonl", "checkpoints", "report.html",
    }  # fmt: skip
    lines = metrics_log.read_metrics(place.output / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [2, 4, 6, 8, 10]
    names = ["step", "loss", "learning_rate", "grad_norm", "epoch", "tokens", "tokens_per_second"]
    assert list(training[-1]) == names
    held_out = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in held_out] == [4, 8, 10]
    assert list(held_out[0]) == ["step", "eval_loss", "eval_perplexity"]
    assert held_out[0]["eval_perplexity"] == pytest.approx(math.exp(held_out[0]["eval_loss"]))
    assert config.load(place.output).lora == config.load(place.folder / "config.yaml").lora
    peft = json.loads((place.output / "adapter_config.json").read_text())
    assert peft["base_model_name_or_path"] == str(place.base) and peft["r"] == 4
    tokenizer = transformers.AutoTokenizer.from_pretrained(place.output)
    assert "<|im_start|>" in tokenizer.chat_template


def test_the_report_says_what_the_header_said_of_the_rows(epochs):
    place, _ = epochs
    page = (place.output / "report.html").read_text()
    settings = config.load(place.output)
    rows = data.prepare(settings.data.train, open_tokenizer(settings), settings.data)
    assert rows.warnings and "is never learned" in rows.warnings[0]
    assert all(html.escape(text) in page for text in rows.warnings)
    for text in (str(place.rows), str(place.held_out), f"{rows.tokens:,}"):
        assert f'<td class="number">{text}</td>' in page


def test_epochs_end_with_their_last_partial_batch(epochs):
    place, _ = epochs
    settings = config.load(place.output)
    rows = data.prepare(settings.data.train, open_tokenizer(settings), settings.data)
    assert len(rows.packed) % 4 and math.ceil(len(rows.packed) / 4) == 5
    last = [line for line in place.log() if "loss" in line][-1]
    assert (last["step"], last["epoch"], last["tokens"]) == (10, 2.0, 2 * rows.tokens)


def test_only_the_newest_checkpoints_are_kept(epochs):
    assert epochs[0].checkpoints() == [9, 10]


def test_training_and_evaluation_are_compiled_once_each(epochs):
    _, compiled = epochs
    for name in ("train_step", "eval_step"):
        assert len([line for line in compiled if f"jit({name})" in line]) == 1


@pytest.mark.parametrize(
    ("optim", "rate"),
    [
        ("sgd", 1.0),
        ("adafactor", 3e-2),
        ("adamw_8bit", 3e-2),
        ("optax.adan", 3e-2),
        pytest.param("paged_lion_8bit", 1e-2, marks=pytest.mark.slow),
    ],
)
def test_optimizers_of_every_kind_learn(place, optim, rate):
    """What each computes, test_training_optim_* compare with formulas, optax and bitsandbytes."""
    steps = {"max_steps": 12, "logging_steps": 1, "save_steps": None}
    place.settings_for_loss()
    lora = {"r": 64, "lora_alpha": 128} if "8bit" in optim else {}  # 4096 values and more
    place.run(
        train={"optim": optim, "learning_rate": rate, "weight_decay": 0.01, **steps}, lora=lora
    )
    losses = place.losses()
    assert np.mean(losses[-3:]) < 0.93 * losses[0]


@pytest.fixture(scope="module")
def float32(tmp_path_factory, tiny_base, tiny_cache):
    """The losses of a run in float32 with gradient checkpointing."""
    place = Place(tmp_path_factory.mktemp("float32"), tiny_base, tiny_cache)
    place.settings_for_loss()
    with mock.patch.object(train_step, "make_train_step", wraps=train_step.make_train_step) as made:
        place.run(train={"logging_steps": 1})
    assert made.call_args.args[0].gradient_checkpointing
    return place.losses()


@pytest.mark.parametrize("setting", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_half_precision_computes_nearly_the_same_and_keeps_a_float32_adapter(
    place, float32, setting
):
    place.settings_for_loss()
    place.run(train={"logging_steps": 1, setting: True})
    np.testing.assert_allclose(place.losses(), float32, rtol=2e-2)
    assert place.losses() != float32
    assert {array.dtype for array in load(place.adapter()).values()} == {np.dtype("float32")}


def test_gradient_checkpointing_changes_nothing(place, float32):
    place.settings_for_loss()
    with mock.patch.object(train_step, "make_train_step", wraps=train_step.make_train_step) as made:
        place.run(train={"logging_steps": 1, "gradient_checkpointing": False})
    assert not made.call_args.args[0].gradient_checkpointing
    np.testing.assert_allclose(place.losses(), float32, rtol=1e-5)


@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_activation_offloading_changes_no_bit(place, float32, devices):
    place.settings_for_loss()
    mesh = {"data": 1, "fsdp": 2, "tensor": 2} if devices > 1 else {}
    run = functools.partial(place.run, devices=devices, mesh=mesh)
    if devices > 1:
        run(train={"logging_steps": 1, "resume": "never"})
    expected = float32 if devices == 1 else place.losses()
    with mock.patch.object(train_step, "make_train_step", wraps=train_step.make_train_step) as made:
        run(train={"logging_steps": 1, "resume": "never", "activation_offloading": True})
    assert made.call_args.args[0].gradient_checkpointing == "offload"
    assert place.losses() == expected


EVERY_2 = {
    "eval_steps": 2,
    "lr_scheduler_type": "constant",
    "early_stopping_threshold": 10.0,  # no evaluation after the first counts as an improvement
}


@pytest.mark.parametrize(("patience", "last"), [(1, 4), (5, 6)], ids=["stopped", "to the end"])
def test_early_stopping_gives_the_best_adapter_and_a_rerun_the_same(place, best, patience, last):
    settings = {**EVERY_2, "max_steps": 6, "early_stopping_patience": patience}
    place.run(train=settings)
    assert place.log()[-1]["step"] == last
    assert place.adapter() == best
    log = place.log()
    (place.output / "adapter_model.safetensors").unlink()
    place.run(train=settings)
    assert place.adapter() == best and place.log() == log


@pytest.fixture(scope="module")
def best(tmp_path_factory, tiny_base, tiny_cache):
    """The adapter after two of those steps."""
    place = Place(tmp_path_factory.mktemp("best"), tiny_base, tiny_cache)
    place.run(train={**EVERY_2, "max_steps": 2})
    return place.adapter()


def test_full_fine_tuning_writes_a_model_that_training_goes_on_from(place):
    place.run(lora=None, train={"learning_rate": 1e-2, "logging_steps": 1})
    first = place.losses()
    assert first[-1] < 0.9 * first[0]
    assert not (place.output / "adapter_model.safetensors").exists()
    assert transformers.AutoConfig.from_pretrained(place.output).model_type == "llama"
    model, params = jlora.load_pretrained(str(place.output), dtype="float32")
    _, base = jlora.load_pretrained(str(place.base), dtype="float32")
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), params, base)
    assert all(jax.tree.leaves(changed)) and model.config.vocab_size == 336
    result, place.output = place.output, place.folder / "second"
    place.run(model={"name_or_path": str(result)}, lora=None, train={"logging_steps": 1})
    assert place.losses()[0] < 0.95 * first[0]


def test_init_from_goes_on_from_an_adapter(place, capsys):
    place.settings_for_loss()
    place.run(train={"logging_steps": 1, "learning_rate": 3e-2})
    first, result = place.losses(), place.output
    place.output = place.folder / "second"
    other = {"init_from": str(result), "r": 2, "bias": "all", "target_modules": ["q_proj"]}
    assert place.main(lora=other) == 2
    message = capsys.readouterr().err
    assert "lora.r, lora.target_modules, lora.bias: asks for another adapter" in message
    assert "r: 2 (there 4)" in message and "leave these out" in message
    capsys.readouterr()
    lora = {"init_from": str(result), "r": 8, "lora_alpha": 8, "target_modules": r".*(q|down)_proj"}
    place.run(lora=lora, train={"logging_steps": 1})
    assert place.losses()[0] < 0.95 * first[0]
    peft = json.loads((place.output / "adapter_config.json").read_text())
    assert peft["r"] == 4, "8 is the default, and gives way"
    assert config.load(place.output).lora.r == 4
    assert "from lora.init_from: r: 4" in capsys.readouterr().out


def test_show_batch_prints_and_trains_nothing(place, capsys):
    assert place.main("--show-batch") == 0
    shown = capsys.readouterr().out
    assert "say" in shown and "<|im_end|>" in shown
    assert not place.output.exists()


def test_lorafa_and_loraplus_train_b_alone(place, capsys):
    """A is as it was drawn, no check stops that, and 8-bit moments and LoRA+ go with it."""
    place.settings_for_loss()
    options = {"lorafa": True, "loraplus_lr_ratio": 4.0, "optim": "adamw_8bit", "max_steps": 4}
    place.run(train={**options, "save_steps": None}, lora={"lora_dropout": 0.0})
    said = capsys.readouterr().out
    assert "adamw_8bit with LoRA+ (B's learning rate is 4 times A's) with LoRA-FA" in said
    _, params = jlora.load_pretrained(place.base, "float32")
    settings = config.load(place.output)
    fresh = jlora.init_adapter(jax.random.key(settings.train.seed), params, settings.lora)
    drawn = to_peft_tensors(fresh)
    trained = load(place.adapter())
    assert set(trained) == set(drawn)
    for name, value in trained.items():
        assert np.array_equal(value, drawn[name]) == ("lora_A" in name), name
    trainable = sum(value.size for name, value in trained.items() if "lora_B" in name)
    assert f"{trainable:,} of" in said
    job = open_job(settings, open_tokenizer(settings), trained=True)

    def total(adapter):
        logits = job.model(job.bind(job.frozen, adapter, None), np.arange(8)[None])
        return (logits * np.arange(8, dtype=np.float32)[:, None]).sum()

    gradient = jax.grad(total)(job.trainable).weights
    for path, value in paths.walk(gradient):
        assert np.any(value) == (path[-1] == "lora_B"), path


def test_the_base_is_fingerprinted_once(place):
    """For the checkpoints and for base_model.json; the small leaves have a record of their own."""
    from jlora.io.peft import base_model
    from jlora.tree import fingerprint

    fingerprinted = []

    def counted(params, compute=fingerprint.fingerprint):
        if "kernel" in str(jax.tree.structure(params)):
            fingerprinted.append(params)
        return compute(params)

    place.settings_for_loss()
    with (
        mock.patch.object(train, "fingerprint", counted),
        mock.patch.object(base_model, "fingerprint", counted),
    ):
        place.run(train={"max_steps": 1, "save_steps": 1, "logging_steps": 1})
    assert len(fingerprinted) == 1
    record = json.loads((place.output / "base_model.json").read_text())
    manifest = json.loads((place.output / "checkpoints/1/manifest.json").read_text())
    assert record["weights"] == manifest["base_fingerprint"]
    assert record["weights"] == fingerprint.fingerprint(fingerprinted[0])
