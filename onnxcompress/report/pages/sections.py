"""Sections that pages of several verbs have: versions, commands, bytes by layer, quality, latency."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from onnxcompress.report.page import (
    Axis,
    Bar,
    Bars,
    Block,
    Card,
    Cell,
    Code,
    Content,
    Lines,
    Plot,
    Point,
    Section,
    Series,
    Table,
    Tone,
    code,
    number,
    text,
)
from onnxcompress.report.wording import bytes_text, change, speed_text

BARS_SHOWN = 24
SMALLEST_CHANGE = 5e-4  # of a size: below that a change is neither good nor bad news
# Metrics between 0 and 1, which people read in per cent.
SHARES = {"top1": "top-1 accuracy", "top5": "top-5 accuracy", "agreement": "agreement with the original"}


def base_name(path: Any) -> str:
    """The last part of a path."""
    return PurePath(str(path)).name or str(path)


def times(before: float, after: float) -> str:
    """``3.20x smaller``, or the per cent that it grew."""
    if not before or not after or before == after:
        return "unchanged"
    return f"{before / after:.2f}x smaller" if before > after else change(before, after)


def fewer_is_better(before: float, after: float) -> Tone:
    if not before or abs(after / before - 1) < SMALLEST_CHANGE:
        return ""
    return "good" if after < before else "bad"


def size_card(before: float, after: float) -> Card:
    return Card(
        "size of the file",
        bytes_text(after),
        bytes_text(before),
        times(before, after),
        fewer_is_better(before, after),
    )


def count_card(name: str, before: float, after: float) -> Card:
    return Card(
        name,
        short_count(after),
        short_count(before),
        change(before, after) or "unchanged",
        fewer_is_better(before, after),
    )


def short_count(value: float) -> str:
    """A count that fits on a card: 1.83 M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:,.0f}"


def latency_card(latency: Mapping[str, Any]) -> Card:
    low, high = latency["low"], latency["high"]
    tone: Tone = "good" if low > 1 else "bad" if high < 1 else ""
    return Card(
        "latency",
        f"{latency['result_ms']:.3g} ms",
        f"{latency['original_ms']:.3g} ms",
        f"x{latency['ratio']:.2f} as fast" if not low <= 1 <= high else "no difference measured",
        tone,
    )


def is_share(name: str) -> bool:
    return name.split(",")[0] in SHARES


def metric_name(name: str) -> str:
    """``top1, as deployed`` as people say it."""
    first, comma, more = name.partition(",")
    return f"{SHARES.get(first, first)}{comma}{more}"


def metric_axis(name: str) -> Axis:
    return Axis(metric_name(name), "share" if is_share(name) else "")


def figure_text(name: str, value: float | None) -> str:
    """A metric as people read it: shares in per cent."""
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{100 * value:.2f} %" if is_share(name) else f"{value:.4g}"


def figure_change(name: str, before: float | None, after: float | None) -> str:
    if before is None or after is None or not math.isfinite(after - before):
        return ""
    if before == after:
        return "unchanged"
    if is_share(name):
        return f"{100 * (after - before):+.2f} points"
    return f"{after - before:+.4g}"


def metric_card(name: str, before: float | None, after: float | None, *, tone: Tone = "") -> Card:
    change_text = figure_change(name, before, after)
    return Card(metric_name(name), figure_text(name, after), figure_text(name, before), change_text, tone)


def metric_row(name: str, before: float | None, after: float | None) -> list[Cell]:
    sides = [metric_cell(name, value) for value in (before, after)]
    change_value = None if before is None or after is None else after - before
    return [text(metric_name(name)), *sides, Cell(figure_change(name, before, after), change_value)]


def metric_cell(name: str, value: float | None) -> Cell:
    return Cell(figure_text(name, value), value)


def latency_rows(latency: Mapping[str, Any]) -> list[list[Cell]]:
    return [
        [
            text("latency on onnxruntime"),
            number(latency["original_ms"], ".3f", " ms"),
            number(latency["result_ms"], ".3f", " ms"),
            text(speed_text(latency)),
        ]
    ]


def changed_row(name: str, before: float, after: float, shown: tuple[str, str] | None = None) -> list[Cell]:
    first, second = shown or (f"{before:,}", f"{after:,}")
    return [
        text(name),
        Cell(first, float(before)),
        Cell(second, float(after)),
        Cell(change(before, after), after / before - 1 if before else None, fewer_is_better(before, after)),
    ]


