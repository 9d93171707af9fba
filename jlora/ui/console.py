"""Console output of a run: colours and a progress bar in a terminal, plain lines elsewhere.

Nothing is computed here except the remaining time. Text from models and files is untrusted:
control characters in it are escaped, so that it cannot move the cursor or change colours.
"""

from __future__ import annotations

import io
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TextIO

import rich.console
from rich import box
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
)
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from jlora.ui.samples import SAMPLE_FIELDS, is_as_expected

ACCENT, QUIET, GOOD, WARN = "cyan", "bright_black", "green", "yellow"
DIRECTION_CONTROLS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
MAX_SAMPLE_LENGTH = 400  # characters shown of each text of a sample
BAR_DELAY = 2  # seconds of loading before a bar appears
LINE_INTERVAL = 5  # seconds between plain lines while loading


class HeaderTable(NamedTuple):
    """A section of the header that is a table; columns of numbers are right-aligned."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


Section = Mapping[str, Any] | HeaderTable


class Console:
    """Prints to ``file`` (stdout); ``enabled=False`` (processes other than 0) prints nothing.

    ``plain`` output is one line per event, without control characters; by default it is used if
    ``file`` is not a terminal.
    """

    def __init__(
        self,
        *,
        enabled: bool = True,
        file: TextIO | io.TextIOBase | None = None,
        plain: bool | None = None,
        width: int | None = None,
    ):
        self._file: Any = file or sys.stdout
        self._enabled = enabled
        self._rich = rich.console.Console(
            file=self._file,
            width=width,
            # rich would colour the numbers and paths in a user's text.
            highlight=False,
            force_terminal=not plain if plain is not None else None,
        )
        self.plain = not self._rich.is_terminal or self._rich.is_dumb_terminal
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._clock = _Clock(0, 0)

    def header(self, title: str, sections: Mapping[str, Section]) -> None:
        """Describes a run before it starts: each section is a mapping or a ``HeaderTable``."""
        if self.plain:
            self._lines([title])
            for name, section in sections.items():
                self._lines([name, *(f"  {line}" for line in _plain_section(section))])
            return
        grid = Table.grid(padding=(0, 3, 0, 0))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        mappings = [s for s in sections.values() if not isinstance(s, HeaderTable)]
        width = max((len(key) for section in mappings for key in section), default=0)
        for name, section in sections.items():
            grid.add_row(Text(name), _section(section, width))
            grid.add_row()
        rule = Rule(Text(title, style=f"bold {ACCENT}"), align="left", style=ACCENT)
        self._show(rule, "", grid)

    @contextmanager
    def progress(self, total: int, start: int = 0, label: str = "training") -> Iterator[None]:
        """A bar of ``total`` steps, ``start`` of them done: see ``advance`` and ``log``."""
        self._clock = _Clock(total, start)
        if self.plain or not self._enabled:
            yield
            return
        columns = MofNCompleteColumn(), TextColumn("{task.fields[text]}")
        with self._new_bar(label, *columns) as self._bar:
            self._task = self._bar.add_task("", total=total, completed=start, text="first step …")
            try:
                yield
            finally:
                self._bar.refresh()
        self._bar = None

    @contextmanager
    def loading(self, label: str = "loading") -> Iterator[Callable[[int, int], None]]:
        """Gives a callback ``report(bytes read, bytes in all)``.

        It shows a bar, or a plain line every few seconds; nothing if loading is quick.
        """
        start = last = time.monotonic()
        bar: Progress | None = None

        def report(done: int, total: int) -> None:
            nonlocal bar, last
            now = time.monotonic()
            if self.plain and now - last >= LINE_INTERVAL:
                last = now
                self._lines([f"{label}: {decimal(done)} of {decimal(total)}"])
            elif self._enabled and not self.plain and now - start >= BAR_DELAY:
                if bar is None:
                    bar = stack.enter_context(self._new_bar(label, DownloadColumn()))
                    bar.add_task("", total=total)
                bar.update(bar.task_ids[0], completed=done)

        with ExitStack() as stack:
            yield report

    def _new_bar(self, label: str, *columns: ProgressColumn) -> Progress:
        title = TextColumn(label, style="bold", markup=False)
        bar = BarColumn(None, complete_style=ACCENT, finished_style=GOOD)
        return Progress(title, bar, *columns, console=self._rich, expand=True)

    def advance(self, step: int) -> None:
        """Moves the bar to ``step`` steps done; cheap enough to call in every step."""
        self._clock.at(step)
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows the metrics of one step, given by their names in metrics.jsonl.

        In a terminal, training metrics are shown beside the bar and evaluations on lines.
        """
        self.advance(step)
        parts = [
            f"{label} {show(metrics[name])}" for name, label, show in METRICS if name in metrics
        ]
        if "loss" in metrics and (remaining := self._clock.remaining()):
            parts.append(f"eta {remaining}")
        if self._bar is None or "loss" not in metrics:
            total = f"/{self._clock.total}" if self._clock.total else ""
            self._lines([f"step {step}{total}  " + "  ".join(parts)])
        else:
            self._bar.update(
                self._task, text="  ".join(p for p in parts if p.startswith(BAR_LABELS))
            )

    def samples(self, samples: Sequence[Mapping[str, str]]) -> None:
        """Shows a table of replies, with the columns that the first sample has."""
        if not samples:
            return
        names = [name for name in SAMPLE_FIELDS if name in samples[0]]
        rows = [[_shorten(sample[name]) for name in names] for sample in samples]
        if self.plain:
            for number, row in enumerate(rows, start=1):
                cells = (
                    f"  {name + ':':<10}{_one_line(t)}" for name, t in zip(names, row, strict=True)
                )
                self._lines([f"sample {number}", *cells])
            return
        table = Table(box=box.ROUNDED, border_style=QUIET, show_lines=True, expand=True)
        for name in names:
            table.add_column(Text(name, style="bold"), ratio=1, overflow="fold")
        for row in rows:
            table.add_row(*_styled_sample(dict(zip(names, row, strict=True))))
        self._show(table)

    def card(self, title: str, where: Mapping[str, Any], commands: Sequence[str] = ()) -> None:
        """Ends a run's output: the paths of its results, and the commands to run next."""
        if self.plain:
            lines = [*(f"  {line}" for line in _plain_section(where))]
            self._lines(
                [title, *lines, *(["next"] * bool(commands)), *(f"  {c}" for c in commands)]
            )
            return
        body: list[RenderableType] = [_section(where)]
        if commands:
            body += [Text("\nnext", style="bold"), *(_command(c) for c in commands)]
        heading = Text(title, style=f"bold {GOOD}")
        panel = Panel(
            Group(*body), title=heading, title_align="left", border_style=GOOD, padding=(1, 2)
        )
        self._show(panel)

    def text(self, text: Text) -> None:
        """Shows a styled text; plain output has « and » around what is green in a terminal."""
        if self.plain:
            green = [span for span in text.spans if GOOD in str(span.style)]
            marks = [(s.start, 1, "«") for s in green] + [(s.end, 0, "»") for s in green]
            shown = text.plain
            for place, _, mark in sorted(marks, reverse=True):
                shown = shown[:place] + mark + shown[place:]
            self._lines(shown.splitlines())
        else:
            self._show(text)

    def note(self, text: str) -> None:
        """Shows a line of information."""
        self._lines([text], style=QUIET)

    def warn(self, text: str) -> None:
        """Shows a warning: something that is probably not intended."""
        self._lines([f"warning: {text}"], style=WARN)

    def _lines(self, lines: Sequence[str], style: str = "") -> None:
        """Prints lines; plain ones are never wrapped, so that they can be searched and copied."""
        if not self._enabled:
            return
        for line in lines:
            text = escape_controls(line)
            if self.plain:
                encoding = getattr(self._file, "encoding", None) or "utf-8"
                print(
                    text.encode(encoding, "replace").decode(encoding), file=self._file, flush=True
                )
            else:
                self._rich.print(Text(text, style=style))

    def _show(self, *renderables: RenderableType) -> None:
        if self._enabled:
            self._rich.print(*renderables, sep="\n")


