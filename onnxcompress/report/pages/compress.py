"""The page of ``compress``: whether the goal was reached, every step that was tried, and why it stayed or went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxcompress.report.page import (
    Axis,
    Block,
    Card,
    Cell,
    Code,
    Content,
    Lines,
    Page,
    Plot,
    Point,
    Row,
    Section,
    Series,
    Table,
    number,
    text,
)
from onnxcompress.report.pages.sections import (
    base_name,
    before_after,
    changed_row,
    closing,
    count_card,
    latency_card,
    latency_rows,
    layer_bytes,
    metric_axis,
    metric_card,
    metric_name,
    metric_row,
    size_card,
)
from onnxcompress.report.wording import bytes_text


def page(content: Content) -> Page:
    before, after = content["before"], content["after"]
    met, goal = content["goal_met"], content["goal"]
    cards = [size_card(before["size_bytes"], after["size_bytes"])]
    if after["latency"] is not None:
        cards.append(latency_card(after["latency"]))
    cards.append(count_card("MACs", before["macs"], after["macs"]))
    if after["before"] is not None and after["after"] is not None:
        cards.append(metric_card(after["criterion"], after["before"], after["after"]))
    elif after["drop"] is not None:
        cards.append(Card(f"drop of {metric_name(after['criterion'])}", f"{100 * after['drop']:.2f} %"))
    return Page(
        verb="compress",
        title=base_name(content["input"]),
        summary=_summary(content),
        verdict=f"The goal {goal} was {'reached' if met else 'not reached'}: {content['standing']}" if goal else "",
        verdict_tone="good" if met else "bad",
        cards=cards,
        sections=[
            _figures(content, before, after),
            _tried(content, before),
            *_steps(content),
            *([Section("Notes", [Lines(content["notes"])])] if content["notes"] else []),
            *(
                [Section("Recipe", [Code(content["recipe"].splitlines(), is_shell=False)], RECIPE)]
                if content["recipe"]
                else []
            ),
            *layer_bytes(content.get("weight_bytes")),
            *closing(content),
        ],
        content=content.data,
    )


RECIPE = "As a file, it repeats the run: onnxcompress compress IN RECIPE.toml -o OUT."


def _summary(content: Content) -> str:
    chain = _chain(content)
    steps = ", then ".join(attempt["verb"] for attempt in chain) or "nothing: it is a copy"
    where = f" Written to {content['output']} in {content['seconds']:.0f} s." if content["output"] else ""
    nothing = "" if content["output"] else " Nothing was written."
    tried = len(content["attempts"])
    return f"{content['size_ratio']:.2f} times smaller by {steps}; {tried} steps were tried.{where}{nothing}"


def _chain(content: Content) -> list[Mapping[str, Any]]:
    numbered = {attempt["number"]: attempt for attempt in content["attempts"]}
    return [numbered[one] for one in content["steps"]]


def _figures(content: Content, before: Mapping[str, Any], after: Mapping[str, Any]) -> Section:
    sizes = (before["size_bytes"], after["size_bytes"])
    rows = [
        changed_row("size", sizes[0], sizes[1], (bytes_text(sizes[0]), bytes_text(sizes[1]))),
        changed_row("MACs", before["macs"], after["macs"]),
        *(latency_rows(after["latency"]) if after["latency"] is not None else []),
    ]
    if after["before"] is not None:
        rows.append(metric_row(after["criterion"], after["before"], after["after"]))
    facts = []
    if after["drop"] is not None:
        facts.append([text(f"drop of {metric_name(after['criterion'])}"), number(after["drop"], ".4f")])
    if after["error"] is not None:
        facts.append([text("relative error of the outputs"), number(after["error"], ".4g")])
    note = f"Measured on {content['samples']:,} samples that no step has used." if content["samples"] else ""
    return Section("Before and after", [before_after(rows), *([Table(("", ""), facts)] if facts else [])], note)


def _tried(content: Content, original: Mapping[str, Any]) -> Section:
    rows = []
    for attempt in content["attempts"]:
        found = attempt["figures"] or {}
        latency = found.get("latency")
        verdict = f"failed: {attempt['failure']}" if attempt["failure"] else attempt["verdict"] or "not taken"
        rows.append(
            [
                number(attempt["number"]),
                text(attempt["verb"]),
                text(", ".join(f"{key} {value}" for key, value in attempt["settings"].items())),
                text("the original" if not attempt["on"] else f"step {attempt['on']}"),
                number(found.get("size_bytes")),
                number(found.get("macs")),
                number(None if latency is None else latency["ratio"], ".2f", "x"),
                number(found.get("drop"), ".4f"),
                number(attempt["seconds"], ",.0f"),
                Cell(verdict, tone="good" if attempt["kept"] else ""),
            ]
        )
    header = ("", "step", "settings", "on", "bytes", "MACs", "speed-up", "drop", "seconds", "verdict")
    plots = [*_plot(content, original, "size_bytes"), *_plot(content, original, "latency")]
    return Section("What was tried", [*([Row(plots)] if plots else []), Table(header, rows)])


def _plot(content: Content, original: Mapping[str, Any], key: str) -> list[Plot]:
    """All steps that were tried, by their cost and what was lost; the way of the kept ones as a line."""
    measured = [attempt for attempt in content["attempts"] if attempt["figures"] is not None]
    has_metric = any(attempt["figures"]["after"] is not None for attempt in measured)
    start = _point(original, original, key, has_metric, "original")
    points = {
        attempt["number"]: _point(attempt["figures"], original, key, has_metric, _name(attempt)) for attempt in measured
    }
    if not any(points.values()) or not measured:
        return []
    way = [start, *(points.get(one) for one in content["steps"])]
    others = [point for one, point in points.items() if one not in content["steps"] and point is not None]
    criterion = next(attempt["figures"]["criterion"] for attempt in measured)
    y = metric_axis(criterion) if has_metric else Axis(f"drop of {metric_name(criterion)}", "share")
    x = Axis("size", "bytes") if key == "size_bytes" else Axis("latency, ms", "ms")
    series = [Series("taken", [point for point in way if point is not None], "line", labelled=True)]
    series += [Series("not taken", others)] if others else []
    return [Plot(f"{y.name[:1].upper()}{y.name[1:]} and {x.name.split(',')[0]}", x, y, series)]


def _point(
    figures: Mapping[str, Any], original: Mapping[str, Any], key: str, has_metric: bool, name: str
) -> Point | None:
    is_original = name == "original"
    quality = figures["before" if is_original else "after"] if has_metric else figures["drop"]
    if is_original and quality is None and not has_metric:
        quality = 0.0
    cost = figures[key]
    if key == "latency" and cost is not None:
        # Timed beside the original in its own minute: as if all had been timed in that of the original.
        cost = (original["latency"] or cost)["original_ms"] / (1.0 if is_original else cost["ratio"])
    return None if cost is None or quality is None else Point(cost, quality, name)


def _name(attempt: Mapping[str, Any]) -> str:
    return f"{attempt['number']} {attempt['verb']}"


def _steps(content: Content) -> list[Section]:
    blocks: list[Block] = []
    for attempt in content["attempts"]:
        lines: Sequence[str] = [*([f"tried because: {attempt['why']}"] if attempt["why"] else []), *attempt["summary"]]
        if lines:
            blocks.append(Lines(lines, f"Step {attempt['number']}, {attempt['verb']}"))
    return [Section("What each step did", blocks)] if blocks else []
