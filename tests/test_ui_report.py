"""The report: points are drawn to scale, and the page loads nothing."""

import math
import re
from xml.etree import ElementTree

import pytest

from jlora.ui import report
from jlora.ui.report import chart
from jlora.ui.report.chart import Frame, Series
from jlora.ui.report.page import metric_points, report_html

METRICS = [
    {"step": 10, "loss": 4.0, "learning_rate": 1e-4, "grad_norm": 1.5, "tokens_per_second": 900.0},
    {"step": 20, "loss": 2.0, "learning_rate": 2e-4, "grad_norm": 0.5, "tokens_per_second": 1100},
    {"step": 20, "eval_loss": 2.5, "eval_perplexity": 12.18},
    {"step": 30, "loss": 1.0, "learning_rate": 0.0, "grad_norm": 0.25, "tokens_per_second": 1000},
]
SAMPLES = [
    {"prompt": "<b>&\x1b[31m", "before": "no", "after": "yes ", "expected": "yes"},
    {"prompt": "second", "before": "no", "after": "no", "expected": "yes"},
]


def html(metrics=METRICS, samples=SAMPLES, summary=None, config="train:\n  seed: 1\n", **data):
    return report_html(
        title="A <run>",
        config_yaml=config,
        metrics=metrics,
        samples=samples,
        summary=summary or {},
        **{"sources": ((), ()), "warnings": [], **data},
    )


def parse(text):
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))


def charts(text):
    """The sections of the charts by heading."""
    sections = parse(text).iter("section")
    return {section.find("header/h3").text: section for section in sections}


def drawn(section, style="a", kind="curve"):
    """The points of a curve's path, one list per continuous stretch."""
    group = next(g for g in section.iter("g") if g.get("class") == f"series {style}")
    path = next((p for p in group.iter("path") if p.get("class") == kind), None)
    stretches = path.get("d").split("M")[1:] if path is not None else []
    return [[tuple(map(float, p.split(","))) for p in s.split("L")] for s in stretches]


def grid(section):
    """(value, height) of two grid lines, read from their labels."""
    svg = section.find("svg")
    labels = [t for t in svg.iter("text") if t.get("text-anchor") == "end" and t.get("dy")]
    return [(float(t.text.replace(",", "")), float(t.get("y"))) for t in labels]


def test_points_lie_where_the_axis_labels_say():
    section = charts(html())["Loss"]
    (v0, y0), *_, (v1, y1) = grid(section)

    def height(value):
        return y0 + (value - v0) / (v1 - v0) * (y1 - y0)

    frame = Frame(1040, 320)
    left, right = frame.left, frame.width - frame.right
    (line,) = drawn(section)
    expected = [(left, height(4)), ((left + right) / 2, height(2)), (right, height(1))]
    assert line == pytest.approx([pytest.approx(p, abs=0.06) for p in expected])
    assert drawn(section, "b") == []  # one evaluation: a dot
    dot = next(
        c for g in section.iter("g") if g.get("class") == "series b" for c in g.iter("circle")
    )
    assert float(dot.get("cy")) == pytest.approx(height(2.5), abs=0.06)


def test_every_curve_of_the_log_is_drawn_and_described():
    found = charts(html())
    assert list(found) == ["Loss", "Learning rate", "Gradient norm", "Speed"]
    words = found["Loss"].find("svg").get("aria-label")
    assert "training from 4 at step 10 to 1 at step 30" in words
    assert "held out from 2.5 at step 20" in words
    shown = [t.text for t in found["Speed"].iter("text")]
    assert "step 20 · tokens/s 1,100" in shown


def test_a_non_finite_value_leaves_a_gap_and_is_reported():
    metrics = [{"step": s, "loss": float(s)} for s in range(6)]
    metrics[2]["loss"], metrics[3]["loss"] = None, float("nan")
    section = charts(html(metrics))["Loss"]
    assert [len(stretch) for stretch in drawn(section)] == [2, 2]
    assert section.find("p").text == "2 values were not finite, first at step 2."
    assert "nan" not in html(metrics)


def test_a_page_without_any_number_says_so():
    assert "No metrics were logged." in html([])
    assert "No metrics were logged." in html([{"step": 1, "loss": None}])


@pytest.mark.parametrize("count", [1, 2])
def test_few_points_are_dots(count):
    section = charts(html(METRICS[:count]))["Loss"]
    assert sum(c.get("class") == "dot" for c in section.iter("circle")) == count


