"""What is said of ``quantize``: lines, a table, Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxcompress.report.optimization import MISSES_SHOWN
from onnxcompress.report.wording import bytes_text

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
