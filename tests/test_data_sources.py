"""Raw rows and their places in files."""

import csv
import gzip
import json

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from jlora.data.sources import read_raw_rows
from jlora.errors import ConfigError, DataError

ROWS = [{"text": "one"}, {"text": 'a "quoted"\nsecond'}, {"text": "three\u2028lines"}]


def write(path, kind):
    if kind == "jsonl":
        path.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS))
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=2, ensure_ascii=False))
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="") as f:
            out = csv.DictWriter(f, ["text"], delimiter="\t" if kind == "tsv" else ",")
            out.writeheader()
            out.writerows(ROWS)
    elif kind.endswith((".gz", ".zst")):
        inner, _, suffix = kind.rpartition(".")
        plain = write(path.with_name("plain"), inner).read_bytes()
        with pyarrow.output_stream(str(path), {"gz": "gzip", "zst": "zstd"}[suffix]) as out:
            out.write(plain)
    elif kind in ("arrow", "feather"):
        table = pyarrow.Table.from_pylist(ROWS)
        new = pyarrow.ipc.new_stream if kind == "arrow" else pyarrow.ipc.new_file
        path = path.with_suffix(".arrow")
        with new(str(path), table.schema) as out:
            out.write_table(table, max_chunksize=2)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


LINES = {
    "jsonl": [1, 3, 5],
    "json": [2, 5, 8],
    "csv": [2, 3, 5],
    "tsv": [2, 3, 5],
    "parquet": [1, 2, 3],
    "arrow": [1, 2, 3],
    "feather": [1, 2, 3],
}
COMPRESSED = ["jsonl.gz", "json.gz", "csv.gz", "tsv.zst", "jsonl.zst"]


@pytest.mark.parametrize("kind", [*LINES, *COMPRESSED])
def test_every_kind_of_file_gives_the_same_rows_with_their_lines(tmp_path, kind):
    path = write(tmp_path / f"rows.{kind}", kind)
    rows = list(read_raw_rows(str(path)))
    assert [r.value for r in rows] == ROWS
    lines = LINES[kind.removesuffix(".gz").removesuffix(".zst")]
    assert [r.where for r in rows] == [f"{path}:{n}" for n in lines]


CALLS = [
    {"messages": [{"role": "assistant", "calls": [{"name": "f", "arguments": {"city": "Paris"}}]}]},
    {
        "messages": [
            {"role": "assistant", "calls": [{"name": "g", "arguments": {"a": 1, "b": [2]}}]}
        ]
    },
    {"messages": [{"role": "user", "content": "hi"}], "tools": [{"name": "f"}, {"about": "g"}]},
]


def test_structs_of_arrow_tables_have_only_the_keys_of_their_rows(tmp_path, monkeypatch):
    """Arrow gives all structs of a column the same keys, and null to those a row did not have."""
    import datasets

    names = ("messages", "tools")
    table = pyarrow.table({name: [row.get(name) for row in CALLS] for name in names})
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table, path)
    wanted = [{**row, "tools": row.get("tools")} for row in CALLS]  # a column, not a struct's key
    assert [r.value for r in read_raw_rows(str(path))] == wanted
    dataset = datasets.Dataset(datasets.table.InMemoryTable(table))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: dataset)
    assert [r.value for r in read_raw_rows("owner/name")] == wanted


def test_json_columns_of_arrow_tables_keep_the_nulls_of_their_rows(tmp_path, monkeypatch):
    """``datasets`` reads JSON lines whose objects differ into columns of JSON text."""
    import datasets

    rows = [{"messages": [{"arguments": {"a": None, "b": 1}}]}, {"messages": [{"x": [None]}]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [r.value for r in read_raw_rows(str(tmp_path / "rows.jsonl"))] == rows
    cells = [[json.dumps(m) for m in row["messages"]] for row in rows]
    column = pyarrow.array(cells).cast(pyarrow.list_(pyarrow.json_()))
    table = pyarrow.table({"messages": column})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert [r.value for r in read_raw_rows(str(tmp_path / "rows.parquet"))] == rows
    dataset = datasets.Dataset(datasets.table.InMemoryTable(table))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: dataset)
    assert [r.value for r in read_raw_rows("owner/name")] == rows


def test_txt_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo")
    assert [r.value for r in read_raw_rows(str(path))] == [{"text": "one\n\ntwo"}]


def test_json_may_hold_lines_or_a_single_object_and_a_byte_order_mark(tmp_path):
    lines = tmp_path / "lines.json"
    lines.write_text("\ufeff" + "\n".join(map(json.dumps, ROWS)))
    assert [r.value for r in read_raw_rows(str(lines))] == ROWS
    one = tmp_path / "one.json"
    one.write_text(json.dumps({"messages": []}, indent=1))
    assert [r.value for r in read_raw_rows(str(one))] == [{"messages": []}]
    wrapped = tmp_path / "wrapped.json"
    wrapped.write_text(json.dumps({"data": ROWS}))
    with pytest.raises(DataError, match="list under 'data'"):
        list(read_raw_rows(str(wrapped)))


def test_folders_and_globs_are_read_by_name(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}))
    (tmp_path / "README.md").write_text("not data")
    names = [r.value["text"] for r in read_raw_rows(str(tmp_path))]
    assert names == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert [r.value["text"] for r in read_raw_rows(f"{tmp_path}/[ab].jsonl")] == [
        "a.jsonl",
        "b.jsonl",
    ]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:50%]", [0, 1, 2, 3, 4]),
        ("train[90%:]", [9]),
        ("[2:4]", [2, 3]),
        ("train[-1:]", [9]),
        ("train", list(range(10))),
    ],
)
def test_local_slices(tmp_path, split, expected):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(str, range(10))))
    assert [r.value for r in read_raw_rows(str(path), split)] == expected


