"""The page of ``prune-width``: channels that went, those that stay and why, what the fits brought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxcompress.report.page import (
    Axis,
    Bar,
    Bars,
    Block,
    Card,
    Content,
    Lines,
    Page,
    Row,
    Section,
    Table,
    code,
    number,
    text,
)
from onnxcompress.report.pages.sections import (
    BARS_SHOWN,
    base_name,
    before_after,
    changed_row,
    closing,
    count_card,
    latency_card,
    latency_rows,
    layer_bytes,
    metric_card,
    metric_row,
    quality_blocks,
    size_card,
    trade_off,
)
from onnxcompress.report.wording import bytes_text


def page(content: Content) -> Page:
    before, after = content["macs"]
    error = content["contract_error"]
    checked = "" if error is None else f"It computes what the original does with these channels at zero: {error:.1e}"
    return Page(
        verb="prune-width",
        title=base_name(content["input"]),
        summary=_summary(content, before, after),
        verdict=checked and f"{checked}, max|d| / max|y| before any fit",
        verdict_tone="good" if checked else "",
        cards=_cards(content, before, after),
        sections=[
            *_figures(content, before, after),
            *channel_sections(content["groups"]),
            *_fits(content["fits"]),
            *([Section("Notes", [Lines(content["notes"])])] if content["notes"] else []),
            *layer_bytes(content.get("weight_bytes")),
            *closing(content),
        ],
        content=content.data,
    )


def _summary(content: Content, before: float, after: float) -> str:
    share = f"{content['prunable_share']:.1%}"
    if content["output"] is None and before == after:
        return f"{share} of the channels can be pruned; nothing was."
    gone = sum(group["channels"] - group["kept"] for group in content["groups"])
    channels = sum(group["channels"] for group in content["groups"])
    done = "went" if content["output"] else "would go"
    where = f" Written to {content['output']} in {content['seconds']:.1f} s." if content["output"] else ""
    ranked = {"data": "what is lost on the samples", "magnitude": "BatchNormalization scales and weights"}
    by = f", ranked by {ranked.get(content['ranking'], content['ranking'])}" if content["ranking"] else ""
    left = f"{content['macs_ratio']:.3f} of the MACs are left"
    return f"{gone:,} of {channels:,} channels {done}{by} ({share} could); {left}.{where}"


def _cards(content: Content, before: float, after: float) -> list[Card]:
    quality, sizes, latency = content["quality"], content["size_bytes"], content["latency"]
    cards = [count_card("MACs" if content["macs_exact"] else "MACs (sizes assumed)", before, after)]
    if sizes is not None:
        cards.append(size_card(*sizes))
    if latency is not None:
        cards.append(latency_card(latency))
    if quality is not None and quality["metric"] is not None:
        cards.append(metric_card(quality["metric"], quality["before"], quality["after"]))
    elif quality is not None and quality["criterion"] == "agreement":
        cards.append(Card("same top-1 class", f"{100 * (1 - quality['drop']):.2f} %", note="as the original"))
    return cards


def _figures(content: Content, before: float, after: float) -> list[Section]:
    quality, sizes, latency = content["quality"], content["size_bytes"], content["latency"]
    rows = [changed_row("MACs", before, after)]
    plots = []
    metric = ""
    values: tuple[float | None, float | None] = (None, None)
    if quality is not None and quality["metric"] is not None:
        metric, values = quality["metric"], (quality["before"], quality["after"])
        rows.append(metric_row(metric, *values))
    elif quality is not None and quality["criterion"] == "agreement":
        metric, values = "agreement", (1.0, 1.0 - quality["drop"])
    if metric:
        plots += trade_off(metric, Axis("MACs", from_zero=True), (before, values[0]), (after, values[1]))
    if sizes is not None:
        rows.append(changed_row("size", sizes[0], sizes[1], (bytes_text(sizes[0]), bytes_text(sizes[1]))))
        if metric:
            plots += trade_off(metric, Axis("size", "bytes"), (sizes[0], values[0]), (sizes[1], values[1]))
    if latency is not None:
        rows += latency_rows(latency)
    blocks: list[Block] = [before_after(rows), *([Row(plots)] if plots else [])]
    if quality is not None:
        blocks += quality_blocks({**quality, "metric": None})
    note = "" if quality is None else f"Quality is of {quality['samples']:,} samples that no fit has used."
    return [Section("Before and after", blocks, note)]


def channel_sections(groups: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Channel groups: what stays of those that can be pruned, and why the others cannot."""
    open_groups = [group for group in groups if not group["frozen"]]
    frozen = [group for group in groups if group["frozen"]]
    sections = []
    if open_groups:
        largest = sorted(open_groups, key=lambda group: -group["channels"])[:BARS_SHOWN]
        shown = "" if len(open_groups) <= BARS_SHOWN else f"the {BARS_SHOWN} widest of {len(open_groups):,} groups"
        bars = [
            Bar(group["name"], group["kept"], f"{group['channels']:,} → {group['kept']:,}", group["channels"])
            for group in largest
        ]
        rows = [
            [
                code(g["name"]),
                number(g["channels"]),
                number(g["kept"]),
                number(g["kept"] / g["channels"], ".1%"),
                number(g["width"]),
            ]
            for g in open_groups
        ]
        blocks: list[Block] = [
            Bars("Channels of each group", bars, shown, ("before", "kept")),
            Table(("group", "channels", "kept", "share kept", "width"), rows, "All groups"),
        ]
        near = [
            f"{g['name']}: {g['approximate']}"
            for g in open_groups
            if g.get("approximate") and g["kept"] < g["channels"]
        ]
        if near:
            blocks.append(Lines(near, "Without their channels these count otherwise than with zeros"))
        note = "Channels of a group go together; width is how many elements of a tensor's axis one of them takes."
        sections.append(Section("Channels", blocks, note))
    if frozen:
        rows = [[code(group["name"]), number(group["channels"]), text(group["frozen"])] for group in frozen]
        table = Table(("group", "channels", "stays because"), rows, "Groups that stay")
        sections.append(Section("Refused", [table], "Groups of channels that could not be pruned."))
    return sections


def _fits(fits: Sequence[Mapping[str, Any]]) -> list[Section]:
    if not fits:
        return []
    bars = [
        Bar(fit["name"], fit["after"], f"{fit['before']:.3g} → {fit['after']:.3g}", fit["before"])
        for fit in fits[:BARS_SHOWN]
    ]
    rows = [[code(fit["name"]), number(fit["before"], ".4f"), number(fit["after"], ".4f")] for fit in fits]
    header = ("layer", "error without its inputs", "with new weights")
    blocks: list[Block] = [Bars("Relative squared error of each layer", bars, names=("without", "fitted"))]
    blocks.append(Table(header, rows, "All fits"))
    return [Section("Weights that make up for what went", blocks)]
