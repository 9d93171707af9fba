"""Examples of labelled texts, compared with the tokenizer's output, and label names of rows."""

import json

import numpy as np
import pytest
import tiny_tokenizer as tt

from jlora.config import DataConfig, SourceConfig
from jlora.data import infer_label_names, load_rows, prepare
from jlora.data.examples import IGNORE
from jlora.data.labelled_texts import encode_labelled
from jlora.data.rows import LabelledText
from jlora.errors import ConfigError, DataError

NAMES = ("bad", "good")
TEXTS = ["Hello world, how are you today?", "I am fine", "The answer is 4", "a", "thank you. " * 9]
ROWS = [LabelledText(f"f:{i}", text, NAMES[i % 2]) for i, text in enumerate(TEXTS, 1)]


def labelled(*labels):
    return [LabelledText(f"rows:{i}", "text", label) for i, label in enumerate(labels, 1)]


def encode(labels, names):
    """The classes of rows with these labels, and the errors."""
    examples, counts = encode_labelled(labelled(*labels), tt.tiny_tokenizer(), 64, names)
    return [examples[i][1][-1] for i in range(len(examples))], counts.bad


@pytest.mark.parametrize("adds_bos", [False, True])
def test_tokens_match_the_tokenizer_and_the_last_has_the_class(adds_bos):
    tokenizer, reports = tt.tiny_tokenizer(adds_bos=adds_bos), []
    examples, counts = encode_labelled(ROWS, tokenizer, 20, NAMES, lambda *n: reports.append(n))
    assert tokenizer.backend_tokenizer.truncation is None, (
        "the setting would be saved with the tokenizer"
    )
    for i, row in enumerate(ROWS):
        ids, labels = examples[i]
        assert ids.tolist() == tokenizer(row.text, truncation=True, max_length=20)["input_ids"]
        assert labels.tolist() == [IGNORE] * (len(ids) - 1) + [NAMES.index(row.label)]
    assert counts.truncated == 1 and not counts.dropped and not counts.bad
    assert reports == [(5, 5)]


def test_padding_at_the_end_is_left_out():
    """transformers reads the class at the last token that is not padding."""
    tokenizer = tt.tiny_tokenizer(pad_token="<|eos|>")
    rows = [LabelledText("f:1", "a<|eos|>b<|eos|><|eos|>", 0), LabelledText("f:2", "<|eos|>", 1)]
    examples, counts = encode_labelled(rows, tokenizer, 20, NAMES)
    assert (len(examples), counts.dropped) == (1, 1)
    ids, labels = examples[0]
    assert tokenizer.decode(ids) == "a<|eos|>b" and labels.tolist() == [IGNORE, IGNORE, 0]


def test_labels_are_names_or_numbers():
    assert encode(["good", "bad", 1, 0, "1", "0", True], NAMES) == ([1, 0, 1, 0, 1, 0, 1], [])
    names = ("2", "1")  # digits are names where they are strings
    assert encode(["1", "2", 1], names) == ([1, 0, 1], [])


@pytest.mark.parametrize(
    ("label", "fix"),
    [("god", "did you mean 'good'?"), (2, "model.id2label"), (-1, "correct")],
)
def test_an_unknown_label_is_named_with_its_place(label, fix):
    classes, (error,) = encode(["good", label], NAMES)
    assert classes == [1] and error.where == "rows:2"
    assert f"{label!r} is none of the 2 classes: bad, good" in str(error) and fix in str(error)


@pytest.mark.parametrize(
    ("labels", "num_labels", "names"),
    [
        (["b", "a", "b", "c"], None, ("a", "b", "c")),
        ([1, 0, 1], None, ("LABEL_0", "LABEL_1")),
        (["1", "0", "10", *map(str, range(2, 10))], None, tuple(f"LABEL_{i}" for i in range(11))),
        ([3], 4, ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")),
        (["1", "one"], 2, ("1", "one")),
    ],
)
def test_classes_are_inferred_from_rows(labels, num_labels, names):
    assert infer_label_names(labelled(*labels), num_labels) == names


@pytest.mark.parametrize(
    ("labels", "num_labels", "kind", "words"),
    [
        ([1, 2, 5], None, DataError, "labels are 1, 2, 5: not numbers from 0 on"),
        ([0, "2"], None, DataError, "labels are 0, 2: not numbers"),
        ([0, "0"], None, DataError, "every row has the label 0"),
        ([0, 1, -1], None, DataError, "labels are -1, 0, 1: not numbers"),
        (["a", "a"], None, DataError, "every row has the label 'a'"),
        (["a", 1], None, DataError, "rows:2: its label is the number 1, but other rows have names"),
        (["a", "b"], 3, ConfigError, "model.num_labels: is 3, but the rows have 2 labels: a, b"),
    ],
)
def test_labels_that_do_not_define_classes_are_refused(labels, num_labels, kind, words):
    with pytest.raises(kind) as caught:
        infer_label_names(labelled(*labels), num_labels)
    assert words in str(caught.value)


def source(tmp_path, text, name="rows.jsonl"):
    (tmp_path / name).write_text(text)
    return SourceConfig(path=str(tmp_path / name), format="classification")


def test_labelled_rows_are_read_from_files(tmp_path):
    lines = [{"text": "x", "label": "a", "id": 3}, {"text": "y", "label": 1}]
    rows = load_rows(source(tmp_path, "\n".join(map(json.dumps, lines)))).rows
    assert [(r.text, r.label) for r in rows] == [("x", "a"), ("y", 1)]
    rows = load_rows(source(tmp_path, 'text,label\n"a, b",1\nc,0\n', "rows.csv")).rows
    assert [(r.text, r.label) for r in rows] == [("a, b", "1"), ("c", "0")]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "x"}, "no 'label'"),
        ({"text": "x", "label": 0.5}, "'label' must be a whole number or a string, not a number"),
        ({"text": " ", "label": 0}, "'text' is empty"),
        ({"label": 0}, "no 'text'"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, words):
    with pytest.raises(DataError, match=words) as caught:
        load_rows(source(tmp_path, json.dumps(row)))
    assert caught.value.where == f"{tmp_path / 'rows.jsonl'}:1"


def test_prepared_rows_and_their_warnings(tmp_path):
    lines = [{"text": t, "label": i % 2} for i, t in enumerate(TEXTS)] + [{"text": "a", "label": 7}]
    rows = source(tmp_path, "\n".join(map(json.dumps, lines)))
    tokenizer, skip = tt.tiny_tokenizer(), {"max_length": 20, "on_bad_row": "skip"}
    with pytest.raises(DataError, match="label 7 is none of the 2 classes") as caught:
        prepare([rows], tokenizer, DataConfig(train=[rows]), id2label=NAMES)
    assert caught.value.where == f"{tmp_path / 'rows.jsonl'}:6"
    prepared = prepare([rows], tokenizer, DataConfig(train=[rows], **skip), id2label=NAMES)
    (report,) = prepared.sources
    assert (report.rows, report.skipped, report.truncated) == (5, 1, 1)
    assert prepared.target_tokens == 5
    skipped, cut = (
        prepared.warnings
    )  # but none about an end-of-sequence token that is never a target
    assert "1 bad rows skipped" in skipped
    assert "1 of 5 rows are longer than data.max_length=20 and cut" in cut
    at = prepared.packed.labels != IGNORE
    ends = np.diff(prepared.packed.segment_ids, append=0, axis=1) != 0
    assert (ends[at]).all() and sorted(prepared.packed.labels[at]) == [0, 0, 0, 1, 1]
