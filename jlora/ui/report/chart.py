"""Line charts as inline SVG, without scripts, fonts or anything from the network.

A chart maps values linearly onto its ``Frame``; ``Scale`` is that map, so that tests can compute
where a value is drawn. Colours come from the page's CSS variables.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

Point = tuple[float, float | None]
"""A step and a value; None if the value was not finite, which leaves a gap."""

MAX_POINTS = 800  # of one curve; more cannot be told apart
MAX_MEANS = 160
MAX_HOVER_COLUMNS = 120  # columns that show values under the pointer


class Frame(NamedTuple):
    """The drawing area inside a picture of ``width`` × ``height`` units."""

    width: int = 640
    height: int = 260
    left: int = 58
    right: int = 28
    top: int = 26
    bottom: int = 38


class Scale(NamedTuple):
    """A linear map of ``low … high`` onto ``start … end`` with its tick values."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        """The coordinate of ``value``."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


class Series(NamedTuple):
    """A named curve; ``style`` is the CSS class that colours it."""

    name: str
    points: Sequence[Point]
    style: str = "a"


def ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> tuple[float, ...]:
    """About ``count`` round values that span ``low … high``: multiples of 1, 2 or 5 · 10ⁿ."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    # The margin is for rounding: (0.27 - 0.15) / 6 is an ulp above 0.02, and would get 0.05.
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    if whole:
        step = max(step, 1.0)
    # 0.3 / 0.1 is less than 3 in binary: without the margin there would be a tick too many.
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(i * step for i in range(first, last + 1))


def tick_label(value: float, step: float) -> str:
    """A tick's text, with as many decimals as ticks ``step`` apart need."""
    if value == 0:
        return "0"
    if step >= 1000:
        return f"{value / 1000:,.{0 if step % 1000 == 0 else 1}f}k"
    if step < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most about ``most`` points that draw the same outline.

    The lowest and the highest point of each stretch are kept, so that no spike is lost; of the gaps
    in a stretch, one is kept.
    """
    if len(points) <= most:
        return list(points)
    kept: list[Point] = []
    size = len(points) / (most // 2)
    for i in range(most // 2):
        part = points[int(i * size) : int((i + 1) * size)]
        numbers = [p for p in part if p[1] is not None]
        if len(numbers) < len(part):
            kept.append(next(p for p in part if p[1] is None))
        if numbers:
            ends = {min(numbers, key=_value), max(numbers, key=_value)}
            kept += ends
    return sorted(kept, key=lambda p: p[0])


def means(points: Sequence[Point], most: int = MAX_MEANS) -> list[Point]:
    """The mean step and value of each of ``most`` stretches; an empty stretch is a gap."""
    size = len(points) / most
    result: list[Point] = []
    for i in range(most):
        part = points[int(i * size) : int((i + 1) * size)]
        numbers = [(step, value) for step, value in part if value is not None]
        if numbers:
            steps, values = zip(*numbers, strict=True)
            result.append((sum(steps) / len(steps), sum(values) / len(values)))
        elif part:
            result.append((part[0][0], None))
    return result


def line_chart(
    title: str, series: Sequence[Series], frame: Frame | None = None, unit: str = ""
) -> str:
    """The curves over their steps as one ``<svg>``; empty when no series has a number."""
    frame = frame or Frame()
    series = [s for s in series if any(y is not None for _, y in s.points)]
    if not series:
        return ""
    x, y = scales(series, frame)
    parts = [_axes(x, y, frame, unit)]
    parts += [_curve(s, x, y) for s in series]
    parts.append(_hover_columns(series, x, y, frame))
    return (
        f'<svg class="chart" viewBox="0 0 {frame.width} {frame.height}" role="img" '
        f'aria-label="{escape(_summary(title, series))}">{"".join(parts)}</svg>'
    )


def scales(series: Sequence[Series], frame: Frame) -> tuple[Scale, Scale]:
    """The horizontal scale ends at the first and last step; the vertical one at round values."""
    steps = [p[0] for s in series for p in s.points]
    values = [p[1] for s in series for p in s.points if p[1] is not None]
    first, last = min(steps), max(steps)
    if first == last:
        first, last = first - 1, last + 1
    inside = tuple(t for t in ticks(first, last, 7, whole=True) if first <= t <= last)
    x = Scale(first, last, frame.left, frame.width - frame.right, inside)
    low, high = min(values), max(values)
    if low > 0 and low < 0.5 * high:
        low = 0.0  # a curve that falls to near zero is shown against zero
    marks = ticks(low, high, frame.height // 45)
    y = Scale(marks[0], marks[-1], frame.height - frame.bottom, frame.top, marks)
    return x, y


def _value(point: Point) -> float:
    return math.nan if point[1] is None else point[1]


def _axes(x: Scale, y: Scale, frame: Frame, unit: str) -> str:
    parts = []
    step = y.ticks[1] - y.ticks[0]
    for value in y.ticks:
        height = f"{y(value):.1f}"
        parts.append(
            f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{height}" y2="{height}"/>'
        )
        parts.append(
            f'<text class="tick" x="{x.start - 8}" y="{height}" dy="0.32em" '
            f'text-anchor="end">{tick_label(value, step)}</text>'
        )
    for value in x.ticks:
        parts.append(
            f'<text class="tick" x="{x(value):.1f}" y="{frame.height - frame.bottom + 18}" '
            f'text-anchor="middle">{value:,.0f}</text>'
        )
    parts.append(
        f'<text class="tick" x="{x.end}" y="{frame.height - 5}" text-anchor="end">step</text>'
    )
    if unit:
        parts.append(f'<text class="tick" x="4" y="12">{escape(unit)}</text>')
    return "".join(parts)


def _curve(series: Series, x: Scale, y: Scale) -> str:
    """The points as a line, interrupted at gaps; few or isolated points as dots, too.

    More than MAX_POINTS are drawn as a pale band with their means over stretches on top.
    """
    if len(series.points) > MAX_POINTS:
        lines = _path(thin(series.points), x, y, "range") + _path(means(series.points), x, y)
    else:
        lines = _path(series.points, x, y)
    few = len(series.points) <= 40
    alone = [s for s in _stretches(series.points) if few or len(s) == 1]
    dots = [
        f'<circle class="dot" cx="{x(step):.2f}" cy="{y(value):.2f}" r="3"/>'
        for stretch in alone
        for step, value in stretch
    ]
    return f'<g class="series {series.style}">{lines}{"".join(dots)}</g>'


def _path(points: Sequence[Point], x: Scale, y: Scale, style: str = "curve") -> str:
    """One path, with a new start after every gap."""
    parts = [
        "M" + "L".join(f"{x(step):.2f},{y(value):.2f}" for step, value in stretch)
        for stretch in _stretches(points)
        if len(stretch) > 1
    ]
    return f'<path class="{style}" d="{"".join(parts)}"/>' if parts else ""


def _stretches(points: Iterable[Point]) -> list[list[tuple[float, float]]]:
    """The points between gaps."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for step, value in points:
        if value is None:
            stretches.append([])
        else:
            stretches[-1].append((step, value))
    return [s for s in stretches if s]


