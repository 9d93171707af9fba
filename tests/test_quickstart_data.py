"""The quickstart's data set: committed files, the script that writes them, held-out rows."""

import json

from jlora.assets.quickstart import make_data


def read(name: str) -> list[dict]:
    lines = (make_data.FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def turns(row: dict) -> tuple[str, dict]:
    user, assistant = row["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    return user["content"], json.loads(assistant["content"])


def test_files_are_what_the_script_writes():
    assert (read("train"), read("heldout")) == make_data.split()


def test_no_heldout_combination_or_request_is_in_training():
    train = [turns(row) for row in read("train")]
    heldout = [turns(row) for row in read("heldout")]
    combination = lambda call: (call["device"], call["room"], call["action"])  # noqa: E731
    seen = {combination(call) for _, call in train}
    asked = {combination(call) for _, call in heldout}
    assert not seen & asked
    assert len(seen | asked) == len(make_data.combinations())
    assert not {text for text, _ in train} & {text for text, _ in heldout}


def test_every_part_of_a_heldout_combination_is_in_training():
    """Otherwise exact match would depend on chance."""
    train = [turns(row)[1] for row in read("train")]
    heldout = [turns(row)[1] for row in read("heldout")]
    for part in ("device", "room", "action"):
        assert {c[part] for c in heldout} <= {c[part] for c in train}
    pairs = {(c["device"], c["action"]) for c in train}
    assert {(c["device"], c["action"]) for c in heldout} <= pairs


def test_the_request_holds_the_answer():
    for text, call in map(turns, read("train") + read("heldout")):
        assert call["room"] in text.lower()
        assert call["value"] is None or str(call["value"]) in text
        assert (call["value"] is not None) == (call["action"] in make_data.VALUES)