def before_after(rows: Sequence[Sequence[Cell]]) -> Table:
    return Table(("", "before", "after", "change"), rows)


def trade_off(
    name: str, x: Axis, before: tuple[float | None, float | None], after: tuple[float | None, float | None]
) -> list[Plot]:
    """Where original and result stand: a cost to the right, a quality upwards; nothing where a figure is missing."""
    figures = (*before, *after)
    if any(value is None or not math.isfinite(value) for value in figures):
        return []
    points = [Point(*before, "original"), Point(*after, "result")]  # type: ignore[arg-type]  # checked above
    y = metric_axis(name)
    series = Series("from original to result", points, "arrow", labelled=True)
    title = f"{y.name[:1].upper()}{y.name[1:]} and {x.name.split(',')[0]}"
    return [Plot(title, x, y, [series])]


def layer_bytes(weights: Mapping[str, Any] | None) -> list[Section]:
    """Bytes of weights before and after, the largest as bars and all that are listed as a table."""
    if not weights:
        return []
    before, after = weights.get("before"), weights["after"]
    old = {row["name"]: row for row in before["rows"]} if before else {}
    new = {row["name"]: row for row in after["rows"]}
    names = sorted({**new, **old}, key=lambda name: -max(_bytes(old, name), _bytes(new, name)))
    bars = [
        Bar(
            name,
            _bytes(new, name),
            bytes_text(_bytes(new, name)) if name in new else "gone",
            _bytes(old, name) if before else None,
        )
        for name in names[:BARS_SHOWN]
    ]
    rows = []
    for name in names:
        row = new.get(name) or old[name]
        shape = " x ".join(map(str, row["shape"]))
        sides = [number(_bytes(old, name))] if before else []
        rows.append(
            [code(name), text(row["read_by"]), text(f"{row['type']} {shape}"), *sides, number(_bytes(new, name))]
        )
    header = ("weight", "read by", "type and shape", *(("bytes before",) if before else ()), "bytes")
    rest = [
        f"{side['rest']['count']:,} smaller ones {when} are not listed: {bytes_text(side['rest']['bytes'])} together"
        for when, side in (("before", before), ("now", after))
        if side and side["rest"]["count"]
    ]
    shown = "" if len(names) <= BARS_SHOWN else f"the {BARS_SHOWN} largest of {len(names):,}"
    blocks: list[Block] = [Bars("Bytes of each weight", bars, shown), Table(header, rows, "All weights")]
    note = "A weight that is new was made by a pass out of those that are gone." if before else ""
    return [Section("Size by layer", [*blocks, *([Lines(rest)] if rest else [])], note)]


def _bytes(rows: Mapping[str, Mapping[str, Any]], name: str) -> int:
    return int(rows[name]["bytes"]) if name in rows else 0


def output_table(outputs: Sequence[Mapping[str, Any]]) -> Table:
    """Differences per output, as ``validate`` and ``optimize`` compare them."""
    rows = []
    for output in outputs:
        said = output["problem"] or output["unchecked"] or ("ok" if output["equivalent"] else "differs")
        rows.append(
            [
                code(output["name"]),
                number(output["max_abs"], ".2e"),
                number(max(output["relative"], output["mismatches"]), ".2e"),
                number(output["allowed"], ".0e"),
                number(output["cosine"], ".6f"),
                number(output["agreement"], ".2%"),
                Cell(said, tone="" if output["equivalent"] else "bad"),
                text(output["reason"]),
            ]
        )
    header = ["output", "max|d|", "max|d| / max|y|", "allowed", "cosine", "agreement", "result", "limit because"]
    if not any(output["reason"] for output in outputs):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return Table(header, rows)


def quality_blocks(quality: Mapping[str, Any]) -> list[Block]:
    """A measurement on samples that no fit has used."""
    rows = [
        [
            code(one["name"]),
            number(one["error"], ".4g"),
            number(one["cosine"], ".5f"),
            number(one["agreement"], ".2%"),
        ]
        for one in quality["outputs"]
    ]
    blocks: list[Block] = [Table(("output", "relative error", "cosine", "same top-1 class"), rows)]
    if quality["metric"] is not None:
        name = str(quality["metric"])
        before, after = quality["before"], quality["after"]
        blocks.append(before_after([metric_row(name, before, after)]))
    return blocks


