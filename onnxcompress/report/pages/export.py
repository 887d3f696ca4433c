"""The page of ``export``: what was written, and how far onnxruntime is from torch on it."""

from __future__ import annotations

from onnxcompress.report.page import Block, Card, Content, Lines, Page, Section, Table, code, number, text
from onnxcompress.report.pages.sections import base_name, closing, layer_bytes
from onnxcompress.report.wording import bytes_text


def page(content: Content) -> Page:
    sizes = f" at batch {', '.join(map(str, content['batch_sizes']))}" if content["batch_sizes"] else ""
    parity = f"max|d| / max|y| = {content['relative_error']:.1e} over {content['feeds']} inputs{sizes}"
    return Page(
        verb="export",
        title=base_name(content["path"]),
        summary=f"{content['factory']} as ONNX, opset {content['opset']}, weights {content['weights']}.",
        verdict=f"onnxruntime gives what torch gives: {parity}, allowed {content['tolerance']:.0e}",
        verdict_tone="good",
        cards=[
            Card("size of the file", bytes_text(content["size_bytes"]), note=_place(content)),
            Card("nodes", f"{content['nodes']:,}"),
            Card("opset", str(content["opset"])),
            Card("parity", f"{content['relative_error']:.1e}", note="max|d| / max|y|"),
        ],
        sections=[_interface(content), *layer_bytes(content.get("weight_bytes")), *closing(content)],
        content=content.data,
    )


def _place(content: Content) -> str:
    return "weights in a file of their own" if content["external_data"] else ""


def _interface(content: Content) -> Section:
    rows = [
        [code(value["name"]), text(side[:-1]), text(" x ".join(map(str, value["shape"])) or "scalar")]
        for side in ("inputs", "outputs")
        for value in content[side]
    ]
    facts = [
        [text("module"), code(content["factory"])],
        [text("file"), code(content["path"])],
        [text("exporter"), text(content["exporter"])],
        [text("seconds"), number(content["seconds"], ".1f")],
    ]
    notes: list[Block] = [Lines(content["notes"], "Notes")] if content["notes"] else []
    return Section("What was written", [Table(("name", "", "shape"), rows), Table(("", ""), facts), *notes])
