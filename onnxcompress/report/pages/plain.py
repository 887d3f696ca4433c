"""The page of a verb that has none of its own: everything that its run gave, as tables."""

from __future__ import annotations

from onnxcompress.report.page import Content, Page
from onnxcompress.report.pages.sections import closing, layer_bytes


def page(content: Content) -> Page:
    source = content.get("input") or content.get("source") or content.get("path") or ""
    output = content.get("output")
    run = content.get("run") or {}
    weights = layer_bytes(content.get("weight_bytes"))
    return Page(
        verb=run.get("verb", ""),
        title=str(source),
        summary=f"Written to {output}." if output else "",
        cards=[],
        sections=[*weights, *closing(content)],
        content=content.data,
    )
