"""Line and area charts as inline SVG, for pages that must stand alone.

Each figure is drawn twice, over steps and over tokens; the page shows one of them. Colours are CSS
variables `--c0`, `--c1`, ... so that a page decides how they look in light and dark. The numbers of a
figure stand beside it as JSON, for `report.js` to show under the pointer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise
from statistics import median

from megafab.telemetry.terminal import short

WIDTH, HEIGHT = 560, 270
WIDE = 1150  # a figure over both columns
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 8, 34  # margins around the plot
COLORS = 10
MAX_POINTS = 600  # a series with more is thinned; more than the pixels of a chart show nothing new
SMOOTH_FROM = 60  # points from which a smoothed line is drawn over the raw one

X_AXES = ("step", "tokens")


@dataclass(frozen=True, slots=True)
class Series:
    """One curve. `values` has None where there is no finite number, which interrupts the line."""

    name: str
    color: int
    step: Sequence[float]
    tokens: Sequence[float]
    values: Sequence[float | None]
    dots: bool = False  # a dot at each point: few points
    smooth: bool = False  # noisy: the raw line faint, a moving median over it

    def x(self, axis: str) -> Sequence[float]:
        """The abscissa over `step` or `tokens`."""
        return self.step if axis == "step" else self.tokens

    def take(self, indices: Sequence[int]) -> Series:
        """The series at some of its points."""
        return replace(
            self,
            step=[self.step[i] for i in indices],
            tokens=[self.tokens[i] for i in indices],
            values=[self.values[i] for i in indices],
        )


@dataclass(frozen=True, slots=True)
class Mark:
    """An event on the x axis; `kind` is `restart` or `skipped`."""

    kind: str
    color: int
    step: float
    tokens: float


@dataclass(frozen=True, slots=True)
class Axis:
    """Data values to [0, 1]."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def fit(
        cls, values: Iterable[float | None], *, zero: bool = False, robust: bool = False, log: bool = False
    ) -> Axis:
        """The axis that shows `values`.

        Args:
            values: what is to be seen; None is ignored.
            zero: begin at 0.
            robust: leave the highest 5 % of many values out of sight, so that a spike or the first steps
                do not press the rest flat.
            log: logarithmic; values that are not positive are ignored.
        """
        known = sorted(v for v in values if v is not None and (v > 0 or not log))
        if not known:
            return cls(0.1, 1.0, log) if log else cls(0.0, 1.0)
        low, high = known[0], known[-1]
        if robust and len(known) >= 100:
            high = known[math.ceil(0.95 * len(known)) - 1]
        if log:
            return cls(low / 1.2, high * 1.2, log=True)
        if zero:
            return cls(min(0.0, low), high * 1.08 if high > 0 else 1.0)
        pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low - pad, high + pad)

    def at(self, value: float) -> float:
        """Where `value` lies between the ends; outside [0, 1] beyond them."""
        if self.log:
            value, low, high = (math.log(max(v, 1e-300)) for v in (value, self.low, self.high))
            return (value - low) / (high - low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, count: int = 5) -> list[float]:
        """About `count` round values within the axis."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            digits = (1, 2, 5) if len(decades) <= 3 else (1,)
            steps = [digit * 10.0**decade for decade in decades for digit in digits]
            return [step for step in steps if self.low <= step <= self.high]
        raw = (self.high - self.low) / count
        magnitude = 10.0 ** math.floor(math.log10(raw))
        step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]


def number(value: float) -> str:
    """A value in few characters: `3.21`, `12.3k`, `3e-4`."""
    if value == 0:
        return "0"
    if abs(value) >= 1e4:
        return short(value)
    if abs(value) < 1e-2:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def css_color(index: int) -> str:
    """The colour variable of the page for the `index`-th curve; colours repeat."""
    return f"var(--c{index % COLORS})"


def percent(value: float) -> str:
    """A share: `41.2%`."""
    return f"{100 * value:.3g}%"


def line_figure(
    title: str,
    series: Sequence[Series],
    *,
    axis: Axis | None = None,
    marks: Sequence[Mark] = (),
    label: Callable[[float], str] = number,
    note: str = "",
    wide: bool = False,
) -> str:
    """Curves over steps and tokens, with their legend, as an HTML figure."""
    series = [_thin(s) for s in series]
    axis = axis or Axis.fit(v for s in series for v in s.values)
    width = WIDE if wide else WIDTH
    plots = {}
    for x_axis in X_AXES:
        x = _x_axis(series, x_axis)
        curves = "".join(_curve(s, x_axis, x, axis, width) for s in series)
        events = "".join(_mark(mark, x_axis, x, width) for mark in marks)
        plots[x_axis] = _svg(title, x, axis, label, events + curves, x_axis, width)
    return _figure(title, series, plots, axis, label, note, width)


def stacked_figure(
    title: str,
    series: Sequence[Series],
    *,
    label: Callable[[float], str] = number,
    note: str = "",
    axis: Axis | None = None,
) -> str:
    """Series on top of each other, the first lowest. All have the same points; a missing value is 0."""
    series = _bucket_means(series)
    sums = _running_sums(series)
    axis = axis or Axis.fit(sums[-1], zero=True, robust=True)
    plots = {}
    for x_axis in X_AXES:
        x = _x_axis(series, x_axis)
        xs = [_px(x, v, WIDTH) for v in series[0].x(x_axis)]
        areas = [
            f'<path class="area" fill="{css_color(s.color)}" d="M{_points(xs, above, axis)}'
            f'L{_points(xs[::-1], below[::-1], axis)}Z"/>'
            for s, (below, above) in zip(series, pairwise(sums), strict=True)
        ]
        plots[x_axis] = _svg(title, x, axis, label, "".join(areas), x_axis, WIDTH)
    return _figure(title, series, plots, axis, label, note, WIDTH, stacked=True)


def stack_axis(groups: Iterable[Sequence[Series]]) -> Axis:
    """One axis that fits several stacks."""
    tops = (top for group in groups for top in _running_sums(_bucket_means(group))[-1])
    return Axis.fit(tops, zero=True, robust=True)


def _running_sums(series: Sequence[Series]) -> list[list[float]]:
    """Zeros, the first series, the first two, ...: the borders of the areas."""
    sums = [[0.0] * len(series[0].step)]
    for s in series:
        sums.append([below + (value or 0.0) for below, value in zip(sums[-1], s.values, strict=True)])
    return sums


def _thin(series: Series) -> Series:
    """At most MAX_POINTS points: of each run of neighbours the lowest and the highest stay."""
    count = len(series.values)
    if count <= MAX_POINTS:
        return series
    kept = {0, count - 1}
    for start, stop in _buckets(count, MAX_POINTS // 2):
        known = [(value, i) for i in range(start, stop) if (value := series.values[i]) is not None]
        kept |= {min(known)[1], max(known)[1]} if known else {start}
    return series.take(sorted(kept))


def _bucket_means(series: Sequence[Series]) -> list[Series]:
    """At most MAX_POINTS points: each the mean of a run of neighbours, at the last one's place."""
    count = len(series[0].values)
    if count <= MAX_POINTS:
        return list(series)
    buckets = list(_buckets(count, MAX_POINTS))
    return [
        replace(
            s.take([stop - 1 for _, stop in buckets]),
            values=[sum(v or 0.0 for v in s.values[a:b]) / (b - a) for a, b in buckets],
        )
        for s in series
    ]


