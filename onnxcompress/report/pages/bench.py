"""The page of ``bench``: latency in turns, load time, peak memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxcompress.report.page import (
    Axis,
    Bar,
    Bars,
    Card,
    Content,
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
from onnxcompress.report.pages.sections import base_name, closing
from onnxcompress.report.wording import bytes_text


def page(content: Content) -> Page:
    models = content["models"]
    threads = f"{content['threads']} threads" if content["threads"] else "onnxruntime's own number of threads"
    optimization = content["optimization"]
    return Page(
        verb="bench",
        title=" and ".join(dict.fromkeys(base_name(entry["path"]) for entry in models)),
        summary=_summary(models),
        verdict=f"{models[0]['runs']:,} runs of each in turns, {threads}, onnxruntime's optimizations: {optimization}",
        cards=_cards(models),
        sections=[_latency(content["input"], models), _memory(models), *closing(content)],
        content=content.data,
    )


def _summary(models: Sequence[Mapping[str, Any]]) -> str:
    if len(models) == 1:
        return f"One run takes {models[0]['p50_ms']:.3f} ms."
    said = []
    for entry in models[1:]:
        low, high = entry["ratio_low"], entry["ratio_high"]
        if low <= 1 <= high:
            said.append(f"{base_name(entry['path'])} is as fast as far as could be measured")
        else:
            said.append(f"{base_name(entry['path'])} is {entry['ratio']:.2f} times as fast ({low:.2f} to {high:.2f})")
    return f"{'; '.join(said)}, compared with {base_name(models[0]['path'])}."


def _cards(models: Sequence[Mapping[str, Any]]) -> list[Card]:
    first = models[0]
    last = max(models[1:], key=lambda entry: entry["ratio"], default=first)  # the fastest of the others
    if len(models) == 1:
        memory = bytes_text(first["peak_memory_bytes"])
        return [
            Card("latency", f"{first['p50_ms']:.3g} ms"),
            Card("load time", f"{first['load_ms']:.1f} ms"),
            Card("peak memory", memory),
        ]
    slower = last["ratio_high"] < 1
    sure = slower or last["ratio_low"] > 1
    told = f"x{last['ratio']:.2f} as fast" if sure else "no difference measured"
    old, new = (f"{entry['p50_ms']:.3g} ms" for entry in (first, last))
    return [
        Card(f"latency of {base_name(last['path'])}", new, old, told, "bad" if slower else "good" if sure else ""),
        Card("load time", f"{last['load_ms']:.1f} ms", f"{first['load_ms']:.1f} ms"),
        Card("peak memory", bytes_text(last["peak_memory_bytes"]), bytes_text(first["peak_memory_bytes"])),
    ]


def _latency(fed: str, models: Sequence[Mapping[str, Any]]) -> Section:
    bars = [
        Bar(entry["path"], entry["p50_ms"], f"{entry['p50_ms']:.3f} ms", None, entry["p10_ms"], entry["p90_ms"])
        for entry in models
    ]
    rows = []
    for entry in models:
        ratio = text("")
        if entry["ratio"] is not None:
            ratio = number(entry["ratio"], ".3f", f" ({entry['ratio_low']:.3f} to {entry['ratio_high']:.3f})")
        times = [number(entry[key], ".3f") for key in ("p10_ms", "p50_ms", "p90_ms")]
        memory = number(entry["peak_memory_bytes"])
        rows.append(
            [code(entry["path"]), number(entry["runs"]), *times, ratio, number(entry["load_ms"], ".1f"), memory]
        )
    header = ("model", "runs", "p10 ms", "p50 ms", "p90 ms", "speed-up (95 %)", "load ms", "peak memory, bytes")
    note = f"Fed with {fed}. The speed-up is the first model's time over that of another, run by run."
    return Section("Latency", [Bars("Median, with p10 to p90", bars), Table(header, rows)], note)


def _memory(models: Sequence[Mapping[str, Any]]) -> Section:
    bars = [Bar(e["path"], e["peak_memory_bytes"], bytes_text(e["peak_memory_bytes"])) for e in models]
    loads = [Bar(e["path"], e["load_ms"], f"{e['load_ms']:.1f} ms") for e in models]
    blocks = [Bars("Peak memory", bars), Bars("Load time", loads)]
    if len(models) < 3:
        return Section("Memory and load time", blocks)
    points = [Point(e["p50_ms"], e["peak_memory_bytes"], base_name(e["path"])) for e in models]
    series = [Series("models", points, labelled=True)]
    plot = Plot("Memory and latency", Axis("latency, ms", "ms"), Axis("peak memory", "bytes"), series)
    return Section("Memory and load time", [*blocks, Row([plot])])
