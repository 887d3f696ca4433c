"""Where the marks of a plot go: an SVG's coordinates, as plain data for the template.

Colours and fonts are the page's style sheet's, so that a plot follows light and dark; names are escaped by the template
like all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from onnxcompress.report.page import Axis, Plot, Series, finite_points
from onnxcompress.report.wording import bytes_text

WIDTH, HEIGHT = 410, 270
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 14, 48
TICKS = 5
LABEL_ROOM, LABEL_HEIGHT = 120, 16  # of a label to the right of its point


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A dot with the words that belong to it."""

    x: float
    y: float
    words: str
    label: str
    anchor: str


@dataclass(frozen=True)
class Curve:
    """One series: its dots, and the points of a line through them."""

    name: str
    form: str
    marks: list[Mark]
    line: str


@dataclass(frozen=True)
class Drawing:
    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    curves: list[Curve]


class Scale:
    """A range of numbers on a range of pixels."""

    def __init__(self, values: Sequence[float], axis: Axis, first: float, last: float) -> None:
        low, high = min(values), max(values)
        if axis.from_zero:
            low = min(low, 0.0)
        margin = (high - low) * 0.08 or (0.01 if axis.unit == "share" and abs(high) <= 1 else abs(high) * 0.05) or 1.0
        self.low = low if axis.from_zero and low == 0 else low - margin
        self.high = high + margin
        if axis.unit in ("bytes", "ms") and min(values) >= 0:
            self.low = max(self.low, 0.0)
        if axis.unit == "share" and max(values) <= 1 < self.high:
            self.high = 1.0 + (self.high - self.low) * 0.02
        self.axis, self.first, self.last = axis, first, last

    def __call__(self, value: float) -> float:
        return round(self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first), 1)

    def ticks(self) -> list[Tick]:
        step = nice_step((self.high - self.low) / TICKS)
        found = [index * step for index in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [Tick(self(value), tick_text(value, step, self.axis)) for value in found]


def nice_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, at least ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next((factor * power for factor in (1, 2, 5) if factor * power >= rough * (1 - 1e-9)), 10 * power)


def tick_text(value: float, step: float, axis: Axis) -> str:
    if axis.unit == "bytes":
        return bytes_text(value).replace(".0 ", " ")
    if axis.unit == "share":
        digits = max(0, -math.floor(math.log10(step * 100) + 1e-9))
        return f"{100 * value:.{digits}f} %"
    if abs(value) >= 1e5 or (value and abs(step) < 1e-4):
        for limit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= limit:
                return f"{value / limit:.4g}{name}"
        return f"{value:.2g}"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def draw(plot: Plot) -> Drawing:
    """Lay out a plot that has points."""
    points = [point for series in plot.series for point in finite_points(series.points)]
    x = Scale([point.x for point in points], plot.x, LEFT, WIDTH - RIGHT)
    y = Scale([point.y for point in points], plot.y, HEIGHT - BOTTOM, TOP)
    placed: list[tuple[float, float]] = []
    curves = [_curve(series, plot, x, y, placed) for series in plot.series]
    return Drawing(WIDTH, HEIGHT, LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM, x.ticks(), y.ticks(), curves)


def _curve(series: Series, plot: Plot, x: Scale, y: Scale, placed: list[tuple[float, float]]) -> Curve:
    marks = []
    for point in finite_points(series.points):
        at = x(point.x)
        anchor = "end" if at > WIDTH - RIGHT - LABEL_ROOM else "start"
        where = f"{plot.x.name} {_value_text(point.x, plot.x)}, {plot.y.name} {_value_text(point.y, plot.y)}"
        words = f"{point.label or series.name}: {where}"
        label = point.label if series.labelled else ""
        if any(abs(at - other) < LABEL_ROOM and abs(y(point.y) - height) < LABEL_HEIGHT for other, height in placed):
            label = ""  # it would stand on another; the dot still says it when pointed at
        if label:
            placed.append((at, y(point.y)))
        marks.append(Mark(at, y(point.y), words, label, anchor))
    return Curve(series.name, series.form, marks, " ".join(f"{mark.x},{mark.y}" for mark in marks))


def _value_text(value: float, axis: Axis) -> str:
    if axis.unit == "bytes":
        return bytes_text(value)
    if axis.unit == "share":
        return f"{value:.2%}"
    return f"{value:.4g}" + (" ms" if axis.unit == "ms" else "")
