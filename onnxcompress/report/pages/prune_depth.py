"""The page of ``prune-depth``: figures, the blocks and what became of them, the search, the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxcompress.report.page import (
    Axis,
    Bar,
    Bars,
    Block,
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
from onnxcompress.report.pages.finetune import better_tone
from onnxcompress.report.pages.sections import (
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
    size_card,
    trade_off,
    training_blocks,
)
from onnxcompress.report.wording import bytes_text

SUBNETS_SHOWN = 500
BEST_SHOWN = 20


def page(content: Content) -> Page:
    before, after, latency = content["figures_before"], content["figures_after"], content["latency"]
    metric, found = content["metric"], content["found"]
    tone = better_tone(content["before"], content["after"], content["higher_is_better"])
    training, supernet = content["training"], content["supernet"]
    return Page(
        verb="prune-depth",
        title=base_name(content["source"]),
        summary=_summary(content),
        verdict=f"Merged and unmerged network differ by {content['merge_error']:.1e} at most, measured on onnxruntime",
        verdict_tone="good",
        cards=[
            metric_card(metric, content["before"], content["after"], tone=tone),
            latency_card(latency),
            count_card("MACs", before["macs"], after["macs"]),
            size_card(before["size_bytes"], after["size_bytes"]),
        ],
        sections=[
            _figures(content, before, after, latency, metric),
            _blocks(content["offers"], content["pruned"], content["deleted"]),
            *([_search(found, content["offers"])] if found is not None else []),
            *_fits(content["fits"]),
            *([Section("Supernet", training_blocks(supernet, metric))] if supernet is not None else []),
            *([Section("Training", training_blocks(training, metric))] if training is not None else []),
            *layer_bytes(content.get("weight_bytes")),
            *closing(content),
        ],
        content=content.data,
    )


def _summary(content: Content) -> str:
    places = len({offer["place"] for offer in content["offers"]})
    deleted = f", {len(content['deleted'])} of them deleted" if content["deleted"] else ""
    goal = f" for {content['goal']}" if content["goal"] else ""
    learned = f" Learned from {content['learned_from']}." if content["learned_from"] else ""
    done = f"{len(content['pruned'])} of {places} blocks were pruned{deleted}{goal}."
    return f"{done}{learned} Written to {content['output']} in {content['seconds']:.0f} s."


def _figures(
    content: Content, before: Mapping[str, Any], after: Mapping[str, Any], latency: Mapping[str, Any], metric: str
) -> Section:
    a, b = content["before"], content["after"]
    sizes = (before["size_bytes"], after["size_bytes"])
    rows = [
        metric_row(metric, a, b),
        *latency_rows(latency),
        changed_row("MACs", before["macs"], after["macs"]),
        changed_row("nodes", before["nodes"], after["nodes"]),
        changed_row("size", *sizes, (bytes_text(sizes[0]), bytes_text(sizes[1]))),
    ]
    plots = [
        *trade_off(metric, Axis("latency, ms", "ms"), (latency["original_ms"], a), (latency["result_ms"], b)),
        *trade_off(metric, Axis("size", "bytes"), (sizes[0], a), (sizes[1], b)),
    ]
    better = "higher" if content["higher_is_better"] else "lower"
    note = f"{metric} is of {content['samples']:,} validation samples, by onnxruntime; {better} is better."
    return Section("Before and after", [before_after(rows), *([Row(plots)] if plots else [])], note)


def _blocks(offers: Sequence[Mapping[str, Any]], pruned: Sequence[str], deleted: Sequence[str]) -> Section:
    rows = []
    timed = any(offer["latency_ms"] for offer in offers)
    for offer in offers:
        name = offer["block"]
        fate = Cell("deleted" if name in deleted else "merged", tone="good") if name in pruned else text("kept")
        if offer["is_slower"]:
            fate = text("kept: slower when merged") if name not in pruned else fate
        before, after = offer["latency_ms"] or (None, None)
        becomes = "nothing" if offer["kind"] == "residual" else " ".join(offer["operators"])
        times = [number(before, ".4f"), number(after, ".4f"), number(offer["speedup"], ".2f", "x")] if timed else []
        macs = [number(value) for value in offer["macs"]]
        rows.append([code(name), text(offer["found_as"]), fate, text(becomes), *macs, *times])
    header = ["block", "kind", "what was done", "becomes", "MACs", "MACs merged"]
    header += ["ms", "ms merged", "faster"] if timed else []
    bars = [
        Bar(offer["block"], offer["macs"][1], f"{offer['macs'][0]:,} → {offer['macs'][1]:,}", offer["macs"][0])
        for offer in offers
        if offer["block"] in pruned
    ]
    blocks: list[Block] = [Bars("MACs of the pruned blocks", bars)] if bars else []
    note = "A pruned block became one operator, or nothing where it was deleted; at each place one of the two is taken."
    return Section("Blocks", [*blocks, Table(header, rows)], note)


def _search(found: Mapping[str, Any], offers: Sequence[Mapping[str, Any]]) -> Section:
    scores = {bits: score for bits, score in found["scores"].items() if score is not None}
    ranked = [bits for bits in found["ranked"] if bits in scores]
    best = found["bits"]
    shown = list(dict.fromkeys([best, *ranked[: SUBNETS_SHOWN // 2], *scores]))[:SUBNETS_SHOWN]
    points = {bits: _point(bits, scores[bits], offers) for bits in shown if bits in scores}
    candidates = set(ranked)
    series = [
        Series("within the goal", [point for bits, point in points.items() if bits in candidates and bits != best]),
        Series("chosen", [points[best]] if best in points else []),
        Series("others scored", [point for bits, point in points.items() if bits not in candidates and bits != best]),
    ]
    series = [one for one in series if one.points]
    timed = all(offer["latency_ms"] for offer in offers)
    axis = Axis("sum of latencies saved, ms", "ms") if timed else Axis("MACs saved")
    plots = [Plot("Subnets that were scored", axis, Axis("score, higher is better"), series)]
    history = [Point(step, score) for step, score in enumerate(found["history"]) if score is not None]
    if len(history) > 1:
        line = Series("best so far", history, "line")
        plots.append(Plot("Best score", Axis("step of the search"), Axis("score, higher is better"), [line]))
    rows = [
        [number(rank), number(scores[bits], ".5g"), number(bits.count("1")), code(_names(bits, offers))]
        for rank, bits in enumerate(ranked[:BEST_SHOWN], 1)
    ]
    table = Table(("rank", "score", "blocks", "pruned"), rows, "Best subnets")
    best_score = "" if found["score"] is None else f"; the chosen one came to {found['score']:.5g}"
    note = f"{found['evaluations']:,} subnets were scored by {found['method']}{best_score}."
    return Section("Search", [Row(plots), table], note)


def _point(bits: str, score: float, offers: Sequence[Mapping[str, Any]]) -> Point:
    chosen = [offer for bit, offer in zip(bits, offers, strict=False) if bit == "1"]
    if all(offer["latency_ms"] for offer in offers):
        saved = sum(offer["latency_ms"][0] - offer["latency_ms"][1] for offer in chosen)
    else:
        saved = float(sum(offer["macs"][0] - offer["macs"][1] for offer in chosen))
    return Point(saved, score, _names(bits, offers) or "none")


def _names(bits: str, offers: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(offer["block"] for bit, offer in zip(bits, offers, strict=False) if bit == "1")


def _fits(fits: Sequence[Mapping[str, Any]]) -> list[Section]:
    if not fits:
        return []
    rows = [
        [code(fit["name"]), number(fit["before"], ".4f"), number(fit["after"], ".4f"), text(fit["reason"])]
        for fit in fits
    ]
    bars = [
        Bar(fit["name"], fit["after"], f"{fit['before']:.3f} → {fit['after']:.3f}", fit["before"])
        for fit in fits
        if fit["before"] is not None and fit["after"] is not None
    ]
    blocks: list[Block] = [Bars("Relative error of each block's output", bars, names=("pruned", "fitted"))]
    blocks.append(Table(("block", "error when pruned", "error when fitted", "left as it is because"), rows))
    reasons = [fit for fit in fits if fit["reason"]]
    lines = [Lines([f"{fit['name']}: {fit['reason']}" for fit in reasons], "Not fitted")] if reasons else []
    note = "Each last linear operator of a pruned block was solved for what the original gave there."
    return [Section("Fits", [*blocks, *lines], note)]
