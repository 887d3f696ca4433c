"""What is said of ``optimize``: a dictionary, a table, Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from onnxcompress.linear import Exactness
from onnxcompress.report.provenance import environment
from onnxcompress.report.wording import bytes_text, change, speed_text

if TYPE_CHECKING:
    from onnxcompress.optimizer import Result

MISSES_SHOWN = 200

EXACTNESS_TEXT = {
    Exactness.EXACT: "1 exact",
    Exactness.EXACT_WITHOUT_BIAS: "2 exact without bias",
    Exactness.EXACT_WITH_BIAS_MAP: "3 exact with bias map",
    Exactness.APPROXIMATE: "4 approximate",
}


def as_dict(result: Result) -> dict[str, Any]:
    """A result as plain data, the content of every report."""
    return {
        "input": result.source,
        "output": None if result.output is None else str(result.output),
        "unchanged": result.unchanged,
        "seconds": round(result.seconds, 3),
        "before": result.before.as_dict(),
        "after": result.after.as_dict(),
        "latency": None if result.latency is None else asdict(result.latency),
        "equivalence": None if result.comparison is None else result.comparison.as_dict(),
        "quality": result.quality,
        "rounds": result.passes.rounds,
        "passes": [
            {
                "name": one.name,
                "rewrites": one.rewrites,
                "is_merge": one.is_merge,
                "exactness": sorted({int(done.exactness) for done in one.done}),
                "done": [{"node": d.node, "exactness": int(d.exactness), "detail": d.detail} for d in one.done],
                "refused": [asdict(miss) for miss in one.misses[:MISSES_SHOWN]],
                "refused_count": len(one.misses),
            }
            for one in result.passes.results.values()
            if one.done or one.misses
        ],
        "dropped": [asdict(dropped) for dropped in result.dropped],
        "environment": environment(),
    }


def rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The table of a report: what, before, after, change."""
    before, after = report["before"], report["after"]
    table = [
        ("nodes", f"{before['nodes']:,}", f"{after['nodes']:,}", change(before["nodes"], after["nodes"])),
        *_operator_rows(before["by_operator"], after["by_operator"]),
    ]
    for name, key in (("bytes", "size_bytes"), ("bytes, gzip", "download_bytes")):
        if before[key] and after[key]:
            change_text = change(before[key], after[key])
            table.append((name, bytes_text(before[key]), bytes_text(after[key]), change_text))
    for name, key in (("parameters", "parameters"), ("MACs", "macs")):
        assumed = key == "macs" and not (before["macs_exact"] and after["macs_exact"])
        label = f"{name} (sizes assumed)" if assumed else name
        # Sizes known only of one of the two would compare a real size with an assumed one.
        comparable = key != "macs" or before["macs_exact"] == after["macs_exact"]
        shown = change(before[key], after[key]) if comparable else ""
        table.append((label, f"{before[key]:,}", f"{after[key]:,}", shown))
    latency = report["latency"]
    if latency is not None:
        table.append(
            ("latency", f"{latency['original_ms']:.3f} ms", f"{latency['result_ms']:.3f} ms", speed_text(latency))
        )
    for name, (a, b) in (report.get("quality") or {}).items():
        table.append((name, f"{a:.4g}", f"{b:.4g}", f"{b - a:+.4g}"))
    return table


def _operator_rows(before: Mapping[str, int], after: Mapping[str, int]) -> list[tuple[str, str, str, str]]:
    changed = [op for op in {**before, **after} if before.get(op, 0) != after.get(op, 0)]
    changed.sort(key=lambda op: -abs(before.get(op, 0) - after.get(op, 0)))
    shown = [(f"  {op}", str(before.get(op, 0)), str(after.get(op, 0)), "") for op in changed[:12]]
    if len(changed) > 12:
        rest = changed[12:]
        total = (sum(before.get(op, 0) for op in rest), sum(after.get(op, 0) for op in rest))
        shown.append((f"  {len(rest)} more operators", str(total[0]), str(total[1]), ""))
    return shown


def proof_line(report: Mapping[str, Any]) -> str:
    """One sentence on equivalence."""
    equivalence = report["equivalence"]
    if equivalence is None:
        return "not checked (--no-check)"
    return str(equivalence["summary"])


def markdown(reports: Sequence[Mapping[str, Any]]) -> str:
    """Reports as Markdown."""
    parts = []
    for report in reports:
        parts.append(f"# {report['input']}\n")
        if report["output"]:
            parts.append(f"Result: `{report['output']}`, {report['seconds']:.1f} s\n")
        parts.append("| | before | after | change |\n|---|--:|--:|--:|")
        parts.extend(f"| {' | '.join(cell.strip() for cell in row)} |" for row in rows(report))
        parts.append(f"\nEquivalence: {proof_line(report)}\n")
        for dropped in report["dropped"]:
            parts.append(f"Left out: {dropped['what']}, because {dropped['reason']}\n")
        parts.append("| pass | rewrites | exactness | refused |\n|---|--:|---|--:|")
        for one in report["passes"]:
            classes = ", ".join(EXACTNESS_TEXT[Exactness(number)] for number in one["exactness"])
            parts.append(f"| {one['name']} | {one['rewrites']} | {classes} | {one['refused_count']} |")
        details = [(one["name"], d) for one in report["passes"] if one["is_merge"] for d in one["done"]]
        if details:
            parts.append("\n## Merges\n")
            parts.extend(f"- {name} at `{d['node']}`: {d['detail']}" for name, d in details)
        refusals = [(one["name"], miss) for one in report["passes"] for miss in one["refused"]]
        if refusals:
            parts.append("\n## Refused\n")
            parts.extend(f"- {name} at `{miss['node']}`: {miss['reason']}" for name, miss in refusals)
        versions = ", ".join(f"{name} {number}" for name, number in report["environment"].items())
        parts.append(f"\n{versions}\n")
    return "\n".join(parts)