def test_slice_errors(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("1")
    with pytest.raises(ConfigError, match="'test' is not a slice"):
        list(read_raw_rows(str(path), "test"))


@pytest.mark.parametrize(
    ("name", "content", "line", "cause"),
    [
        ("a.jsonl", b"", "", "holds no rows"),
        ("a.json", b"[]", "", "holds no rows"),
        ("a.txt", b" \n", "", "holds no rows"),
        ("a.csv", b"text\n", "", "holds no rows"),
        ("a.json", b'[\n{"a": 1},\n{"a": }]', ":3", "Expecting value"),
        ("a.json", b'[\n{"a": 1}\n', ":3", "cut off"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', ":2", "not valid UTF-8"),
        ("a.csv", b'a,b\n1,"2\n', "", "not valid CSV"),
        ("a.parquet", b"PAR1 no", "", "damaged parquet"),
        ("a.arrow", b"ARROW1 no", "", "damaged Arrow"),
        ("a.arrow", b"no", "", "damaged Arrow"),
        ("a.jsonl.gz", b'{"a": 1}', "", "damaged compressed"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-9], "", "damaged compressed"),
        ("a.jsonl.zst", b'{"a": 1}', "", "damaged compressed"),
        ("a.txt.gz", gzip.compress(b"one\n\xff", mtime=0), ":2", "not valid UTF-8"),
        ("a.parquet.gz", b"", "", "unknown kind of data file '.parquet.gz'"),
        ("a.pkl", b"cos\nsystem\n", "", "unknown kind of data file '.pkl'"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, line, cause):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as e:
        list(read_raw_rows(str(path)))
    assert e.value.where.startswith(f"{path}{line}")
    assert cause in e.value.cause


def test_rows_that_cannot_be_read_carry_their_fault(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 1,}\n')
    good, bad = read_raw_rows(str(path))
    assert good.fault is None and bad.where == f"{path}:2"
    assert "column" in bad.fault
    deep = tmp_path / "deep.json"
    deep.write_text('{"a": ' + "[" * 200_000)
    assert [r.fault for r in read_raw_rows(str(deep))] == ["not valid JSON: nested too deeply"]
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2\n1,2,3\n")
    assert [r.fault for r in read_raw_rows(str(path))] == [None, "3 fields, but the header has 2"]


def test_missing_files_name_their_neighbours(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"has train\.jsonl"):
        read_raw_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(ConfigError, match="no data files"):
        read_raw_rows(str(tmp_path / "*.parquet"))


def test_a_configuration_that_nothing_has_is_refused(tmp_path):
    import datasets

    (tmp_path / "train.jsonl").write_text("{}")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for path in ("train.jsonl", "*.jsonl", "saved"):
        with pytest.raises(ConfigError, match="no configurations to choose 'main'") as e:
            read_raw_rows(str(tmp_path / path), None, "main")
        assert e.value.where == "name" and "leave it out" in e.value.fix


def test_hub_names_go_through_datasets_without_remote_code(monkeypatch):
    import datasets

    calls = []

    def load(path, name=None, **options):
        calls.append((path, name, options))
        if path == "no/such":
            raise FileNotFoundError("Couldn't find 'no/such'\non the hub")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(read_raw_rows("owner/name", "test[:2]", "main"))
    assert [r.value for r in rows] == ROWS
    assert rows[1].where == "owner/name[test[:2]]:2"
    assert calls == [("owner/name", "main", {"split": "test[:2]"})]
    read_raw_rows("owner/name", "[:2]+test")
    assert calls[-1][-1] == {"split": "train[:2]+test"}, "as of a local file"
    with pytest.raises(ConfigError, match="Couldn't find 'no/such'"):
        read_raw_rows("no/such")