def _buckets(count: int, buckets: int) -> Iterable[tuple[int, int]]:
    edges = [count * i // buckets for i in range(buckets + 1)]
    return pairwise(edges)


def moving_median(values: Sequence[float | None]) -> list[float | None]:
    """The median of about a fortieth of the values around each; None stays None.

    Centred, so that it does not lag behind a steep start, with a window that shrinks towards both ends;
    a median, so that a spike does not become a hill.
    """
    half = len(values) // 80 + 1
    medians: list[float | None] = []
    for i, value in enumerate(values):
        reach = min(half, i, len(values) - 1 - i)
        window = [v for v in values[i - reach : i + reach + 1] if v is not None]
        medians.append(None if value is None else median(window))
    return medians


def _x_axis(series: Sequence[Series], x_axis: str) -> Axis:
    values = [v for s in series for v in s.x(x_axis)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    return Axis(low, high if high > low else low + 1)


def _px(x: Axis, value: float, width: int) -> float:
    return LEFT + x.at(value) * (width - LEFT - RIGHT)


def _py(y: Axis, value: float) -> float:
    # Far outside the plot nothing is seen, and huge coordinates are not drawn well.
    return TOP + (1 - min(2.0, max(-1.0, y.at(value)))) * (HEIGHT - TOP - BOTTOM)


def _points(xs: Sequence[float], values: Sequence[float], y: Axis) -> str:
    return "L".join(f"{x:.1f} {_py(y, value):.1f}" for x, value in zip(xs, values, strict=True))


def _curve(series: Series, x_axis: str, x: Axis, y: Axis, width: int) -> str:
    color = css_color(series.color)
    xs = [_px(x, v, width) for v in series.x(x_axis)]
    smooth = series.smooth and len(xs) >= SMOOTH_FROM
    drawn = (
        f'<path class="line{" faint" if smooth else ""}" stroke="{color}" d="{_line(xs, series.values, y)}"/>'
    )
    if smooth:
        middle = moving_median(series.values)
        drawn += f'<path class="line" stroke="{color}" d="{_line(xs, middle, y)}"/>'
    if series.dots:
        drawn += "".join(
            f'<circle class="dot" stroke="{color}" cx="{px:.1f}" cy="{_py(y, value):.1f}" r="3"/>'
            for px, value in zip(xs, series.values, strict=True)
            if value is not None
        )
    return drawn


def _line(xs: Sequence[float], values: Sequence[float | None], y: Axis) -> str:
    """Path data; a new piece begins after each missing value, a lone point becomes a short dash."""
    pieces: list[list[str]] = [[]]
    for px, value in zip(xs, values, strict=True):
        if value is None or (y.log and value <= 0):
            pieces.append([])
        else:
            pieces[-1].append(f"{px:.1f} {_py(y, value):.1f}")
    return "".join("M" + "L".join(piece if len(piece) > 1 else piece * 2) for piece in pieces if piece)


def _mark(mark: Mark, x_axis: str, x: Axis, width: int) -> str:
    px = _px(x, mark.step if x_axis == "step" else mark.tokens, width)
    color = css_color(mark.color)
    if mark.kind == "restart":
        line = f'<line class="restart" stroke="{color}" x1="{px:.1f}" x2="{px:.1f}" y1="{TOP}"'
        return f'{line} y2="{HEIGHT - BOTTOM}"><title>restart</title></line>'
    base = HEIGHT - BOTTOM
    return f'<path class="skipped" d="M{px:.1f} {base - 8}l4.5 8h-9z"><title>update discarded</title></path>'


def _svg(
    title: str, x: Axis, y: Axis, label: Callable[[float], str], content: str, x_axis: str, width: int
) -> str:
    right, base = width - RIGHT, HEIGHT - BOTTOM
    grid = [
        f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{_py(y, t):.1f}" y2="{_py(y, t):.1f}"/>'
        f'<text x="{LEFT - 8}" y="{_py(y, t) + 3.5:.1f}" text-anchor="end">{escape(label(t))}</text>'
        for t in y.ticks()
    ]
    grid += [
        f'<text x="{_px(x, t, width):.1f}" y="{base + 16}" text-anchor="middle">{short(t)}</text>'
        for t in x.ticks(width // 90)
    ]
    unit = f'<text class="unit" x="{right}" y="{HEIGHT - 3}" text-anchor="end">{x_axis}</text>'
    # A nested svg clips what leaves the plot without an id that would have to be unique on the page;
    # the 4 units more are for the last dot.
    clipped = (
        f'<svg x="{LEFT}" y="{TOP}" width="{right + 4 - LEFT}" height="{base - TOP}" '
        f'viewBox="{LEFT} {TOP} {right + 4 - LEFT} {base - TOP}">{content}</svg>'
    )
    return (
        f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(title)} over {x_axis}" '
        f'data-x="{x_axis}" data-range="{x.low} {x.high}">{"".join(grid)}{unit}{clipped}'
        f'<line class="base" x1="{LEFT}" x2="{right}" y1="{base}" y2="{base}"/></svg>'
    )


def _figure(
    title: str,
    series: Sequence[Series],
    plots: dict[str, str],
    y: Axis,
    label: Callable[[float], str],
    note: str,
    width: int,
    stacked: bool = False,
) -> str:
    # One name a colour: dots in the colour of a line need no other. A single curve is named by the title.
    named = list({s.color: s for s in reversed(series)}.values())[::-1] if len(series) > 1 else []
    legend = "".join(
        f'<span><i class="{"ring" if s.dots else "box"}" style="--c:{css_color(s.color)}"></i>'
        f"{escape(s.name)}</span>"
        for s in named
    )
    data = {
        "plot": [LEFT, TOP, width - LEFT - RIGHT, HEIGHT - TOP - BOTTOM],
        "y": [y.low, y.high],
        "log": y.log,
        "percent": label is percent,
        "stacked": stacked,
        "series": [
            {
                "name": s.name,
                "color": s.color % COLORS,
                "step": list(s.step),
                "tokens": list(s.tokens),
                "y": [None if v is None else float(f"{v:.6g}") for v in s.values],
            }
            for s in series
        ],
    }
    drawings = "".join(f'<div class="plot by-{name}">{svg}</div>' for name, svg in plots.items())
    return (
        f'<figure class="{"wide" if width == WIDE else "narrow"}"><figcaption><b>{escape(title)}</b>'
        f"<em>{escape(note)}</em></figcaption>"
        f'<div class="legend">{legend}</div>{drawings}'
        f'<script type="application/json">{json_for_html(data)}</script></figure>'
    )


def json_for_html(data: object) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
