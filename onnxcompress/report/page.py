"""What a page consists of, before it is HTML or Markdown: sections of tables, bars, plots and text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Tone = Literal["", "good", "bad"]
Unit = Literal["", "bytes", "share", "ms"]
LONG_TEXT = 13  # characters beside a bar
FOLDED_ROWS = 25  # a longer table is closed until a reader opens it


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Args:
        text: What is shown.
        value: What the column is sorted by; None sorts by the text.
        tone: Whether it is good or bad news.
        is_code: A name out of a model, or a command.
    """

    text: str
    value: float | None = None
    tone: Tone = ""
    is_code: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; long ones are folded."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    kind: str = field(default="table", init=False)

    @property
    def has_header(self) -> bool:
        return any(self.header)

    @property
    def is_folded(self) -> bool:
        return len(self.rows) > FOLDED_ROWS and bool(self.title)

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers, but for some words between them, and are set to the right."""
        columns = [[row[i].value is not None for row in self.rows if row[i].text] for i in range(len(self.header))]
        return [bool(column) and 2 * sum(column) >= len(column) for column in columns]


@dataclass(frozen=True)
class Bar:
    """One bar.

    Args:
        label: What it is of.
        value: Its length.
        text: The value as it is shown.
        before: Length of a second bar above it, for what was there before.
        low: Lower end of an interval around the value.
        high: Upper end.
        is_code: Whether the label is a name out of a model.
    """

    label: str
    value: float
    text: str
    before: float | None = None
    low: float | None = None
    high: float | None = None
    is_code: bool = True


@dataclass(frozen=True)
class Bars:
    """Bars on one scale; ``names`` are those of the second bar and the first."""

    title: str
    bars: Sequence[Bar]
    note: str = ""
    names: tuple[str, str] = ("before", "after")
    kind: str = field(default="bars", init=False)

    @property
    def most(self) -> float:
        ends = [v for bar in self.bars for v in (bar.value, bar.before, bar.high) if v is not None and math.isfinite(v)]
        return max([*ends, 0.0]) or 1.0

    @property
    def has_long_texts(self) -> bool:
        return any(len(bar.text) > LONG_TEXT for bar in self.bars)

    def per_cent(self, value: float | None) -> float:
        """Length of a bar; nothing where there is no number."""
        if value is None or not math.isfinite(value):
            return 0.0
        return round(100 * max(value, 0.0) / self.most, 2)


@dataclass(frozen=True)
class Point:
    """A point of a plot, with a name where it should have one."""

    x: float
    y: float
    label: str = ""


@dataclass(frozen=True)
class Series:
    """Points that belong together: dots, a line through them, a curve without dots, or the way from one to the next."""

    name: str
    points: Sequence[Point]
    form: Literal["dots", "line", "curve", "arrow"] = "dots"
    labelled: bool = False


@dataclass(frozen=True)
class Axis:
    """What an axis shows."""

    name: str
    unit: Unit = ""
    from_zero: bool = False


@dataclass(frozen=True)
class Plot:
    """Series over two axes."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    note: str = ""
    kind: str = field(default="plot", init=False)

    @property
    def has_points(self) -> bool:
        return any(finite_points(series.points) for series in self.series)


def finite_points(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]


@dataclass(frozen=True)
class Lines:
    """Sentences, one a line."""

    lines: Sequence[str]
    title: str = ""
    kind: str = field(default="lines", init=False)


@dataclass(frozen=True)
class Code:
    """Commands as a shell reads them, or another text that is set line by line."""

    lines: Sequence[str]
    is_shell: bool = True
    kind: str = field(default="code", init=False)


@dataclass(frozen=True)
class Row:
    """Plots beside each other, where the window is wide enough."""

    plots: Sequence[Plot]
    kind: str = field(default="row", init=False)


Block: TypeAlias = Table | Bars | Plot | Row | Lines | Code


@dataclass(frozen=True)
class Section:
    """Blocks under a heading; ``note`` says in a sentence what is seen there."""

    title: str
    blocks: Sequence[Block]
    note: str = ""


@dataclass(frozen=True)
class Card:
    """A figure that a reader should see first."""

    name: str
    value: str
    before: str = ""
    change: str = ""
    tone: Tone = ""
    note: str = ""


@dataclass(frozen=True)
class Page:
    """One run.

    Args:
        verb: Of the command line.
        title: What it was run on.
        summary: What came of it, in a sentence.
        verdict: What was checked, in a sentence; "" where nothing was.
        verdict_tone: How the check ended.
        cards: The figures that matter most.
        sections: All the rest.
        content: The dictionary that all this is taken from.
    """

    verb: str
    title: str
    summary: str
    cards: Sequence[Card]
    sections: Sequence[Section]
    content: Mapping[str, Any]
    verdict: str = ""
    verdict_tone: Tone = ""


class Content(Mapping[str, Any]):
    """A dictionary that knows what was asked of it, so that a page can show the rest as well."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return self.data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    @property
    def rest(self) -> dict[str, Any]:
        return {key: value for key, value in self.data.items() if key not in self.read}


def code(name: Any) -> Cell:
    """A name out of a model."""
    return Cell(str(name), is_code=True)


def text(words: Any) -> Cell:
    return Cell("" if words is None else str(words))


def number(value: float | None, form: str = ",", unit: str = "", tone: Tone = "") -> Cell:
    """A number in a format of Python's; nothing for None, ``not finite`` for NaN and infinity."""
    if value is None:
        return Cell("")
    if not math.isfinite(value):
        return Cell("not finite", math.inf, tone)
    return Cell(f"{value:{form}}{unit}", float(value), tone)
