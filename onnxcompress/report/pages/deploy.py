"""The page of ``deploy``: what was written for a target, and how it ran there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxcompress.report.page import Bar, Bars, Block, Card, Content, Lines, Page, Section, Table, code, number, text
from onnxcompress.report.pages.sections import base_name, closing
from onnxcompress.report.wording import bytes_text


def page(content: Content) -> Page:
    settings, runtime = content["settings"], content["runtime"]
    folder, target = content["folder"], content["target"]
    if settings:
        worst = max(one["error"] for one in settings)
        verdict = f"Ran on {runtime}: largest max|d| / max|y| is {worst:.1e}, allowed {content['allowed']:.0e}"
    else:
        verdict = "Not run: the page says whether its outputs agree"
    return Page(
        verb="deploy",
        title=f"{base_name(content['source'])} for {target}",
        summary=f"The folder {folder} holds what runs {content['source']} on {runtime or target}.",
        verdict=verdict,
        verdict_tone="good" if settings else "",
        cards=_cards(settings[0]) if settings else [],
        sections=[
            *([_settings(settings)] if settings else []),
            _files(content["files"]),
            Section("Samples and notes", [Lines(content["samples"]), *_notes(content["notes"])]),
            *closing(content),
        ],
        content=content.data,
    )


def _cards(first: Mapping[str, Any]) -> list[Card]:
    packed = "" if first["gzip_bytes"] is None else f"{bytes_text(first['gzip_bytes'])} after gzip"
    cards = [
        Card("size of the model", bytes_text(first["size_bytes"]), note=packed),
        Card("latency", f"{first['latency_ms']:.3g} ms"),
        Card("load time", f"{first['load_ms']:.1f} ms"),
    ]
    if first["peak_memory_bytes"] is not None:
        cards.append(Card("memory", bytes_text(first["peak_memory_bytes"]), note="to load and run it once"))
    return cards


def _settings(settings: Sequence[Mapping[str, Any]]) -> Section:
    rows = [
        [
            text(one["name"]),
            number(one["size_bytes"]),
            number(one["gzip_bytes"]),
            number(one["error"], ".1e"),
            number(one["load_ms"], ".1f"),
            number(one["latency_ms"], ".3f"),
            number(one["peak_memory_bytes"]),
        ]
        for one in settings
    ]
    header = ("setting", "bytes", "after gzip", "error", "load ms", "latency ms", "memory, bytes")
    blocks: list[Block] = [Table(header, rows)]
    if len(settings) > 1:
        for title, key in (("Latency", "latency_ms"), ("Load time", "load_ms")):
            bars = [Bar(one["name"], one[key], f"{one[key]:.3g} ms", is_code=False) for one in settings]
            blocks.append(Bars(title, bars))
    return Section("Ways to run it", blocks, "The first is the one that was asked for.")


def _files(files: Mapping[str, int]) -> Section:
    return Section("Files", [Table(("file", "bytes"), [[code(name), number(size)] for name, size in files.items()])])


def _notes(notes: Sequence[str]) -> list[Block]:
    return [Lines(notes)] if notes else []