def _hover_columns(series: Sequence[Series], x: Scale, y: Scale, frame: Frame) -> str:
    """Columns that show the values of a step while the pointer is over them: CSS, no scripts."""
    logged: dict[float, dict[str, tuple[float, str]]] = {}
    for s in series:
        for step, value in s.points:
            if value is not None:
                logged.setdefault(step, {})[s.name] = (value, s.style)
    steps = sorted(logged)
    stride = math.ceil(len(steps) / MAX_HOVER_COLUMNS)
    shown = [s for i, s in enumerate(steps) if i % stride == 0 or s == steps[-1]]
    edges = [x.start, *((x(a) + x(b)) / 2 for a, b in pairwise(shown)), x.end]
    return "".join(
        _hover_column(step, logged[step], (edges[i], edges[i + 1]), x, y, frame)
        for i, step in enumerate(shown)
    )


def _hover_column(
    step: float,
    values: Mapping[str, tuple[float, str]],
    edges: tuple[float, float],
    x: Scale,
    y: Scale,
    frame: Frame,
) -> str:
    place, floor = f"{x(step):.2f}", frame.height - frame.bottom
    text = " · ".join(f"{name} {_shown(value)}" for name, (value, _) in values.items())
    dots = "".join(
        f'<circle class="{style}" cx="{place}" cy="{y(value):.2f}" r="4"/>'
        for value, style in values.values()
    )
    return (
        f'<g class="stop"><rect x="{edges[0]:.2f}" y="{frame.top}" '
        f'width="{max(edges[1] - edges[0], 0.01):.2f}" height="{floor - frame.top}"/>'
        f'<g class="shown"><line x1="{place}" x2="{place}" y1="{frame.top}" y2="{floor}"/>{dots}'
        f'<text x="{x.end}" y="12" text-anchor="end">step {step:,.0f} · {escape(text)}</text>'
        "</g></g>"
    )


def _summary(title: str, series: Sequence[Series]) -> str:
    """The chart in words, for screen readers."""
    parts = []
    for s in series:
        numbers = [(step, value) for step, value in s.points if value is not None]
        (first, a), (last, b) = numbers[0], numbers[-1]
        parts.append(
            f"{s.name} from {_shown(a)} at step {first:,.0f} to {_shown(b)} at step {last:,.0f}"
        )
    return f"{title}: {'; '.join(parts)}"


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
