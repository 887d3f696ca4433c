"""Depth pruning in words: rows and lines for the terminal, Markdown for a report."""

from __future__ import annotations

from collections.abc import Sequence

from onnxcompress.report import bytes_text, environment
from onnxcompress.train.depth.blocks import Refusal
from onnxcompress.train.depth.offers import Offer
from onnxcompress.train.depth.options import DepthPlan, DepthResult

BLOCK_HEADER = ("block", "kind", "becomes", "MACs", "merged", "ms", "merged", "faster", "note")
FIGURE_HEADER = ("", "before", "after", "change")


def block_rows(offers: Sequence[Offer], pruned: Sequence[str] | None = None) -> list[tuple[str, ...]]:
    """A row for each block, as in ``BLOCK_HEADER``; ``pruned`` marks those that were."""
    rows = []
    for offer in offers:
        before, after = ("", "") if offer.latency_ms is None else (f"{ms:.4f}" for ms in offer.latency_ms)
        notes = ["slower: not offered for latency"] if offer.is_slower else []
        notes += ["can be deleted"] if offer.block.deletable and not offer.is_deletion else []
        if pruned is not None:
            notes = ["pruned"] if offer.name in pruned else ["kept"]
        becomes = "nothing" if offer.is_deletion else " ".join(offer.operators)
        faster = "" if offer.speedup is None else f"{offer.speedup:.2f}x"
        macs = (f"{number:,}" for number in offer.macs)
        rows.append((offer.name, offer.block.kind, becomes, *macs, before, after, faster, ", ".join(notes)))
    return rows


def refusal_lines(refusals: Sequence[Refusal]) -> list[str]:
    return [f"not to be merged: {refusal.name}, {refusal.reason}" for refusal in refusals]


def plan_lines(plan: DepthPlan) -> list[str]:
    """What a run would do."""
    lines = [f"{plan.source}: {plan.goal or 'all offered blocks'}, nothing is written"]
    if plan.method:
        lines.append(f"search: {plan.method}, at most {plan.candidates} subnets scored")
    low, high = plan.macs
    span = f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
    lines.append(f"expected MACs: {span} of {plan.base.macs:,}")
    if plan.latency_ms is not None and plan.base.latency_ms is not None:
        low, high = (ms / plan.base.latency_ms for ms in plan.latency_ms)
        span = f"{low:.2f}x" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f}x to {high:.2f}x"
        lines.append(f"expected latency: {span} of {plan.base.latency_ms:.3f} ms, by the sum over blocks")
    times = ", ".join(f"{stage} {_time_text(seconds)}" for stage, seconds in plan.seconds.items())
    if times:
        lines.append(f"expected time: {times}; {_time_text(sum(plan.seconds.values()))} in all")
    return lines


def figure_rows(result: DepthResult) -> list[tuple[str, ...]]:
    """Quality, latency, MACs, nodes and bytes before and after, as in ``FIGURE_HEADER``."""
    before, after, latency = result.figures_before, result.figures_after, result.latency
    name = f"{result.metric} on {result.samples} validation samples"
    faster = f"{latency.ratio:.2f}x ({latency.low:.2f} to {latency.high:.2f})"
    return [
        (name, f"{result.before:.4g}", f"{result.after:.4g}", f"{result.after - result.before:+.4g}"),
        ("latency, ms", f"{latency.original_ms:.3f}", f"{latency.result_ms:.3f}", faster),
        ("MACs", f"{before.macs:,}", f"{after.macs:,}", _change(before.macs, after.macs)),
        ("nodes", f"{before.nodes:,}", f"{after.nodes:,}", _change(before.nodes, after.nodes)),
        (
            "size",
            bytes_text(before.size_bytes),
            bytes_text(after.size_bytes),
            _change(before.size_bytes, after.size_bytes),
        ),
    ]


def result_lines(result: DepthResult) -> list[str]:
    """What was done."""
    lines = [f"{result.source} -> {result.output}; learned from {result.learned_from}"]
    deleted = f", {len(result.deleted)} of them deleted" if result.deleted else ""
    goal = f"; goal: {result.goal}" if result.goal else ""
    places = len({offer.block.add or offer.name for offer in result.offers})
    lines.append(f"{len(result.pruned)} of {places} blocks pruned{deleted}{goal}")
    if result.found is not None:
        found = result.found
        lines.append(f"search: {found.method}, {found.evaluations} subnets scored, best score {found.score:.4g}")
    if result.training is not None:
        run = result.training
        resumed = f", resumed at step {run.resumed_from}" if run.resumed_from is not None else ""
        lines.append(f"trained {run.steps} of {run.total} steps{resumed}, best at step {run.best_step}")
    lines.append(f"merged and unmerged differ by {result.merge_error:.1e} at most; {result.seconds:.1f} s")
    return lines


def result_markdown(result: DepthResult) -> str:
    """A result as Markdown."""
    parts = [f"# {result.source}\n", *(f"- {line}" for line in result_lines(result)), ""]
    parts += _table(FIGURE_HEADER, figure_rows(result))
    parts.append("\n## Blocks\n")
    parts += _table(BLOCK_HEADER, block_rows(result.offers, result.pruned))
    parts.append("\n" + ", ".join(f"{name} {number}" for name, number in environment().items()))
    return "\n".join(parts) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return [*lines, *(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows)]


def _change(before: float, after: float) -> str:
    return f"{(after - before) / before:+.1%}" if before else ""


def _time_text(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
