"""From records to verdicts, statistics and Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

# Rounding of a float32 network whose operations were put in another order, where onnxruntime itself changes nothing.
ROUNDING_FLOOR = 1e-5
GROWN = 1.01  # a file larger than this times the original has grown
MIB = 1 << 20


def geometric_mean(values: Iterable[float]) -> float | None:
    positive = list(values)
    return statistics.geometric_mean(positive) if positive else None


def allowed_error(original: Record) -> float:
    """Twice what onnxruntime's own optimizations do to the original, or what a 1e-6 change of its input does."""
    noise, sensitivity = original["reference"]["noise"] or 0.0, original["reference"]["sensitivity"] or 0.0
    return max(2 * noise, sensitivity, ROUNDING_FLOOR)


def status(record: Record, original: Record) -> str:
    """ok | unverified (the original does not run here) | differs | fails"""
    compared = record.get("compare")
    if record.get("failure") or compared is None or not compared["loads"]:
        return "fails"
    if not original["reference"]["cases"]:
        return "unverified"
    if not compared["runs"]:
        return "fails"
    if compared["error"] is None or compared["error"] > allowed_error(original):
        return "differs"
    return "ok"


def usable(record: Record, original: Record) -> bool:
    """Whether its figures count: a file that is wrong is not a smaller file."""
    return status(record, original) in ("ok", "unverified")


def new_foreign_nodes(record: Record, original: Record) -> int:
    return max(0, int(record["facts"]["foreign_nodes"]) - int(original["facts"]["foreign_nodes"]))


def kept(record: Record, original: Record, key: str) -> float:
    """Optimized / original of one figure; an empty graph counts as one node so that the mean exists."""
    return float(max(record["facts"][key], 1) / max(original["facts"][key], 1))


def remark(record: Record, original: Record) -> str:
    """Why a cell is not "ok", in words."""
    if record.get("failure"):
        return str(record["failure"])
    parts = []
    compared = record["compare"]
    if compared.get("message"):
        parts.append(compared["message"])
    if record["facts"]["checker"] != "ok" and original["facts"]["checker"] == "ok":
        parts.append(f"checker: {record['facts']['checker']}")
    parts += record["interface"]["differences"]
    return "; ".join(parts)


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def shortened(text: str, limit: int = 160) -> str:
    text = text.replace("|", "\\|")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def latency_cell(record: Record) -> str:
    measured = record.get("latency")
    if not measured:
        return "-"
    if "ratio_p50" not in measured:
        return "fails"
    return f"{measured['ratio_p50']:.3f} ({measured['ratio_p10']:.2f}-{measured['ratio_p90']:.2f})"


MODEL_HEADER = (
    "arm",
    "status",
    "nodes",
    "kept",
    "bytes",
    "kept",
    "gzip",
    "interface",
    "checker",
    "max err",
    "wall s",
    "cpu s",
    "peak MB",
    "latency ratio (p10-p90)",
    "remark",
)


def model_row(arm: str, record: Record, original: Record) -> list[str]:
    facts, run = record.get("facts"), record["optimize"]
    cost = [f"{run['wall_s']:.2f}", f"{run['cpu_s']:.2f}", f"{run['peak_mb']:.0f}"]
    if not facts:
        return [arm, "fails", *["-"] * 8, *cost, "-", shortened(remark(record, original))]
    foreign = new_foreign_nodes(record, original)
    return [
        arm,
        status(record, original),
        f"{facts['nodes']}" + (f" ({foreign} non-standard)" if foreign else ""),
        f"{kept(record, original, 'nodes'):.3f}",
        f"{facts['bytes']:,}",
        f"{kept(record, original, 'bytes'):.4f}",
        f"{facts['gzip_bytes']:,}",
        record["interface"]["verdict"],
        "ok" if facts["checker"] == "ok" else "fails",
        number(record["compare"].get("error"), ".1e"),
        *cost,
        latency_cell(record),
        shortened(remark(record, original)),
    ]


def model_section(name: str, original: Record, records: Mapping[str, Record]) -> str:
    """The table of one model, under what was found about the original."""
    facts, reference = original["facts"], original["reference"]
    runs = ", ".join(case["label"] for case in reference["cases"]) or "none"
    dropped = "; ".join(f"{label} ({shortened(why)})" for label, why in reference["dropped"].items()) or "none"
    lines = [
        f"Original: {facts['nodes']} nodes without {facts['constant_nodes']} Constant, {facts['bytes']:,} bytes,",
        f"{facts['gzip_bytes']:,} gzip, IR {facts['ir_version']}, opset {facts['opsets'].get('', '-')},",
        f"checker {facts['checker']}. Cases: {runs}; not possible: {dropped}.",
        f"onnxruntime's noise {number(reference['noise'], '.1e')},",
        f"sensitivity to 1e-6 {number(reference['sensitivity'], '.1e')}, allowed error {allowed_error(original):.1e}.",
    ]
    rows = [model_row(arm, record, original) for arm, record in records.items()]
    return "\n\n".join([f"### {name}", "\n".join(lines), table(MODEL_HEADER, rows)])


