"""What is printed: the values, and no control characters without a terminal."""

import io
import re
import unicodedata

import pytest
from rich.text import Text

from jlora.ui import console
from jlora.ui.console import Console, HeaderTable

EVIL = "a\x1b[31mred\x07\rb\u202ec"


def run(plain: bool) -> str:
    file = io.StringIO()
    c = Console(file=file, plain=plain, width=100)
    table = HeaderTable(["module", "rank"], [["q_proj", 8], ["down_proj", 16]])
    c.header("jlora train", {"model": {"path": EVIL, "parameters": 1213952}, "adapter": table})
    c.warn("eos is never a target")
    c.note("resuming from step 10")
    with c.progress(40, start=10):
        c.log(20, {"loss": 0.51234, "learning_rate": 2e-4, "tokens_per_second": 12345.6})
        c.log(20, {"eval_loss": None, "eval_perplexity": 1.25})
    sample = {"prompt": "ask\nme", "before": "x" * 1000, "after": EVIL, "expected": "[bold]b"}
    c.samples([sample])
    c.text(Text.assemble("not learned, ", ("learned", "bold green"), ("again", "bold green")))
    c.card("done in 3s", {"adapter": "runs/a"}, ["jlora merge runs/a"])
    return file.getvalue()


def test_plain_output_has_no_control_characters_and_shows_every_value():
    text = run(plain=True)
    assert not [c for c in text if c != "\n" and unicodedata.category(c) == "Cc"]
    assert "\u202e" not in text
    lines = text.splitlines()
    assert "  path        a\\x1b[31mred\\x07\\rb\\u202ec" in lines
    assert "  parameters  1,213,952" in lines
    assert ["q_proj", "8"] in [line.split() for line in lines]
    assert "warning: eos is never a target" in lines
    assert "step 20/40  loss 0.5123  lr 2.00e-04  tok/s 12,346" in lines
    assert "step 20/40  eval loss -  perplexity 1.25" in lines
    assert "  prompt:   ask\\nme" in lines
    assert "  expected: [bold]b" in lines
    assert "not learned, «learned»«again»" in lines
    assert max(len(line) for line in lines) < console.MAX_SAMPLE_LENGTH + 20
    assert lines[-1] == "  jlora merge runs/a"


def test_a_terminal_shows_the_same_values():
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", run(plain=False))
    assert "\x1b" not in text and "\x07" not in text
    for words in ("1,213,952", "down_proj", "loss 0.5123", "12,346", "[bold]b", "$ jlora merge"):
        assert words in text, words
    assert "perplexity 1.25" in text and "20/40" in text


def test_output_without_a_terminal_is_plain_and_other_processes_are_silent():
    file = io.StringIO()
    assert Console(file=file).plain
    silent = Console(file=file, plain=False, enabled=False)
    silent.header("t", {"a": {"b": 1}})
    with silent.progress(3):
        silent.log(1, {"loss": 1.0})
    silent.samples([{"prompt": "a", "after": "b"}])
    silent.text(Text("a"))
    silent.card("t", {})
    assert file.getvalue() == ""


def test_an_output_that_cannot_show_a_character_shows_a_question_mark():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    Console(file=file, plain=True).note("2 × 3")
    assert raw.getvalue() == b"2 ? 3\n"
    file.detach()


def test_the_remaining_time_excludes_the_first_step(monkeypatch):
    now = iter([100.0, 110.0, 130.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    clock = console._Clock(total=100, start=0)
    clock.at(1)  # at 100 s: compiled
    assert clock.remaining() is None
    clock.at(6)  # 2 s a step
    assert clock.remaining() == "3m08s"
    clock.at(100)
    assert clock.remaining() is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (3599, "59m59s"), (7500, "2h05m")]
)
def test_durations(seconds, text):
    assert console.duration(seconds) == text


@pytest.mark.parametrize("plain", [True, False])
def test_loading_is_shown_when_it_takes_long(monkeypatch, plain):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])

    def load(seconds, **options):
        file = io.StringIO()
        with Console(file=file, plain=plain, width=80, **options).loading() as report:
            for done in range(1, 9):
                now[0] += seconds / 8
                report(done * 10**9, 8 * 10**9)
        return file.getvalue()

    assert load(1.9) == load(60, enabled=False) == ""
    text = load(16)
    if plain:  # the clock advances by two seconds: a line after six and after twelve
        assert text == "loading: 3.0 GB of 8.0 GB\nloading: 6.0 GB of 8.0 GB\n"
    else:
        assert "loading" in text and "8.0/8.0 GB" in text