def test_twenty_thousand_points_keep_their_spikes_and_a_small_page():
    metrics = [{"step": s, "loss": 1 + math.sin(s / 300) / 10} for s in range(20_000)]
    metrics[12_345]["loss"] = 9.0
    text = html(metrics)
    assert len(text) < 150_000
    (band,) = drawn(charts(text)["Loss"], kind="range")
    assert len(band) <= chart.MAX_POINTS
    (v0, y0), *_, (v1, y1) = grid(charts(text)["Loss"])
    assert min(y for _, y in band) == pytest.approx(y0 + (9 - v0) / (v1 - v0) * (y1 - y0), abs=0.06)


def test_means_of_stretches():
    points = [(s, float(s % 4)) for s in range(16)]
    assert chart.means(points, 4) == [(1.5, 1.5), (5.5, 1.5), (9.5, 1.5), (13.5, 1.5)]
    assert chart.means([(0, None), (1, None), (2, 1.0), (3, None)], 2) == [(0, None), (2.0, 1.0)]


def test_a_step_that_was_logged_again_counts_once():
    metrics = [{"step": 2, "loss": 5.0}, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 3.0}]
    assert metric_points(metrics, "loss") == [(1, 1.0), (2, 3.0)]


def test_the_page_is_self_contained():
    text = html(summary={"model": "x", "eval_loss": 0.123456, "steps": 12000, "bad": None})
    assert not re.search(r"https?:|//|<script|<link|@import|url\(", text.replace("<!DOCTYPE", ""))
    assert "default-src 'none'" in text
    tiles = [(d.find("dt").text, d.find("dd").text) for d in parse(text).find(".//dl").iter("div")]
    assert tiles == [
        ("model", "x"),
        ("eval loss", "0.1235"),
        ("steps", "12,000"),
        ("bad", "not finite"),
    ]


def test_texts_are_escaped_and_shown_unchanged():
    page = parse(html(config="lora:\n  r: 8 # <&>\n"))
    assert page.find(".//h1").text == "A <run>"
    assert "".join(page.find(".//pre").itertext()) == "lora:\n  r: 8 # <&>\n"
    rows = [["".join(cell.itertext()) for cell in row.iter("td")] for row in page.iter("tr")]
    assert ["<b>&\\x1b[31m", "✗ no", "✓ yes ", "yes"] in rows
    assert ["second", "✗ no", "✗ no", "yes"] in rows
    assert ["20", "2.5", "12.18"] in rows  # the evaluations


def test_the_data_is_listed_with_what_may_surprise():
    sources = ("role", "source", "rows"), [("train", "a <&>.jsonl", 1200), ("eval", "b.jsonl", 3)]
    page = parse(html(sources=sources, warnings=["a <&>.jsonl: 3 rows teach an empty reply"]))
    rows = [[cell.text for cell in row.iter("td")] for row in page.iter("tr")]
    assert ["train", "a <&>.jsonl", "1,200"] in rows and ["eval", "b.jsonl", "3"] in rows
    said = [p.text for p in page.iter("p") if p.get("class") == "warning"]
    assert said == ["a <&>.jsonl: 3 rows teach an empty reply"]
    assert "<h2>Data</h2>" not in html()


def test_free_text_is_not_marked():
    assert "✗" in html()
    assert "✗" not in html(samples=SAMPLES[1:])


def test_written_in_place(tmp_path):
    path = report.write_report(tmp_path / "run", html())
    assert path == tmp_path / "run" / "report.html"
    assert path.read_text(encoding="utf-8") == html()


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (0, 1, 5, (0, 0.5, 1)),
        (0, 1, 6, (0, 0.2, 0.4, 0.6, 0.8, 1)),
        (0.13, 4.2, 5, (0, 2, 4, 6)),
        (-1, 1, 5, (-1, -0.5, 0, 0.5, 1)),
        (1e-5, 2e-4, 5, (0, 5e-5, 1e-4, 1.5e-4, 2e-4)),
        (3, 3, 3, (2.5, 3, 3.5)),
    ],
)
def test_ticks_are_round_and_span_the_values(low, high, count, expected):
    found = chart.ticks(low, high, count)
    assert found[0] <= low and found[-1] >= high
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [(0.0, 0.5, "0"), (0.5, 0.5, "0.5"), (0.25, 0.05, "0.25"), (2.0, 1.0, "2"), (1e4, 1e3, "10k"),
     (12500, 500, "12,500"), (1.5e-4, 5e-5, "1.5e-4"), (2e-4, 1e-4, "2e-4"), (7500, 2500, "7.5k")],
)  # fmt: skip
def test_tick_labels(value, step, text):
    assert chart.tick_label(value, step) == text


def test_a_chart_without_numbers_is_omitted():
    assert chart.line_chart("x", [Series("a", [(1, None)])]) == ""
