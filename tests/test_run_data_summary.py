"""What is said of a run's rows: one place for header, report and evaluation."""

import dataclasses

import numpy as np

from jlora.data.packing import PackedRows
from jlora.data.preparation import Prepared, SourceReport
from jlora.run.data_summary import data_warnings, sources_table


def source(path="a.jsonl", adapter=None, longest=20):
    counts = (5, 0, (), 0, 0, 5, 2, 60, 30, longest)
    return SourceReport(path, "messages", 1.0, *counts, adapter)


def prepared(*sources, warnings=()):
    return Prepared(
        PackedRows(*np.zeros((3, 2 * len(sources), 32), np.int32)), sources, warnings, ""
    )


def test_each_source_has_its_own_adapter_in_its_role():
    rows = prepared(source(adapter="one"), source(adapter="two"))
    table = sources_table({"train": [rows], "eval": []})
    assert [row[0] for row in table.rows] == ["train, one", "train, two"]
    assert table.rows[0][1:] == ("a.jsonl", "messages", 5, 2, 60, 30)
    assert len(table.columns) == len(table.rows[0])


def test_warnings_are_said_once_with_examples_beyond_the_positions():
    train = prepared(source(longest=40), warnings=("a.jsonl: 2 bad rows skipped",))
    held_out = prepared(source("b.jsonl", "one", 33), source("c.jsonl", "two", 32), warnings=("x",))
    parts = [held_out.for_adapter("one"), held_out.for_adapter("two")]
    assert data_warnings([train, *parts], positions=32) == [
        "a.jsonl: 2 bad rows skipped",
        "x",
        "a.jsonl: examples of up to 40 tokens, but the base has max_position_embeddings=32",
        "b.jsonl: examples of up to 33 tokens, but the base has max_position_embeddings=32",
    ]
    assert data_warnings([dataclasses.replace(train, warnings=())], positions=64) == []
