"""The page of ``view``: what is in a model, or in which nodes two of them differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from onnxcompress.report.page import Bar, Bars, Block, Content, Lines, Page, Section, Table, code, text
from onnxcompress.report.pages import inspect
from onnxcompress.report.pages.sections import (
    BARS_SHOWN,
    base_name,
    before_after,
    changed_row,
    closing,
    count_card,
    layer_bytes,
    size_card,
)

STATUSES = ("changed", "new", "gone")


def page(content: Content) -> Page:
    if "changes" not in content:
        return replace(inspect.page(content), verb="view")
    before, after, changes = content["before"], content["after"], content["changes"]
    counts = Counter(change["status"] for change in changes)
    said = ", ".join(f"{counts[status]:,} {status}" for status in STATUSES)
    counted = (("nodes", "nodes"), ("parameters", "parameters"), ("macs", "MACs"))
    sizes = [side["size_bytes"] for side in (before, after)]
    return Page(
        verb="view",
        title=f"{base_name(content['output'])} beside {base_name(content['input'])}",
        summary=f"Nodes of {content['output']} against those of {content['input']}: {said}.",
        cards=[size_card(*sizes), *(count_card(name, before[key], after[key]) for key, name in counted)],
        sections=[
            _nodes(changes),
            Section(
                "Before and after",
                [
                    before_after(
                        [
                            changed_row("bytes", *sizes),
                            *(changed_row(name, before[key], after[key]) for key, name in counted),
                        ]
                    ),
                    _operators(before["operators"], after["operators"]),
                ],
            ),
            *layer_bytes(content.get("weight_bytes")),
            *closing(content),
        ],
        content=content.data,
    )


def _nodes(changes: Sequence[Mapping[str, Any]]) -> Section:
    if not changes:
        return Section("Nodes", [Lines(["None differs."])])
    header = ("", "operator", "node", "first output", "what, and by which pass")
    rows = [
        [text(one["status"]), text(one["operator"]), code(one["name"]), code(one["output"]), text(one["detail"])]
        for one in changes
    ]
    note = "Nodes of one name are the same node; those without a name, where they make a tensor of the same name."
    return Section("Nodes", [Table(header, rows, "Nodes that differ")], note)


def _operators(before: Mapping[str, int], after: Mapping[str, int]) -> Block:
    names = sorted({**before, **after}, key=lambda op: -max(before.get(op, 0), after.get(op, 0)))[:BARS_SHOWN]
    bars = [Bar(op, after.get(op, 0), f"{after.get(op, 0):,}", before.get(op, 0)) for op in names]
    return Bars("Nodes by operator", bars)
