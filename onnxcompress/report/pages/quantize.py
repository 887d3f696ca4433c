"""The page of ``quantize``: size and quality, how each layer is stored, bits per weight, what was left and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxcompress.report.page import (
    Axis,
    Bar,
    Bars,
    Block,
    Card,
    Cell,
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
from onnxcompress.report.pages.sections import (
    BARS_SHOWN,
    base_name,
    before_after,
    changed_row,
    closing,
    metric_card,
    metric_row,
    quality_blocks,
    size_card,
    trade_off,
)
from onnxcompress.report.wording import bytes_text

FLOAT32_BITS = 32


def page(content: Content) -> Page:
    quality, layers = content["quality"], content["layers"]
    before, after = content["before_bytes"], content["after_bytes"]
    weights = sum(row["weights"] for row in layers)
    bits = 8 * sum(row["size_bytes"] for row in layers) / weights if weights else None
    cards = [size_card(before, after), *_quality_cards(quality)]
    if bits is not None:
        cards.append(Card("bits per weight", f"{bits:.2f}", note=f"{FLOAT32_BITS} as float32"))
    return Page(
        verb="quantize",
        title=base_name(content["input"]),
        summary=_summary(content, quality),
        cards=cards,
        sections=[
            _figures(content, quality),
            *([_layers(layers)] if layers else []),
            *_refused(content["refused"]),
            *([Section("Notes", [Lines(content["notes"])])] if content["notes"] else []),
            *closing(content),
        ],
        content=content.data,
        verdict=_verdict(content, quality),
    )


def _summary(content: Content, quality: Mapping[str, Any] | None) -> str:
    sizes = f"{bytes_text(content['before_bytes'])} became {bytes_text(content['after_bytes'])}"
    if content["unchanged"]:
        return f"Nothing was quantized: the result is a copy. {content['seconds']:.1f} s."
    if content["output"] is None:
        sizes = f"Plan only, nothing was written: {sizes.replace('became', 'would become')}"
    where = f" Written to {content['output']} in {content['seconds']:.1f} s." if content["output"] else ""
    return f"{sizes}, {content['ratio']:.2f} times smaller.{where}"


def _verdict(content: Content, quality: Mapping[str, Any] | None) -> str:
    if quality is None:
        error = content["predicted_error"]
        shown = "not finite" if error is None else f"{error:.4g}"
        return f"Predicted relative error of the outputs, an upper estimate: {shown}"
    fitted = content["calibration_samples"]
    first = f"fitted on {fitted:,} samples without labels" if fitted else "fitted without data"
    return f"Measured with the file on onnxruntime, {first}, {quality['samples']:,} others measured"


def _quality_cards(quality: Mapping[str, Any] | None) -> list[Card]:
    if quality is None:
        return []
    cards = []
    if quality["metric"] is not None:
        cards.append(metric_card(str(quality["metric"]), quality["before"], quality["after"]))
    agreements = [output["agreement"] for output in quality["outputs"] if output["agreement"] is not None]
    if agreements:
        cards.append(Card("same top-1 class", f"{100 * min(agreements):.2f} %", note="as the original"))
    if quality["error"] is not None:
        cards.append(Card("relative error", f"{quality['error']:.3g}", note="of the outputs"))
    return cards


def _figures(content: Content, quality: Mapping[str, Any] | None) -> Section:
    before, after = content["before_bytes"], content["after_bytes"]
    rows = [changed_row("bytes", before, after)]
    plots: list[Plot] = []
    size = Axis("size", "bytes")
    if quality is not None and quality["metric"] is not None:
        metric = str(quality["metric"])
        rows.append(metric_row(metric, quality["before"], quality["after"]))
        plots += trade_off(metric, size, (before, quality["before"]), (after, quality["after"]))
    elif quality is not None and quality["criterion"] == "agreement":
        plots += trade_off("agreement", size, (before, 1.0), (after, 1.0 - quality["drop"]))
    blocks: list[Block] = [before_after(rows), *([Row(plots)] if plots else [])]
    if quality is not None:
        blocks += quality_blocks({**quality, "metric": None})
    rows = [
        [text("samples that were fitted"), number(content["calibration_samples"])],
        [text("samples held out"), number(content["held_out_samples"])],
        [text("relative error of the outputs, predicted"), number(content["predicted_error"], ".4g")],
    ]
    return Section("Before and after", [*blocks, Table(("", ""), rows)])


def _layers(layers: Sequence[Mapping[str, Any]]) -> Section:
    largest = sorted(layers, key=lambda row: -row["weights"])[:BARS_SHOWN]
    shown = "" if len(layers) <= BARS_SHOWN else f"the {BARS_SHOWN} layers with most weights, of {len(layers):,}"
    bits = [Bar(row["name"], row["bits_per_weight"], f"{row['bits_per_weight']:.2f} bits") for row in largest]
    sizes = [
        Bar(row["name"], row["size_bytes"], bytes_text(row["size_bytes"]), row["weights"] * FLOAT32_BITS // 8)
        for row in largest
    ]
    rows = [
        [
            code(row["name"]),
            text(row["kind"]),
            number(row["weights"]),
            text(row["form"]),
            number(row["bits_per_weight"], ".2f"),
            number(row["size_bytes"]),
            number(row["error"], ".4f"),
            number(row["predicted_damage"], ".2e"),
        ]
        for row in layers
    ]
    header = ("layer", "operator", "weights", "form", "bits per weight", "bytes", "relative error", "predicted damage")
    forms: dict[str, list[int]] = {}
    for row in layers:
        held = forms.setdefault(row["form"], [0, 0, 0])
        held[:] = held[0] + 1, held[1] + row["weights"], held[2] + row["size_bytes"]
    kinds = [
        [text(form), number(count), number(weights), number(size)]
        for form, (count, weights, size) in sorted(forms.items(), key=lambda item: -item[1][2])
    ]
    blocks: list[Block] = [
        Bars("Bits per weight", bits, shown or "nodes that decode included"),
        Bars("Size by layer", sizes, shown, ("as float32", "now")),
        *_error_plot(layers),
        Table(header, rows, "All layers"),
        Table(("form", "layers", "weights", "bytes"), kinds, "Forms"),
    ]
    return Section("Layers", blocks, "Error is that of a layer's output, errors of the layers before it included.")


def _error_plot(layers: Sequence[Mapping[str, Any]]) -> list[Block]:
    points = [Point(row["bits_per_weight"], row["error"], row["name"]) for row in layers if row["error"] is not None]
    if len(points) < 3:
        return []
    y = Axis("relative error", from_zero=True)
    return [Plot("Error and bits of each layer", Axis("bits per weight"), y, [Series("layers", points)])]


def _refused(refused: Sequence[Mapping[str, Any]]) -> list[Section]:
    if not refused:
        return []
    rows: list[list[Cell]] = [[code(one["name"]), text(one["reason"])] for one in refused]
    return [Section("Refused", [Table(("weight", "reason"), rows, "Weights that stay as they are")])]
