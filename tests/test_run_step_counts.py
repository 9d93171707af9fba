"""The rows, steps and updates of a run."""

from fractions import Fraction

from jlora.config import (
    Config,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    SourceConfig,
    TrainConfig,
)
from jlora.distributed import sharding
from jlora.run.step_counts import StepCounts

SOURCE = SourceConfig(path="rows.jsonl", format="messages")


def settings(**train):
    return Config(
        model=ModelConfig(name_or_path="base"),
        lora=LoraConfig(),
        data=DataConfig(train=[SOURCE], eval=[SOURCE]),
        train=TrainConfig(**{"output_dir": "out", "warmup_ratio": 0.0} | train),
    )


def counts_of(rows=100, mesh=None, **train):
    """The counts of a run over ``rows`` rows."""
    mesh = sharding.make_mesh(mesh or MeshConfig())
    return StepCounts.of(settings(**train), mesh, lambda batch: -(-rows // batch))


def test_a_step_is_rows_of_a_device_times_devices_times_accumulation():
    batch = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    counts = counts_of(mesh=MeshConfig(data=2, fsdp=2, tensor=2), num_train_epochs=3, **batch)
    assert counts == StepCounts(
        rows_per_step=3 * 4 * 2, eval_rows=3 * 4, accumulation=2, steps_per_epoch=5,
        total_steps=15, fp16=False, all_learning_by=2,
    )  # fmt: skip
    counts = counts_of(per_device_eval_batch_size=5, **batch)
    assert (counts.rows_per_step, counts.eval_rows) == (3 * 8 * 2, 5 * 8)


def test_a_run_is_epochs_or_max_steps():
    batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    assert (
        counts_of(num_train_epochs=0.5, **batch).total_steps == 7
    )  # of 13 steps per epoch, rounded up
    counts = counts_of(num_train_epochs=3, max_steps=4, **batch)
    assert (counts.total_steps, counts.steps_per_epoch) == (4, 13)


def test_fractional_weights_make_fractions_of_steps():
    config, mesh = settings(num_train_epochs=8), sharding.make_mesh(MeshConfig())
    counts = StepCounts.of(config, mesh, lambda rows: Fraction(3, 2))
    assert (counts.total_steps, counts.steps_per_epoch) == (12, 1.5)


def test_float16_is_given_the_warm_up_to_learn_in():
    warm = {"warmup_steps": 20, "max_steps": 100}
    assert counts_of(fp16=True, bf16=False, **warm).fp16
    assert counts_of(fp16=True, bf16=False, **warm).all_learning_by == 23
    assert counts_of(**warm).all_learning_by == 3
    assert counts_of(warmup_ratio=0.0, max_steps=100).all_learning_by == 2
