"""The page of ``finetune``: the figure before and after, and how it got there."""

from __future__ import annotations

from collections.abc import Sequence

from onnxcompress.report.page import Block, Card, Content, Page, Section, Table, Tone, code
from onnxcompress.report.pages.sections import (
    base_name,
    before_after,
    closing,
    layer_bytes,
    metric_card,
    metric_row,
    training_blocks,
)


def page(content: Content) -> Page:
    metric, run = content["metric"], content["training"]
    tone = better_tone(content["before"], content["after"], content["higher_is_better"])
    cards = [metric_card(metric, content["before"], content["after"], tone=tone)] if metric else []
    if run is not None:
        cards.append(Card("steps", f"{run['steps']:,}", f"{run['total']:,} planned"))
    cards.append(Card("initializers changed", f"{len(content['changed']):,}"))
    return Page(
        verb="finetune",
        title=base_name(content["source"]),
        summary=f"Learned from {content['learned_from']}. "
        f"Written to {content['output']} in {content['seconds']:.1f} s.",
        cards=cards,
        sections=[
            *_figures(content, metric),
            *([Section("Training", training_blocks(run, metric or "figure"))] if run is not None else []),
            *changed_section(content["changed"]),
            *layer_bytes(content.get("weight_bytes")),
            *closing(content),
        ],
        content=content.data,
        verdict="Graph and interface are those of the input; onnxruntime gives the figure that torch gave",
        verdict_tone="good",
    )


def better_tone(before: float | None, after: float | None, higher_is_better: bool) -> Tone:
    if before is None or after is None or before == after:
        return ""
    return "good" if (after > before) == higher_is_better else "bad"


def _figures(content: Content, metric: str | None) -> list[Section]:
    if metric is None:
        return []
    rows = [metric_row(metric, content["before"], content["after"])]
    better = "higher" if content["higher_is_better"] else "lower"
    note = f"On {content['samples']:,} validation samples, by onnxruntime; {better} is better."
    return [Section("Before and after", [before_after(rows)], note)]


def changed_section(names: Sequence[str]) -> list[Section]:
    if not names:
        return []
    blocks: list[Block] = [Table(("initializer",), [[code(name)] for name in names], "Initializers with new values")]
    return [Section("What changed", blocks)]
