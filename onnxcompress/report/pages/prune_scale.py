"""The page of ``prune-scale``: what is left of depth, width and resolution, and how the three were chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from onnxcompress.report.page import (
    Axis,
    Bar,
    Bars,
    Block,
    Content,
    Lines,
    Page,
    Plot,
    Point,
    Row,
    Section,
    Series,
    Table,
    code,
    number,
    text,
)
from onnxcompress.report.pages.finetune import better_tone
from onnxcompress.report.pages.sections import (
    base_name,
    before_after,
    changed_row,
    closing,
    count_card,
    figure_text,
    latency_card,
    latency_rows,
    layer_bytes,
    metric_axis,
    metric_card,
    metric_cell,
    metric_name,
    metric_row,
    plain_blocks,
    size_card,
    trade_off,
    training_blocks,
)
from onnxcompress.report.wording import bytes_text

AXES = ("depth", "width", "resolution")
CURVE_POINTS = 33


def page(content: Content) -> Page:
    before, after, latency = content["figures_before"], content["figures_after"], content["latency"]
    metric, found = content["metric"], content["predictor"]
    higher = True if found is None else found["higher_is_better"]
    tone = better_tone(content["before"], content["after"], higher)
    sections = [_figures(content, before, after, latency, metric), _pruned(content)]
    if found is not None:
        sections += [_choice(found, metric), _fits(found, metric), _collected(found, metric, content["finalists"])]
    return Page(
        verb="prune-scale",
        title=base_name(content["source"]),
        summary=_summary(content, found),
        verdict=f"Merged and unmerged network differ by {content['merge_error']:.1e} at most, measured on onnxruntime",
        verdict_tone="good",
        cards=[
            metric_card(metric, content["before"], content["after"], tone=tone),
            latency_card(latency),
            count_card("MACs", before["macs"], after["macs"]),
            size_card(before["size_bytes"], after["size_bytes"]),
        ],
        sections=[
            *sections,
            *([Section("Training", training_blocks(content["training"], metric))] if content["training"] else []),
            *layer_bytes(content.get("weight_bytes")),
            *closing(content),
        ],
        content=content.data,
    )


def _summary(content: Content, found: Mapping[str, Any] | None) -> str:
    goal = f" for {content['goal']}" if content["goal"] else ""
    sizes = ""
    if found is not None:
        sizes = "; left are " + ", ".join(
            f"{size:.0%} of the {axis}" for axis, size in zip(AXES, found["sizes"], strict=True)
        )
    learned = f" Learned from {content['learned_from']}." if content["learned_from"] else ""
    where = f" Written to {content['output']} in {content['seconds']:.0f} s."
    return f"Pruned in depth, width and resolution together{goal}{sizes}.{learned}{where}"


def _figures(
    content: Content, before: Mapping[str, Any], after: Mapping[str, Any], latency: Mapping[str, Any], metric: str
) -> Section:
    a, b = content["before"], content["after"]
    sizes = (before["size_bytes"], after["size_bytes"])
    rows = [
        metric_row(metric, a, b),
        *latency_rows(latency),
        changed_row("MACs", before["macs"], after["macs"]),
        changed_row("nodes", before["nodes"], after["nodes"]),
        changed_row("size", *sizes, (bytes_text(sizes[0]), bytes_text(sizes[1]))),
    ]
    plots = [
        *trade_off(metric, Axis("latency, ms", "ms"), (latency["original_ms"], a), (latency["result_ms"], b)),
        *trade_off(metric, Axis("size", "bytes"), (sizes[0], a), (sizes[1], b)),
    ]
    fitted = f"; before training it was {figure_text(metric, content['fitted'])}"
    note = f"{metric_name(metric)} is of {content['samples']:,} validation samples, by onnxruntime{fitted}."
    return Section("Before and after", [before_after(rows), *([Row(plots)] if plots else [])], note)


def _pruned(content: Content) -> Section:
    channels = content["channels"]
    rows = [[code(name), number(of), number(kept)] for name, (kept, of) in channels.items()]
    bars = [Bar(name, kept, f"{of:,} → {kept:,}", of) for name, (kept, of) in channels.items()]
    old, new = content["pixels"]
    where = "the input itself is that small" if content["native"] else "the input is scaled down inside the network"
    lines = [
        f"resolution: {old} → {new} pixels high; {where}" if old != new else f"resolution: {old} pixels, as it was"
    ]
    lines += [f"block deleted: {name}" for name in content["deleted"]] or ["no block was deleted"]
    blocks: list[Block] = [Lines(lines)]
    if bars:
        blocks.append(Bars("Channels of each group", bars[:24], names=("before", "kept")))
        blocks.append(Table(("group", "channels", "kept"), rows, "All groups that lost channels"))
    return Section("What went", blocks)


def _choice(found: Mapping[str, Any], metric: str) -> Section:
    rows = [
        [text(f"predicted {metric_name(metric)}"), metric_cell(metric, found["predicted"])],
        [text("its standard deviation"), number(found["deviation"], ".2g")],
        [text("predicted by the axes alone"), metric_cell(metric, found["product"])],
        [text("error of that off the axes, root mean square"), number(found["off_axis_error"], ".2g")],
        [text("cost, of the original's"), number(found["cost"], ".3f")],
        [text("allowed"), number(found["limit"], ".3f")],
        [text("networks within the limit"), number(found["triples"])],
        [text("points measured"), number(len(found["points"]))],
        [text("candidates that were trained for a while"), number(len(found["candidates"]))],
        [text("seconds of collecting"), number(found["seconds"], ",.0f")],
    ]
    sizes = [
        Bar(axis, size, f"{size:.1%}", 1.0, is_code=False) for axis, size in zip(AXES, found["sizes"], strict=True)
    ]
    refused = [f"{axis} was not pruned: {reason}" for axis, reason in found["refusals"].items()]
    blocks: list[Block] = [Bars("What is left of each axis", sizes, names=("original", "left")), Table(("", ""), rows)]
    if refused:
        blocks.append(Lines(refused))
    check = plain_blocks({"Karush-Kuhn-Tucker conditions": found["check"]}) if found["check"] else []
    return Section("The choice", [*blocks, *check], f"Axes are put together as a {found['form']}.")


def _fits(found: Mapping[str, Any], metric: str) -> Section:
    plots, rows = [], []
    for fit in found["fits"]:
        sizes, figures = fit["sizes"], fit["figures"]
        measured = [Point(x, y, f"{x:.1%} left") for x, y in zip(sizes, figures, strict=True) if y is not None]
        low = min([*sizes, found["sizes"][AXES.index(fit["axis"])] if fit["axis"] in AXES else 1.0])
        steps = [low + (1 - low) * step / (CURVE_POINTS - 1) for step in range(CURVE_POINTS)]
        curve = [Point(x, _polynomial(fit["coefficients"], x), "fit") for x in steps]
        series = [Series("fit", curve, "curve"), Series("measured", measured)]
        axis = Axis(f"share of {fit['axis']} left", "share")
        plots.append(Plot(f"{fit['axis'].capitalize()} alone", axis, metric_axis(metric), series))
        tried = ", ".join(
            f"{name}: {'no figure' if error is None else f'{error:.2g}'}" for name, error in fit["candidates"].items()
        )
        error = number(fit["loo_error"], ".2g")
        rows.append([text(fit["axis"]), number(len(sizes)), number(fit["degree"]), error, text(tried)])
    header = ("axis", "points", "degree", "leave-one-out error", "errors of the degrees that were tried")
    return Section(
        "Predictor",
        [Row(plots), Table(header, rows)],
        "One polynomial for each axis, through the original and fitted to what was measured on it.",
    )


def _polynomial(coefficients: Sequence[float], x: float) -> float:
    return sum(value * x**power for power, value in enumerate(coefficients))


def _collected(found: Mapping[str, Any], metric: str, finalists: Sequence[Mapping[str, Any]]) -> Section:
    series = []
    raced = [point for point in found["candidates"] if point["axis"] == "candidate"]  # mixed ones are points, too
    everything = [*found["points"], *raced, *finalists]
    for axis in (*AXES, "mixed", "candidate", "finalist"):
        points = [
            Point(point["cost"], point["figure"], point["name"])
            for point in everything
            if point["axis"] == axis and point["figure"] is not None
        ]
        if points:
            series.append(Series(axis, points))
    if found["predicted"] is not None and math.isfinite(found["predicted"]):
        series.append(Series("chosen, predicted", [Point(found["cost"], found["predicted"], "chosen")], labelled=True))
    cost = Axis("cost, of the original's", "share")
    plots = [Plot("Points that were measured", cost, metric_axis(metric), series)]
    rows = [
        [
            code(point["name"]),
            text(point["axis"]),
            *(number(size, ".3f") for size in point["sizes"]),
            number(point["macs"], ",.0f"),
            number(point["cost"], ".3f"),
            metric_cell(metric, point["fitted"]),
            metric_cell(metric, point["figure"]),
            number(point["loss"], ".4g"),
            number(point["seconds"], ",.0f"),
        ]
        for point in everything
    ]
    header = ("point", "axis", *AXES, "MACs", "cost", "before training", "after", "loss", "seconds")
    return Section("What was measured", [*plots, Table(header, rows, "All points")])
