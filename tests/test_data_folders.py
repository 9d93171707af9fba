"""Splits of folders: those that ``datasets`` finds."""

import json

import datasets
import pytest

from jlora.data.sources import read_raw_rows
from jlora.errors import ConfigError, DataError

CARD = """---
license: mit
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: main/a-*
  - {split: test, path: [main/b.jsonl]}
- config_name: other
  data_files: other/*.jsonl
---
# A data set
"""
LAYOUTS = {
    "files": ["train.jsonl", "test.jsonl", "notes/extra.jsonl"],
    "shards": ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "dev-0.jsonl"],
    "words": ["my_training_set.jsonl", "x-valid.1.jsonl", "evaluation.jsonl", "contest.jsonl"],
    "folders": ["train/a.jsonl", "train/deep/b.jsonl", "testing-1/test/c.jsonl", "train.jsonl"],
    "data folder": [
        "data/train-00000-of-00001.jsonl",
        "data/odd-00000-of-00001-x.jsonl",
        "a.jsonl",
    ],
    "both words": ["train_test.jsonl", "val 2.jsonl"],
    "no words": ["a.jsonl", "deep/b.jsonl", "Train.jsonl", ".hidden.jsonl", "__pycache__/c.jsonl"],
    "card": ["main/a-1.jsonl", "main/a-2.jsonl", "main/b.jsonl", "other/c.jsonl", "train.jsonl"],
}


def make(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}) + "\n")
    return folder


def texts(path, split=None, name=None, key="text"):
    return [row.value[key] for row in read_raw_rows(str(path), split, name)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_splits_are_those_of_datasets(tmp_path, layout):
    folder = make(tmp_path / "set", LAYOUTS[layout])
    if layout == "card":
        (folder / "README.md").write_text(CARD)
    cache = str(tmp_path / "cache")
    theirs = datasets.load_dataset(str(folder), cache_dir=cache)
    for split, rows in theirs.items():
        # A set: datasets reads a file twice that two of its patterns match.
        assert sorted(texts(folder, split)) == sorted(set(rows["text"]))
    assert sorted(texts(folder, "all")) == sorted(
        text for rows in theirs.values() for text in set(rows["text"])
    )
    with pytest.raises(ConfigError, match="no split 'none'") as caught:
        texts(folder, "none")
    assert all(split in caught.value.fix for split in theirs)


def test_without_a_split_train_is_read_or_the_only_one(tmp_path):
    assert texts(make(tmp_path / "a", LAYOUTS["files"])) == ["train.jsonl"]
    assert texts(make(tmp_path / "b", ["dev.jsonl"])) == ["dev.jsonl"]
    with pytest.raises(ConfigError, match="no split 'train'"):
        texts(make(tmp_path / "c", ["dev.jsonl", "test.jsonl"]))


def test_slices_and_sums_of_splits(tmp_path):
    names = ["train/1.jsonl", "train/2.jsonl", "test/3.jsonl", "test/4.jsonl"]
    folder = make(tmp_path, names)
    assert texts(folder, "test[:1]+train[50%:]") == ["test/3.jsonl", "train/2.jsonl"]
    assert texts(folder, "[1:]") == ["train/2.jsonl"]
    with pytest.raises(ConfigError, match="is not a slice"):
        texts(folder, "test[1]")


def test_configurations_of_a_card(tmp_path):
    folder = make(tmp_path, LAYOUTS["card"])
    (folder / "README.md").write_text(CARD)
    assert texts(folder, None, "other") == ["other/c.jsonl"]
    with pytest.raises(ConfigError, match="no configuration 'mian'") as caught:
        texts(folder, None, "mian")
    assert "'main'" in caught.value.fix
    (folder / "README.md").write_text(CARD.replace("  default: true\n", ""))
    with pytest.raises(ConfigError, match="2 configurations and none is the default"):
        texts(folder)


@pytest.mark.parametrize(
    "data_files", ["[{path: a.jsonl}]", "3", "{train: null}", "[[3]]", '"[b-a].jsonl"']
)
def test_a_card_whose_data_files_are_malformed_is_an_error(tmp_path, data_files):
    folder = make(tmp_path, ["a.jsonl", "b.jsonl"])
    (folder / "README.md").write_text(f"---\nconfigs:\n- data_files: {data_files}\n---\n")
    with pytest.raises(DataError, match="data_files is not a pattern, a list of") as caught:
        texts(folder)
    assert caught.value.where == str(folder / "README.md")


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("[!b].jsonl", ["^.jsonl", "a.jsonl"]),
        ("[^b].jsonl", ["^.jsonl", "b.jsonl"]),
        ("[a.jsonl", ["[a.jsonl"]),
        ("[a-b].jsonl", ["a.jsonl", "b.jsonl"]),
        ("**/?.jsonl", ["^.jsonl", "a.jsonl", "b.jsonl", "c/d.jsonl"]),
    ],
)
def test_patterns_of_a_card(tmp_path, pattern, matched):
    folder = make(tmp_path, ["[a.jsonl", "^.jsonl", "a.jsonl", "b.jsonl", "c/d.jsonl"])
    (folder / "README.md").write_text(f"---\nconfigs:\n- data_files: '{pattern}'\n---\n")
    assert texts(folder) == matched


def test_what_save_to_disk_wrote_is_one_data_set(tmp_path):
    def rows(n, start=0):
        return datasets.Dataset.from_dict({"text": [f"{start + i}" for i in range(n)]})

    whole = datasets.DatasetDict({"train": rows(5), "held_out": rows(3, 5)})
    whole.save_to_disk(tmp_path / "dict", num_shards={"train": 2, "held_out": 1})
    (tmp_path / "dict" / "train" / "cache-1.arrow").write_text("of a later map")
    assert texts(tmp_path / "dict") == list("01234")
    assert texts(tmp_path / "dict", "held_out[1:]") == ["6", "7"]
    assert texts(tmp_path / "dict" / "held_out") == ["5", "6", "7"]
    rows(6).select([4, 2]).save_to_disk(tmp_path / "one")
    assert texts(tmp_path / "one") == texts(tmp_path / "one", "train") == ["4", "2"]
    (row, _) = read_raw_rows(str(tmp_path / "one"))
    assert row.where == f"{tmp_path / 'one' / 'data-00000-of-00001.arrow'}:1"
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        texts(tmp_path / "one")


def test_the_public_folder_has_its_two_splits(assets):
    folder = assets / "data" / "gsm8k"
    assert [len(texts(folder, split, None, "answer")) for split in ("train", "test")] == [
        7473,
        1319,
    ]
