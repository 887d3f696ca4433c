"""Draw bytes against quality: what each method makes of one model, and the frontier that nothing else is beyond.

    python tools/bench_quantize.py MODEL.onnx --data CALIBRATION --test SAMPLES --json model.json
    python tools/plot_frontier.py model.json other.json -o frontier.svg

One panel for each file of ``bench_quantize --json``. The smaller and the lower, the better.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

OURS = "ours"
FLOOR = 1e-3  # errors below it are drawn at it
COLUMN = {"feature error": "feature_error", "output error": "output_error"}


@dataclass(frozen=True)
class Point:
    """One file.

    Attributes:
        name: As the table has it.
        size_bytes: Of the file.
        loss: What is drawn upwards.
    """

    name: str
    size_bytes: int
    loss: float

    @property
    def series(self) -> str:
        """Files that are joined by a line: those of ours that differ only in their ratio."""
        words = self.name.split(", ")
        return ", ".join([OURS, *words[1:]]) if words[0].split()[0] == OURS else self.name


def read_points(rows: Iterable[dict[str, Any]], measure: str) -> list[Point]:
    """The files of a bench that have the measure; the original, which loses nothing, stays out.

    Args:
        rows: As ``bench_quantize`` writes them.
        measure: "feature error", "output error", or "disagreement", which is 1 - agreement or 1 - accuracy.
    """
    found = []
    for row in rows:
        loss = 1 - row["quality"] if measure == "disagreement" else row[COLUMN[measure]]
        if loss is not None and row["name"] != "original":
            found.append(Point(row["name"], row["size_bytes"], loss))
    return found


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that no other is both smaller and better than, by rising size."""
    found: list[Point] = []
    for point in sorted(points, key=lambda one: (one.size_bytes, one.loss)):
        if not found or point.loss < found[-1].loss:
            found.append(point)
    return found


def draw(axes: Axes, title: str, original_bytes: int, points: Sequence[Point], measure: str) -> None:
    """One panel."""
    series: dict[str, list[Point]] = {}
    for point in points:
        series.setdefault(point.series, []).append(point)
    markers = iter("osD^vP*X<>")
    for name, members in series.items():
        members = sorted(members, key=lambda one: one.size_bytes)
        sizes = [one.size_bytes / 1e6 for one in members]
        losses = [max(one.loss, FLOOR) for one in members]
        axes.plot(sizes, losses, next(markers), linestyle="-" if len(members) > 1 else "", label=name)
    best = frontier(points)
    steps = ([one.size_bytes / 1e6 for one in best], [max(one.loss, FLOOR) for one in best])
    axes.step(*steps, where="post", color="0.8", zorder=0, label="frontier")
    for ratio in (4, 8, 16, 32):
        axes.axvline(original_bytes / ratio / 1e6, color="0.93", zorder=-1)
        axes.annotate(f"{ratio}x", (original_bytes / ratio / 1e6, 1), xycoords=("data", "axes fraction"), fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="file, MB", ylabel=measure)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_title(title, pad=14)
    axes.legend(fontsize=7)


def plot(benches: Sequence[dict[str, Any]], measure: str, target: Path) -> None:
    """Draw all panels into a picture; its suffix says of which kind."""
    figure = Figure(figsize=(5.2 * len(benches), 4))
    panels = figure.subplots(1, len(benches), squeeze=False)
    for axes, bench in zip(panels[0], benches, strict=True):
        (original,) = (row for row in bench["rows"] if row["name"] == "original")
        points = read_points(bench["rows"], measure)
        if not points:
            raise SystemExit(f"{bench['model']}: no row has the {measure}")
        draw(axes, bench["model"], original["size_bytes"], points, measure)
    figure.tight_layout()
    # Without a date and names drawn at random, the same figures give the same file.
    with rc_context({"svg.hashsalt": "onnxcompress"}):
        figure.savefig(target, dpi=110, metadata={"Date": None} if target.suffix == ".svg" else None)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benches", nargs="+", type=Path, help="JSON of bench_quantize")
    parser.add_argument("-o", "--output", type=Path, required=True, help="picture: .svg, .png, .pdf")
    parser.add_argument("--measure", default="feature error", choices=[*COLUMN, "disagreement"])
    wishes = parser.parse_args(arguments)
    plot([json.loads(path.read_text()) for path in wishes.benches], wishes.measure, wishes.output)


if __name__ == "__main__":
    main()
