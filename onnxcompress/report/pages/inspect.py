"""The page of ``inspect``: what is in a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxcompress.report.page import Bar, Bars, Block, Card, Content, Lines, Page, Section, Table, code, number, text
from onnxcompress.report.pages.sections import BARS_SHOWN, base_name, closing, short_count
from onnxcompress.report.wording import bytes_text


def page(content: Content) -> Page:
    opsets = ", ".join(f"{domain} {number}" for domain, number in content["opsets"].items())
    made = content["producer"] or "an unknown exporter"
    return Page(
        verb="inspect",
        title=base_name(content["path"]),
        summary=f"Made by {made}, IR {content['ir_version']}, opset {opsets}.",
        cards=_cards(content),
        sections=[
            _interface(content),
            _operators(content),
            *_weights(content["initializers"], content["weight_bytes_by_type"]),
            *_words(content),
            *closing(content),
        ],
        content=content.data,
    )


def _cards(content: Content) -> list[Card]:
    download = "" if content["download_bytes"] is None else f"{bytes_text(content['download_bytes'])} after gzip"
    assumed = "" if content["macs_exact"] else "unknown sizes assumed"
    return [
        Card("size of the file", bytes_text(content["size_bytes"]), note=download),
        Card("parameters", short_count(content["parameters"])),
        Card("MACs", short_count(content["macs"]), note=assumed),
        Card("nodes", f"{content['nodes']:,}", note=_beside(content)),
    ]


def _beside(content: Content) -> str:
    parts = [f"{content['constant_nodes']:,} constants", f"{content['subgraphs']:,} subgraphs"]
    return ", ".join(part for part in parts if not part.startswith("0 "))


def _interface(content: Content) -> Section:
    rows = []
    for side in ("inputs", "outputs"):
        for value in content[side]:
            shape = "any" if value["shape"] is None else " x ".join(map(str, value["shape"])) or "scalar"
            default = "has a default" if value["has_default"] else ""
            rows.append([code(value["name"]), text(side[:-1]), text(value["type"]), text(shape), text(default)])
    return Section("Interface", [Table(("name", "", "type", "shape", "note"), rows)])


def _operators(content: Content) -> Section:
    operators = content["operators"]
    bars = [Bar(op, count, f"{count:,}") for op, count in list(operators.items())[:BARS_SHOWN]]
    blocks: list[Block] = [Bars("Nodes by operator", bars)]
    if len(operators) > BARS_SHOWN:
        rows = [[text(op), number(count)] for op, count in operators.items()]
        blocks.append(Table(("operator", "nodes"), rows, "All operators"))
    if content["functions"]:
        blocks.append(Lines(content["functions"], "Local functions"))
    return Section("Operators", blocks)


def _weights(initializers: Sequence[Mapping[str, Any]], by_type: Mapping[str, int]) -> list[Section]:
    if not initializers:
        return []
    shown = "" if len(initializers) <= BARS_SHOWN else f"the {BARS_SHOWN} largest of {len(initializers):,}"
    bars = [Bar(entry["name"], entry["bytes"], bytes_text(entry["bytes"])) for entry in initializers[:BARS_SHOWN]]
    kinds = sorted(by_type.items(), key=lambda item: -item[1])
    types = [Bar(kind, size, bytes_text(size), is_code=False) for kind, size in kinds]
    rows = [
        [
            code(entry["name"]),
            text(entry["read_by"]),
            text(entry["type"]),
            text(" x ".join(map(str, entry["shape"])) or "scalar"),
            number(entry["elements"]),
            number(entry["bytes"]),
        ]
        for entry in initializers
    ]
    header = ("initializer", "read by", "type", "shape", "elements", "bytes")
    blocks: list[Block] = [
        Bars("Bytes of each initializer", bars, shown),
        Bars("Bytes by type", types),
        Table(header, rows, "All initializers"),
    ]
    return [Section("Size by layer", blocks)]


def _words(content: Content) -> list[Section]:
    rows = [[text("graph"), text(content["graph"])], [text("doc string"), text(content["doc_string"])]]
    rows += [[text(key), text(value)] for key, value in content["metadata"].items()]
    rows += [[text("external data"), code(name)] for name in content["external_data"]]
    found = [row for row in rows if row[1].text]
    return [Section("Names and metadata", [Table(("", ""), found)])] if found else []
