"""What is said of a run: one dictionary, shown as JSON, as Markdown, or by the command line as a table."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcompress.errors import OutputError, RecipeError
from onnxcompress.linear import Exactness

if TYPE_CHECKING:
    from onnxcompress.optimizer import Result

PACKAGES = ("onnxcompress", "onnx", "onnxruntime", "onnx-graphsurgeon", "numpy")
MISSES_SHOWN = 200

EXACTNESS_TEXT = {
    Exactness.EXACT: "1 exact",
    Exactness.EXACT_WITHOUT_BIAS: "2 exact without bias",
    Exactness.EXACT_WITH_BIAS_MAP: "3 exact with bias map",
    Exactness.APPROXIMATE: "4 approximate",
}


def environment() -> dict[str, str]:
    """Versions and machine, so that a figure can be placed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return {**found, "python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}


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


def speed_text(latency: Mapping[str, Any]) -> str:
    """The speed-up with its 95 % interval, in words that say no more than was measured."""
    ratio, low, high = latency["ratio"], latency["low"], latency["high"]
    interval = f"({low:.2f}-{high:.2f})"
    if low <= 1 <= high:
        return f"no difference measured {interval}"
    return f"x{ratio:.2f} as fast {interval}"


def _operator_rows(before: Mapping[str, int], after: Mapping[str, int]) -> list[tuple[str, str, str, str]]:
    changed = [op for op in {**before, **after} if before.get(op, 0) != after.get(op, 0)]
    changed.sort(key=lambda op: -abs(before.get(op, 0) - after.get(op, 0)))
    shown = [(f"  {op}", str(before.get(op, 0)), str(after.get(op, 0)), "") for op in changed[:12]]
    if len(changed) > 12:
        rest = changed[12:]
        total = (sum(before.get(op, 0) for op in rest), sum(after.get(op, 0) for op in rest))
        shown.append((f"  {len(rest)} more operators", str(total[0]), str(total[1]), ""))
    return shown


def change(before: float, after: float) -> str:
    """The change in per cent; empty where nothing changed or nothing was there."""
    if not before or before == after:
        return ""
    return f"{100 * (after / before - 1):+.1f} %"


def bytes_text(size: float) -> str:
    """Bytes with a decimal unit, as file managers show them."""
    for unit in ("B", "kB", "MB"):
        if abs(size) < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


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


def write(path: Path, reports: Sequence[Mapping[str, Any]]) -> None:
    """Write reports to a ``.json`` or ``.md`` file.

    Raises:
        RecipeError: Another suffix.
        OutputError: The file cannot be written.
    """
    write_as(path, reports[0] if len(reports) == 1 else list(reports), lambda: markdown(reports))


def write_as(path: Path, content: Any, as_markdown: Callable[[], str]) -> None:
    """Write a report as JSON or as Markdown, as the name of the file says.

    Raises:
        RecipeError: Another suffix.
        OutputError: The file cannot be written.
    """
    text = as_markdown() if check_suffix(path) == ".md" else json.dumps(content, indent=1)
    try:
        path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write the report {path}: {error.strerror}") from error


def check_suffix(path: Path) -> str:
    """The report's suffix.

    Raises:
        RecipeError: Neither ``.json`` nor ``.md``.
    """
    suffix = path.suffix.lower()
    if suffix not in (".json", ".md"):
        raise RecipeError(f"report {path}: the name must end in .json or .md")
    return suffix


# -- quantize --------------------------------------------------------------------------------------------------------

REFUSALS_SHOWN = 12


def layer_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each layer: name, operator, weights, form, bits per weight, bytes, error."""
    return [
        (
            row["name"],
            row["kind"],
            f"{row['weights']:,}",
            row["form"],
            f"{row['bits_per_weight']:.2f}",
            f"{row['size_bytes']:,}",
            "" if row["error"] is None else f"{row['error']:.4f}",
        )
        for row in report["layers"]
    ]


def quantization_lines(report: Mapping[str, Any], *, refusals: int = REFUSALS_SHOWN) -> list[str]:
    """What a quantization came to: size, quality, refusals, notes."""
    written = report["output"] is not None
    target = f"{report['input']} -> {report['output']}" if written else f"{report['input']}, plan only"
    sizes = f"{bytes_text(report['before_bytes'])} -> {bytes_text(report['after_bytes'])}"
    exact = f"{report['after_bytes']:,} bytes, {report['ratio']:.2f}x"
    lines = [f"{target}: {sizes} ({exact}), {report['seconds']:.1f} s"]
    quality = report["quality"]
    if quality is None:
        lines.append(
            f"predicted relative error of the outputs, an upper estimate: {_figure(report['predicted_error'])}"
        )
    else:
        fitted = f"{report['calibration_samples']} samples fitted, {quality['samples']} others measured"
        lines.append(fitted if report["calibration_samples"] else f"{quality['samples']} samples measured")
        for output in quality["outputs"]:
            agreement = "" if output["agreement"] is None else f", top-1 agreement {output['agreement']:.2%}"
            cosine = f"relative error {_figure(output['error'])}, cosine {_figure(output['cosine'])}"
            lines.append(f"{output['name']}: {cosine}{agreement}")
        if quality["metric"] is not None:
            before, after = _figure(quality["before"]), _figure(quality["after"])
            lines.append(f"{quality['metric']}: {before} -> {after}, drop {_figure(quality['drop_of_metric'])}")
    refused = report["refused"]
    lines.extend(f"left as it is: {one['name']}, {one['reason']}" for one in refused[:refusals])
    if len(refused) > refusals:
        lines.append(f"... and {len(refused) - refusals} more left as they are")
    lines.extend(f"note: {note}" for note in report["notes"])
    return lines


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def quantization_markdown(report: Mapping[str, Any]) -> str:
    """A quantization as Markdown."""
    parts = [f"# {report['input']}\n", *(f"- {line}" for line in quantization_lines(report, refusals=MISSES_SHOWN))]
    parts.append("\n| layer | operator | weights | form | bits per weight | bytes | relative error |")
    parts.append("|---|---|--:|---|--:|--:|--:|")
    parts.extend(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in layer_rows(report))
    versions = ", ".join(f"{name} {number}" for name, number in report["environment"].items())
    parts.append(f"\n{versions}")
    return "\n".join(parts)


def write_quantization(path: Path, report: Mapping[str, Any]) -> None:
    """Write the report of a quantization to a ``.json`` or ``.md`` file.

    Raises:
        RecipeError: Another suffix.
        OutputError: The file cannot be written.
    """
    write_as(path, report, lambda: quantization_markdown(report))
