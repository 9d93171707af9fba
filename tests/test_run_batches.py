"""Batches on the devices, and whether their rows fit the model."""

import dataclasses
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from jlora import data
from jlora.config import MeshConfig
from jlora.data import Prepared, SourceReport
from jlora.data.packing import PackedRows
from jlora.distributed import sharding
from jlora.errors import ConfigError, DataError
from jlora.run.batches import check_rows_fit, eval_device_batches, make_batch_at
from jlora.run.job import Job


def prepared(rows=10, length=8, largest=30):
    ids = np.arange(rows * length, dtype=np.int32).reshape(rows, length) % (largest + 1)
    packed = PackedRows(ids, np.roll(ids, -1, axis=1), np.ones_like(ids))
    names = {f.name: 0 for f in dataclasses.fields(SourceReport)}
    texts = {"path": "rows", "format": "text", "skipped_notes": (), "adapter": None}
    report = SourceReport(**names | texts | {"packed_rows": rows, "weight": 1.0})
    return Prepared(packed, (report,), (), "00")


def job(vocab_size=31, position_limit=None):
    config = SimpleNamespace(vocab_size=vocab_size, position_limit=position_limit)
    found = mock.Mock(spec=Job)
    found.model = SimpleNamespace(config=config)
    found.config = SimpleNamespace(model=SimpleNamespace(name_or_path="base"))
    return found


def test_rows_that_fit_the_model_are_accepted():
    check_rows_fit(job(), prepared())
    check_rows_fit(job(position_limit=8), prepared(length=8))


def test_a_token_without_an_embedding_is_named():
    with pytest.raises(DataError, match="token 30, but the model has 30 embeddings"):
        check_rows_fit(job(vocab_size=30), prepared())


def test_the_row_with_a_token_without_an_embedding_is_named():
    rows = prepared()
    rows.packed.labels[-1, -1] = 31  # the last token of an example is a label only
    rows = dataclasses.replace(rows, largest_token_where="rows.jsonl:7")
    with pytest.raises(DataError, match="token 31, but the model has 31 embeddings") as e:
        check_rows_fit(job(), rows)
    assert e.value.where == "rows.jsonl:7"


def test_rows_longer_than_the_model_are_refused():
    with pytest.raises(ConfigError, match="8 tokens in a row, but the model has 7 positions"):
        check_rows_fit(job(position_limit=7), prepared(length=8))


def test_the_loaders_batches_are_split_over_the_devices():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = prepared()
    order = rows.order(8, seed=0)
    batch = make_batch_at(mesh, rows, order, accumulation=2)(1)
    for name, value in data.batch_at(rows, order, 1, 2).items():
        np.testing.assert_array_equal(batch[name], value)
        assert {s.data.shape for s in batch[name].addressable_shards} == {(2, 1, 8)}


def test_evaluation_sees_every_row_once():
    mesh = sharding.make_mesh(MeshConfig(data=8))
    found = [np.asarray(b["input_ids"]) for b in eval_device_batches(mesh, prepared(), 8)]
    assert [ids.shape for ids in found] == [(8, 8), (8, 8)]
    np.testing.assert_array_equal(np.concatenate(found)[:10], prepared().packed.input_ids)