SUMMARY_HEADER = (
    "arm",
    "models",
    "ok",
    "fails",
    "differs",
    "interface changed",
    "refined",
    "checker fails",
    "grown > 1 %",
    "non-standard operators",
    "nodes kept",
    "nodes kept, standard only",
    "bytes kept",
    "gzip kept",
    "median s",
    "max s",
    "max MB",
    "latency ratio",
    "(control)",
    "of the fastest tenths",
)


def summarize(records: Mapping[str, Record], originals: Mapping[str, Record]) -> dict[str, Any]:
    """The figures of one arm over all models; means are geometric, over the files that are not wrong."""
    pairs = [(record, originals[name]) for name, record in records.items()]
    verdicts = [status(*pair) for pair in pairs]
    valid = [pair for pair in pairs if usable(*pair)]
    standard = [pair for pair in valid if not new_foreign_nodes(*pair)]
    written = [pair for pair in pairs if pair[0].get("facts")]
    timed = [record["latency"] for record, _ in valid if "ratio_p50" in (record.get("latency") or {})]
    walls = [record["optimize"]["wall_s"] for record, _ in pairs]
    return {
        "models": len(pairs),
        "ok": verdicts.count("ok") + verdicts.count("unverified"),
        "fails": verdicts.count("fails"),
        "differs": verdicts.count("differs"),
        "interface_changed": sum(record["interface"]["verdict"] == "changed" for record, _ in written),
        "interface_refined": sum(record["interface"]["verdict"] == "refined" for record, _ in written),
        "checker_fails": sum(
            record["facts"]["checker"] != "ok" and original["facts"]["checker"] == "ok" for record, original in written
        ),
        "grown": sum(kept(*pair, "bytes") > GROWN for pair in written),
        "non_standard": sum(new_foreign_nodes(*pair) > 0 for pair in written),
        "nodes_kept": geometric_mean(kept(*pair, "nodes") for pair in valid),
        "standard_nodes_kept": geometric_mean(kept(*pair, "nodes") for pair in standard),
        "standard_models": len(standard),
        "bytes_kept": geometric_mean(kept(*pair, "bytes") for pair in valid),
        "gzip_kept": geometric_mean(kept(*pair, "gzip_bytes") for pair in valid),
        "median_wall_s": statistics.median(walls) if walls else None,
        "max_wall_s": max(walls, default=None),
        "max_peak_mb": max((record["optimize"]["peak_mb"] for record, _ in pairs), default=None),
        "latency_ratio": geometric_mean(measured["ratio_p50"] for measured in timed),
        "fast_latency_ratio": geometric_mean(measured["ratio_fast"] for measured in timed),
        "control_ratio": geometric_mean(measured["control_p50"] for measured in timed),
    }


def summary_row(arm: str, summary: Mapping[str, Any]) -> list[str]:
    verdicts = ("models", "ok", "fails", "differs", "interface_changed", "interface_refined", "checker_fails")
    counts = (*verdicts, "grown", "non_standard")
    standard = number(summary["standard_nodes_kept"], ".3f")
    return [
        arm,
        *(str(summary[key]) for key in counts),
        number(summary["nodes_kept"], ".3f"),
        f"{standard} (n={summary['standard_models']})",
        number(summary["bytes_kept"], ".4f"),
        number(summary["gzip_kept"], ".4f"),
        number(summary["median_wall_s"], ".2f"),
        number(summary["max_wall_s"], ".2f"),
        number(summary["max_peak_mb"], ".0f"),
        number(summary["latency_ratio"], ".3f"),
        number(summary["control_ratio"], ".3f"),
        number(summary["fast_latency_ratio"], ".3f"),
    ]


def markdown(originals: Mapping[str, Record], results: Mapping[str, Mapping[str, Record]], heading: str) -> str:
    """The whole report. ``results`` is arm -> model -> record."""
    summaries = [summary_row(arm, summarize(records, originals)) for arm, records in results.items()]
    parts = [f"# {heading}", table(SUMMARY_HEADER, summaries)]
    for name, original in originals.items():
        own = {arm: records[name] for arm, records in results.items() if name in records}
        parts.append(model_section(name, original, own))
    return "\n\n".join(parts) + "\n"
