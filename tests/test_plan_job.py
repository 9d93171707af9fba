"""The step that ``plan`` compiles from abstract arrays runs on a run's real arrays."""

import json

import jax
import numpy as np
import pytest
from tiny_plans import QLORA, load, opened
from tiny_runs import DENSE, TARGETS, write_rows

import jlora
from jlora import cli
from jlora.distributed import sharding
from jlora.run import batches
from jlora.run.abstract_job import abstract_job
from jlora.run.open_tokenizer import open_tokenizer
from jlora.run.train_step import TrainStep

SKIP = {"llm_int8_skip_modules": [*DENSE, "model.layers.0.mlp"]}
CASES = {
    "LoRA": ({}, 1),
    "QLoRA but in one layer's MLP, fsdp and tensor": (
        {"quantization": QLORA["quantization"] | SKIP, "mesh": {"fsdp": 2, "tensor": 2}},
        4,
    ),
    "in full, fsdp": ({"lora": None, "mesh": {"data": 1, "fsdp": 2}}, 2),
    "PiSSA, paged, data": (
        {"lora": {"init_lora_weights": "pissa"}, "train": {"optim": "paged_adamw_32bit"}},
        2,
    ),
    "8 bits, fp16, LoRA-FA, LoRA+": (
        {"train": {"optim": "adamw_8bit", "fp16": True, "lorafa": True, "loraplus_lr_ratio": 4.0}},
        1,
    ),
}


def runs_as_planned(settings, devices):
    """Metrics of a step that was compiled from shapes and is given a run's parts arrays."""
    tokenizer = open_tokenizer(settings)
    rows = batches.prepare_rows(settings, tokenizer, "train")
    mesh = sharding.make_mesh(settings.mesh, jax.devices()[:devices])
    abstract = abstract_job(config=settings, tokenizer=tokenizer, mesh=mesh)
    counts = batches.count_steps(settings, abstract.mesh, rows)
    compiled = TrainStep.of(abstract, counts, rows.length, rows.packed.documents).compile()

    job = opened(settings, devices)
    assert jax.tree.structure(job.trainable) == jax.tree.structure(abstract.trainable)
    state = TrainStep.of(job, counts, rows.length, 1).init_state(job.trainable)
    parts = [
        (p, p.order(counts.rows_per_step, 0)) for p in batches.rows_per_adapter(rows, job.adapters)
    ]
    if job.adapters:
        batch = batches.make_multi_adapter_batch_at(job.mesh, parts, counts.accumulation)(0)
    else:
        batch = batches.make_batch_at(job.mesh, *parts[0], counts.accumulation)(0)
    for like, real in ((abstract.frozen, job.frozen), (abstract.trainable, job.trainable)):
        for a, b in zip(jax.tree.leaves(like), jax.tree.leaves(real), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert a.sharding.is_equivalent_to(b.sharding, b.ndim)
    state, _ = compiled(state, job.frozen, batch)  # raises where shapes or places differ
    _, metrics = compiled(state, job.frozen, batch)
    return metrics


SLOW = {"in full, fsdp", "PiSSA, paged, data"}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES]
)
def test_the_planned_step_is_the_runs(place, standard_promotion, case):
    sections, devices = CASES[case]
    metrics = runs_as_planned(load(place, **sections), devices)
    assert np.isfinite(metrics["loss"]) and metrics["finite"]


def test_so_it_is_of_several_adapters(place, standard_promotion):
    rows = {"path": str(place.rows), "format": "messages"}
    train = [rows | {"adapter": "one"}, rows | {"adapter": "two"}]
    settings = load(place, data={"train": train, "eval": []}, evaluate={"samples": 0})
    assert runs_as_planned(settings, 2)["loss"].shape == (2,)


LABELS = [{"text": f"a text, number {n}", "label": "odd" if n % 2 else "even"} for n in range(40)]


def classifying(place, **sections):
    """A run on rows with classes."""
    from jlora.run.label_names import with_label_names

    rows = write_rows(place.folder / "labels.jsonl", LABELS)
    source = [{"path": str(rows), "format": "classification"}]
    settings = load(
        place,
        data={"train": source, "eval": []},
        lora={"task_type": "SEQ_CLS"},
        evaluate={"samples": 0},
        **sections,
    )
    return with_label_names(settings)[0]


def test_so_it_is_of_a_classifier(place, standard_promotion):
    settings = classifying(place)
    assert np.isfinite(runs_as_planned(settings, 1)["loss"])


@pytest.fixture
def packed(place):
    """The base, packed: a folder."""
    folder = place.folder / "packed"
    file = place.write(**{**QLORA, "quantize": {"output_dir": str(folder)}})
    assert cli.main("quantize", [str(file)]) == 0
    return str(folder)


def test_so_it_is_of_a_folder_that_came_packed(place, standard_promotion, packed):
    settings = load(place, model={"name_or_path": packed})
    assert np.isfinite(runs_as_planned(settings, 1)["loss"])


@pytest.mark.slow
def test_so_it_is_of_a_classifier_on_one(place, standard_promotion, packed):
    """Its head is in no file."""
    settings = classifying(place, model={"name_or_path": packed})
    assert np.isfinite(runs_as_planned(settings, 1)["loss"])


@pytest.mark.parametrize("kind", [pytest.param(True, marks=pytest.mark.slow), "olora"])
def test_so_it_is_of_an_adapter_that_goes_on(place, standard_promotion, kind):
    """Of PEFT's olora the base's values are needed, and described is what comes of them."""
    _, params = jlora.load_pretrained(str(place.base), dtype="float32")
    plain = jlora.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="gaussian")
    folder = place.folder / "before"
    jlora.save_adapter(folder, jlora.init_adapter(jax.random.key(0), params, plain))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": kind}))
    settings = load(place, lora={"init_from": str(folder)})
    assert np.isfinite(runs_as_planned(settings, 1)["loss"])
    assert (opened(settings, 1).initial is None) == (kind is True)