class _Clock:
    """Estimates the remaining time from the pace after the first step, which includes compiling."""

    def __init__(self, total: int, start: int):
        self.total, self.step = total, start
        self._first: tuple[int, float] | None = None
        self._last = 0.0

    def at(self, step: int) -> None:
        self.step, self._last = step, time.monotonic()
        if self._first is None:
            self._first = (step, self._last)

    def remaining(self) -> str | None:
        if self._first is None or self.step <= self._first[0] or self.step >= self.total:
            return None
        pace = (self._last - self._first[1]) / (self.step - self._first[0])
        return duration(pace * (self.total - self.step))


def duration(seconds: float) -> str:
    """``59s``, ``4m10s``, ``2h05m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"


def escape_controls(text: str) -> str:
    """``text`` with control characters, except line breaks, written as Python escapes."""
    return "".join(
        c.encode("unicode_escape").decode() if c != "\n" and _is_control(c) else c for c in text
    )


def _is_control(c: str) -> bool:
    """Whether ``c`` is a control character or changes the direction of the text after it."""
    return unicodedata.category(c) == "Cc" or unicodedata.bidirectional(c) in DIRECTION_CONTROLS


def _number(form: str) -> Any:
    return lambda value: "-" if value is None else format(value, form)


METRICS = (  # name in metrics.jsonl, label, formatter
    ("loss", "loss", _number(".4f")),
    ("learning_rate", "lr", _number(".2e")),
    ("grad_norm", "grad", _number(".3g")),
    ("epoch", "epoch", _number(".2f")),
    ("tokens_per_second", "tok/s", _number(",.0f")),
    ("eval_loss", "eval loss", _number(".4f")),
    ("eval_perplexity", "perplexity", _number(".4g")),
    ("eval_accuracy", "accuracy", _number(".1%")),
    ("eval_f1", "F1", _number(".4f")),
    ("eval_exact_match", "exact match", _number(".1%")),
)


BAR_LABELS = ("loss", "tok/s", "eta")  # the line beside the bar is short


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return escape_controls(str(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_SAMPLE_LENGTH else text[: MAX_SAMPLE_LENGTH - 1] + "…"


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n")


def _section(section: Section, width: int = 0) -> Table:
    """A mapping as two columns, the first at least ``width`` wide; a HeaderTable as a table."""
    if isinstance(section, HeaderTable):
        return _table(section)
    grid = Table.grid(padding=(0, 3, 0, 0))
    grid.add_column(style=QUIET, no_wrap=True, min_width=width)
    grid.add_column(overflow="fold")
    for key, value in section.items():
        grid.add_row(Text(key), Text(_text(value)))
    return grid


def _table(rows: HeaderTable) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        border_style=QUIET,
        padding=(0, 3, 0, 0),
    )
    for name, values in zip(rows.columns, _columns(rows), strict=True):
        right = bool(values) and all(isinstance(v, int | float) for v in values)
        table.add_column(
            Text(name, style=QUIET), justify="right" if right else "left", overflow="fold"
        )
    for row in rows.rows:
        table.add_row(*(Text(_text(value)) for value in row))
    return table


def _columns(rows: HeaderTable) -> list[list[Any]]:
    return [[row[i] for row in rows.rows] for i in range(len(rows.columns))]


def _plain_section(section: Section) -> list[str]:
    if not isinstance(section, HeaderTable):
        width = max((len(key) for key in section), default=0)
        return [f"{key:<{width}}  {_one_line(_text(value))}" for key, value in section.items()]
    columns = [
        [name, *map(_text, values)]
        for name, values in zip(section.columns, _columns(section), strict=True)
    ]
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    return ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]


def _styled_sample(sample: Mapping[str, str]) -> list[Text]:
    """The cells of a sample: the reply after training is green if as expected, else yellow."""
    cells = {name: Text(escape_controls(text)) for name, text in sample.items()}
    if "before" in cells:
        cells["before"].stylize(QUIET)
    if "after" in cells and "expected" in cells:
        cells["after"].stylize(GOOD if is_as_expected(sample, "after") else WARN)
    return list(cells.values())


def _command(command: str) -> Text:
    return Text.assemble(("$ ", QUIET), (escape_controls(command), ACCENT), overflow="fold")
