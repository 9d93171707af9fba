"""``report.html``: a training run on one page, which needs no network and no scripts.

Model replies and settings are untrusted text: everything is escaped, and the content security
policy forbids scripts, so that a reply cannot run code when the page is opened.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from jlora.files import write_atomic
from jlora.ui.report.chart import Frame, Point, Series, line_chart
from jlora.ui.samples import SAMPLE_FIELDS, is_as_expected

SMALL_FRAME = Frame(width=520, height=230)
CHARTS = (  # title, frame, unit, ((name in metrics.jsonl, name in the legend), …)
    ("Loss", Frame(1040, 320), "", (("loss", "training"), ("eval_loss", "held out"))),
    ("Classes", SMALL_FRAME, "held out", (("eval_accuracy", "accuracy"), ("eval_f1", "F1"))),
    ("Exact match", SMALL_FRAME, "", (("eval_exact_match", "held out"),)),
    ("Learning rate", SMALL_FRAME, "", (("learning_rate", "learning rate"),)),
    ("Gradient norm", SMALL_FRAME, "before clipping", (("grad_norm", "gradient norm"),)),
    ("Speed", SMALL_FRAME, "tokens a second", (("tokens_per_second", "tokens/s"),)),
)


Table = tuple[Sequence[str], Sequence[Sequence[Any]]]
"""The names of columns, and rows."""


def write_report(output_dir: str | os.PathLike[str], page: str) -> Path:
    """Writes ``<output_dir>/report.html`` atomically and returns its path. Raises StorageError."""
    path = Path(output_dir) / "report.html"
    write_atomic(path, page)
    return path


def report_html(
    *,
    title: str,
    config_yaml: str,
    metrics: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, str]],
    summary: Mapping[str, Any],
    sources: Table,
    warnings: Sequence[str],
) -> str:
    """The HTML of the page, which is also well-formed XML.

    Args:
      title: the page's heading.
      config_yaml: the resolved settings.
      metrics: the lines of metrics.jsonl; a value that is null leaves a gap in its curve.
      samples: rows with the keys ``prompt``, ``before``, ``after``, ``expected``, or some of them.
      summary: names and values for the tiles at the top.
      sources: the sources of the data with their counts.
      warnings: what may surprise in the data.
    """
    style = resources.files("jlora.ui.report").joinpath("style.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"/>'
        f"<title>{_text(title)} – jlora</title><style>\n{style}</style></head>\n<body><main>"
        f"<h1>{_text(title)}</h1>"
        + "\n".join(
            [
                _tiles(summary),
                _charts(metrics),
                _samples(samples),
                _evaluations(metrics),
                _data(sources, warnings),
                _settings(config_yaml),
            ]
        )
        + "</main></body></html>\n"
    )


def _tiles(summary: Mapping[str, Any]) -> str:
    def tile(name: str, value: Any) -> str:
        text = _number(value)
        long = ' class="long"' if len(text) > 16 else ""
        return f'<div class="tile"><dt>{_text(name)}</dt><dd{long}>{_text(text)}</dd></div>'

    tiles = "".join(tile(_words(name), value) for name, value in summary.items())
    return f'<dl class="tiles">{tiles}</dl>' if tiles else ""


def _charts(metrics: Sequence[Mapping[str, Any]]) -> str:
    cards = []
    for title, frame, unit, names in CHARTS:
        curves = [
            Series(legend, metric_points(metrics, name), style)
            for (name, legend), style in zip(names, "ab", strict=False)
        ]
        if svg := line_chart(title, curves, frame, unit):
            drawn = [c for c in curves if any(y is not None for _, y in c.points)]
            wide = " wide" if frame.width > SMALL_FRAME.width else ""
            cards.append(
                f'<section class="card{wide}"><header><h3>{title}</h3>{_legend(drawn)}</header>'
                f"{svg}{_gaps(curves)}</section>"
            )
    if not cards:
        return '<p class="quiet">No metrics were logged.</p>'
    return f'<h2>Curves</h2><div class="charts">{"".join(cards)}</div>'


def metric_points(metrics: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    """(step, value) of the metric ``name``, by step; the last line of a step counts."""
    values = {line["step"]: _finite(line[name]) for line in metrics if name in line}
    return sorted(values.items())


def _finite(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def _legend(curves: Sequence[Series]) -> str:
    if len(curves) < 2:
        return ""
    names = "".join(f'<span class="{c.style}">{_text(c.name)}</span>' for c in curves)
    return f'<div class="legend">{names}</div>'


def _gaps(curves: Sequence[Series]) -> str:
    steps = sorted(step for c in curves for step, value in c.points if value is None)
    if not steps:
        return ""
    count = "1 value was" if len(steps) == 1 else f"{len(steps):,} values were"
    return f'<p class="warning">{count} not finite, first at step {steps[0]:,}.</p>'


def _samples(samples: Sequence[Mapping[str, str]]) -> str:
    names = [name for name in SAMPLE_FIELDS if any(name in sample for sample in samples)]
    if not names:
        return ""
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    marked = any(is_as_expected(s, name) for s in samples for name in ("before", "after"))
    rows = "".join(
        f"<tr>{''.join(_sample_cell(sample, name, marked) for name in names)}</tr>"
        for sample in samples
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<h2>Samples</h2><div class="card scroll">{table}</div>'


def _sample_cell(sample: Mapping[str, str], name: str, marked: bool) -> str:
    """A table cell; ``marked``: with ✓ or ✗. Free text never equals the expected reply, so replies
    are marked only if at least one in the table does.
    """
    mark = ""
    if marked and name in ("before", "after"):
        right = ("right", "as expected", "✓")
        wrong = ("wrong", "not as expected", "✗")
        style, title, sign = right if is_as_expected(sample, name) else wrong
        mark = f'<span class="{style}" title="{title}">{sign}</span> '
    return f'<td class="sample {name}">{mark}{_text(sample.get(name, ""))}</td>'


def _evaluations(metrics: Sequence[Mapping[str, Any]]) -> str:
    lines = [line for line in metrics if any(key.startswith("eval_") for key in line)]
    if not lines:
        return ""
    names = list(dict.fromkeys(key for line in lines for key in line))
    rows = [[line.get(name, "") for name in names] for line in lines]
    shown = ' open="open"' if len(lines) <= 12 else ""
    return (
        f'<h2>Evaluations</h2><details class="card"{shown}>'
        f"<summary>{len(lines):,} in this run</summary>"
        f'<div class="scroll">{_table(list(map(_words, names)), rows)}</div></details>'
    )


def _data(sources: Table, warnings: Sequence[str]) -> str:
    if not sources[1]:
        return ""
    said = "".join(f'<p class="warning">{_text(text)}</p>' for text in warnings)
    return f'<h2>Data</h2><div class="card scroll">{_table(*sources)}{said}</div>'


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        return f'<td class="number">{_text(_number(value))}</td>'

    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in columns)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _settings(config_yaml: str) -> str:
    keys = re.sub(r"(?m)^(\s*(?:- )?)([\w.-]+)(?=:)", r"\1<b>\2</b>", _text(config_yaml))
    return f'<h2>Settings</h2><div class="card"><pre tabindex="0">{keys}</pre></div>'


def _number(value: Any) -> str:
    if value is None:
        return "not finite"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _words(name: str) -> str:
    """``eval_exact_match`` → ``eval exact match``."""
    return name.replace("_", " ")


def _text(value: Any) -> str:
    """Escaped for HTML; control characters, which XML forbids, as Python escapes."""
    written = {c: f"\\x{c:02x}" for c in (*range(9), *range(11, 32), 127)}
    return escape(str(value)).translate(written)