def training_blocks(run: Mapping[str, Any], metric: str) -> list[Block]:
    """What became of the validation figure step by step."""
    ended = f"{run['steps']:,} of {run['total']:,} steps in {run['seconds']:.0f} s, last loss {run['loss'] or 0:.4g}"
    if run["stopped_early"]:
        ended += "; ended early, there was no new best"
    if run["resumed_from"] is not None:
        ended += f"; resumed at step {run['resumed_from']:,}"
    best = (
        f"best at step {run['best_step']:,}" if run["best_step"] else "no step was better than the start, which is kept"
    )
    points = [Point(step, figure, f"step {step}") for step, figure in run["history"] if figure is not None]
    axis = metric_axis(metric)
    series = [Series("on validation samples", points, "line")]
    kept = [point for point in points if point.x == run["best_step"]]
    if kept:
        series.append(Series("kept", kept[:1], "dots"))
    return [Plot("Validation while training", Axis("step"), axis, series), Lines([ended, best])]


def closing(content: Content) -> list[Section]:
    """What no page's own sections have shown, then how to repeat it and where it ran."""
    run = content.get("run") or {}
    environment = content.get("environment") or {}
    return [*rest(content), *_repeat(run, content), *_environment(environment, run)]


def rest(content: Content) -> list[Section]:
    """Everything that was not asked for, so that a page leaves nothing out."""
    left = {key: value for key, value in content.rest.items() if value not in (None, [], {}, "")}
    return [Section("More figures", plain_blocks(left))] if left else []


def plain_blocks(value: Mapping[str, Any]) -> list[Block]:
    """Any plain data as tables: one for the single values, one for each list of dictionaries."""
    single, blocks = [], list[Block]()
    for key, inner in value.items():
        name = str(key).replace("_", " ")
        if isinstance(inner, Mapping) and inner and not any(isinstance(one, (Mapping, list)) for one in inner.values()):
            blocks.append(Table((name, ""), [[text(one), _plain_cell(shown)] for one, shown in inner.items()]))
        elif isinstance(inner, list) and inner and all(isinstance(one, Mapping) for one in inner):
            columns = list(dict.fromkeys(column for one in inner for column in one))
            rows = [[_plain_cell(one.get(column)) for column in columns] for one in inner]
            blocks.append(Table([str(column).replace("_", " ") for column in columns], rows, name))
        elif isinstance(inner, list) and inner and all(isinstance(one, str) for one in inner):
            blocks.append(Lines(inner, name))
        elif isinstance(inner, Mapping) and inner:
            blocks += [Lines([f"{name}:"]), *plain_blocks(inner)]
        else:
            single.append([text(name), _plain_cell(inner)])
    return [*([Table(("", ""), single)] if single else []), *blocks]


def _plain_cell(value: Any) -> Cell:
    if value is None:
        return text("")
    if isinstance(value, bool):
        return text("yes" if value else "no")
    if isinstance(value, int):
        return number(value)
    if isinstance(value, float):
        return number(value, ".5g")
    if isinstance(value, (list, tuple)):
        return text(", ".join(_plain_cell(one).text for one in value))
    if isinstance(value, Mapping):
        return text(", ".join(f"{key} {_plain_cell(one).text}" for key, one in value.items()))
    return text(value)


def _repeat(run: Mapping[str, Any], content: Content) -> list[Section]:
    if not run:
        return []
    blocks: list[Block] = []
    commands = [run["command"]] if run["command"] else []
    source, output = content.get("input") or content.get("source"), content.get("output")
    if source and output and run["verb"] not in ("validate", "bench"):
        pair = shlex.join([str(source), str(output)])
        commands += [f"onnxcompress validate {pair}", f"onnxcompress bench {pair}"]
    if commands:
        blocks.append(Code(commands))
    if run["files"]:
        rows = [[code(one["path"]), number(one["bytes"]), code(one["sha256"])] for one in run["files"]]
        blocks.append(Table(("file", "bytes", "SHA-256"), rows))
    return [Section("Repeat it", blocks)] if blocks else []


def _environment(environment: Mapping[str, str], run: Mapping[str, Any]) -> list[Section]:
    rows = [[text(name), text(found)] for name, found in environment.items()]
    if run:
        rows.append([text("written"), text(run["written"].replace("T", " ").replace("+00:00", " UTC"))])
    return [Section("Environment", [Table(("", ""), rows)])] if rows else []
