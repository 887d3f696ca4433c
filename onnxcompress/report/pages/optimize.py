"""The page of ``optimize``: figures, what each pass did and refused, exactness, bytes by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from onnxcompress.linear import Exactness
from onnxcompress.report.optimization import EXACTNESS_TEXT, proof_line
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
    Row,
    Section,
    Table,
    code,
    number,
    text,
)
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
    output_table,
    size_card,
    trade_off,
)
from onnxcompress.report.wording import bytes_text, change

EXACTNESS_MEANS = {
    Exactness.EXACT: "equal for every input, up to rounding",
    Exactness.EXACT_WITHOUT_BIAS: "equal because there is no bias",
    Exactness.EXACT_WITH_BIAS_MAP: "equal, with a constant bias map where padding meets a bias",
    Exactness.APPROXIMATE: "differs, within the error that was allowed",
}


def page(content: Content) -> Page:
    before, after, latency = content["before"], content["after"], content["latency"]
    quality = content["quality"] or {}
    equivalence = content["equivalence"]
    cards = [
        count_card("nodes", before["nodes"], after["nodes"]),
        size_card(before["size_bytes"], after["size_bytes"]),
        *([latency_card(latency)] if latency else []),
        *_quality_card(quality),
    ]
    return Page(
        verb="optimize",
        title=base_name(content["input"]),
        summary=_summary(content, before, after, latency),
        cards=cards,
        sections=[
            _figures(before, after, latency, quality),
            _passes(content),
            *_merges(content["passes"]),
            *_refusals(content["passes"]),
            *layer_bytes(content.get("weight_bytes")),
            *_equivalence(equivalence),
            *closing(content),
        ],
        content=content.data,
        verdict=f"{proof_line(content)[:1].upper()}{proof_line(content)[1:]}",
        verdict_tone="" if equivalence is None else "good" if equivalence["equivalent"] else "bad",
    )


def _summary(content: Content, before: Mapping[str, Any], after: Mapping[str, Any], latency: Any) -> str:
    took = f" {content['seconds']:.1f} s." if content["seconds"] else ""
    if content["unchanged"]:
        return f"There was nothing to improve: {content['output'] or 'the result'} is a checked copy.{took}"
    nodes = f"{before['nodes']:,} nodes became {after['nodes']:,}"
    size = f"{bytes_text(before['size_bytes'])} became {bytes_text(after['size_bytes'])}"
    where = f" Written to {content['output']} in{took}" if content["output"] else ""
    return f"{nodes} and {size}{_speed(latency)}.{where}"


def _speed(latency: Mapping[str, Any] | None) -> str:
    if latency is None:
        return ""
    low, high = latency["low"], latency["high"]
    if low <= 1 <= high:
        return "; no difference in speed was measured"
    return f"; it runs {latency['ratio']:.2f} times as fast ({low:.2f} to {high:.2f})"


def _quality_card(quality: Mapping[str, Sequence[float]]) -> list[Card]:
    for name, (a, b) in quality.items():
        return [metric_card(name.split(",")[0], a, b)]
    return []


def _figures(before: Mapping[str, Any], after: Mapping[str, Any], latency: Any, quality: Mapping[str, Any]) -> Section:
    rows = [changed_row("nodes", before["nodes"], after["nodes"])]
    for name, key in (("size", "size_bytes"), ("size after gzip", "download_bytes")):
        if before[key] and after[key]:
            rows.append(changed_row(name, before[key], after[key], (bytes_text(before[key]), bytes_text(after[key]))))
    rows.append(changed_row("parameters", before["parameters"], after["parameters"]))
    exact = before["macs_exact"] and after["macs_exact"]
    macs = changed_row("MACs" if exact else "MACs (sizes assumed)", before["macs"], after["macs"])
    if before["macs_exact"] != after["macs_exact"]:
        macs[-1] = text("")  # a real size against an assumed one
    rows.append(macs)
    rows += latency_rows(latency) if latency else []
    plots: list[Plot] = []
    for name, (a, b) in quality.items():
        rows.append(metric_row(name, a, b))
    for name, (a, b) in list(quality.items())[:1]:
        kind = name.split(",")[0]
        plots += trade_off(kind, Axis("size", "bytes"), (before["size_bytes"], a), (after["size_bytes"], b))
        if latency:
            plots += trade_off(kind, Axis("latency, ms", "ms"), (latency["original_ms"], a), (latency["result_ms"], b))
    blocks: list[Block] = [before_after(rows), *([Row(plots)] if plots else []), *_operators(before, after)]
    return Section("Before and after", blocks)


def _operators(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Block]:
    old, new = before["by_operator"], after["by_operator"]
    names = sorted({**old, **new}, key=lambda op: (-abs(old.get(op, 0) - new.get(op, 0)), -old.get(op, 0)))
    bars = [Bar(op, new.get(op, 0), f"{old.get(op, 0):,} → {new.get(op, 0):,}", old.get(op, 0)) for op in names[:16]]
    rows = [
        [text(op), number(old.get(op, 0)), number(new.get(op, 0)), text(change(old.get(op, 0), new.get(op, 0)))]
        for op in names
    ]
    blocks: list[Block] = [Bars("Nodes by operator", bars)] if bars else []
    if len(names) > len(bars):
        blocks.append(Table(("operator", "before", "after", "change"), rows, "All operators"))
    return blocks


def _passes(content: Content) -> Section:
    rows, classes = [], Counter[int]()
    for one in content["passes"]:
        classes.update(done["exactness"] for done in one["done"])
        rows.append(
            [
                code(one["name"]),
                number(one["rewrites"]),
                text(", ".join(EXACTNESS_TEXT[Exactness(number)] for number in one["exactness"])),
                number(one["refused_count"]),
            ]
        )
    blocks: list[Block] = []
    if classes:
        bars = [
            Bar(
                f"{EXACTNESS_TEXT[kind]}: {means}",
                classes.get(int(kind), 0),
                f"{classes.get(int(kind), 0):,}",
                is_code=False,
            )
            for kind, means in EXACTNESS_MEANS.items()
        ]
        blocks.append(Bars("Rewrites by exactness class", bars))
    blocks.append(Table(("pass", "rewrites", "exactness", "refused"), rows))
    if content["dropped"]:
        lines = [f"{dropped['what']}: {dropped['reason']}" for dropped in content["dropped"]]
        blocks.append(Lines(lines, "Left out, because of what it did to this model"))
    rounds = content["rounds"]
    return Section(
        "Passes",
        blocks,
        f"They ran {rounds} {'round' if rounds == 1 else 'rounds'}, until none found anything to rewrite.",
    )


def _merges(passes: Sequence[Mapping[str, Any]]) -> list[Section]:
    rows: list[list[Cell]] = []
    others: list[list[Cell]] = []
    for one in passes:
        for done in one["done"]:
            kind = Exactness(done["exactness"])
            row = [code(one["name"]), code(done["node"]), text(EXACTNESS_TEXT[kind]), text(done["detail"])]
            (rows if one["is_merge"] else others).append(row)
    header = ("pass", "node", "exactness", "detail")
    blocks: list[Block] = [Table(header, rows, "Merges of linear operators")] if rows else []
    if others:
        blocks.append(Table(header, others, "Other rewrites"))
    return [Section("Every rewrite", blocks)] if blocks else []


def _refusals(passes: Sequence[Mapping[str, Any]]) -> list[Section]:
    rows = [[code(one["name"]), code(miss["node"]), text(miss["reason"])] for one in passes for miss in one["refused"]]
    if not rows:
        return []
    reasons = Counter(row[2].text for row in rows)
    bars = [Bar(reason, count, f"{count:,}", is_code=False) for reason, count in reasons.most_common(12)]
    left_out = sum(one["refused_count"] - len(one["refused"]) for one in passes)
    blocks: list[Block] = [Bars("Reasons", bars)] if len(reasons) > 1 else []
    blocks.append(Table(("pass", "node", "reason"), rows, "What was refused, and why"))
    if left_out:
        blocks.append(Lines([f"{left_out:,} more refusals of the same passes are not listed"]))
    return [Section("Refused", blocks, "Places that looked right for a rewrite and were left as they are.")]


def _equivalence(equivalence: Mapping[str, Any] | None) -> list[Section]:
    if equivalence is None or not equivalence["outputs"]:
        return []
    note = (
        f"Both models ran on onnxruntime, its own optimizations off, on {equivalence['feeds']} inputs. "
        "An output counts by max|d| / max|y|."
    )
    return [Section("Equivalence", [output_table(equivalence["outputs"])], note)]
