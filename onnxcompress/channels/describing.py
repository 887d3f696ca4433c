"""Results of ``prune-width`` as text."""

from __future__ import annotations

from onnxcompress.channels.pruning import WidthResult


def group_rows(found: WidthResult) -> list[tuple[str, str, str, str]]:
    """Name, channels, how many stay, and elements of each, of the groups that can be pruned."""
    return [(row.name, str(row.channels), str(row.kept), str(row.width)) for row in found.groups if not row.frozen]


def frozen_lines(found: WidthResult) -> list[str]:
    """The groups that stay, and why."""
    return [f"stays: {row.name} ({row.channels} channels): {row.frozen}" for row in found.groups if row.frozen]


def result_lines(found: WidthResult, *, is_list: bool = False) -> list[str]:
    """The figures."""
    if is_list:
        return [f"{found.prunable:.1%} of the channels can be pruned; {_macs(found.macs[0], found.exact)}"]
    before, after = found.macs
    lines = [f"{_macs(before, found.exact)} -> {_macs(after, found.exact)} ({after / max(before, 1):.3f}x)"]
    if found.size_bytes is not None:
        lines[0] += f", {found.size_bytes[0]:,} -> {found.size_bytes[1]:,} bytes"
    if found.latency is not None:
        lines.append(f"latency {found.latency.original_ms:.3f} -> {found.latency.result_ms:.3f} ms, before the passes")
    if found.contract_error is not None:
        near = any(row.approximate and row.kept < row.channels for row in found.groups)
        means = ", means over those that stay" if near else ""
        lines.append(
            f"checked: as the original with these channels at zero{means}, max|d| / max|y| {found.contract_error:.1e}"
        )
    if found.fits:
        mean = [
            sum(values) / len(found.fits) for values in zip(*((f.before, f.after) for f in found.fits), strict=True)
        ]
        lines.append(
            f"{len(found.fits)} layers make up for what went: relative squared error {mean[0]:.3g} -> {mean[1]:.3g}"
        )
    quality = found.quality
    if quality is not None:
        if quality.metric is not None and quality.before is not None and quality.after is not None:
            lines.append(f"{quality.metric} {quality.before:.4f} -> {quality.after:.4f}")
        for output in quality.outputs:
            same = "" if output.agreement is None else f", agreement {output.agreement:.1%}"
            lines.append(
                f"output {output.name!r} on {quality.samples} held-out samples: error {output.error:.3f}{same}"
            )
    lines += [f"note: {note}" for note in found.notes]
    if found.output is not None:
        lines.append(
            f"{found.output}; go on with: onnxcompress finetune {found.output} --teacher {found.source} --distill"
        )
    return lines


def result_markdown(found: WidthResult) -> str:
    """A report."""
    table = ["| group | channels | kept | width | stays because |", "|---|--:|--:|--:|---|"]
    table += [
        f"| `{row.name}` | {row.channels} | {row.kept} | {row.width} | {row.frozen.replace('|', '/')} |"
        for row in found.groups
    ]
    lines = [f"- {line}" for line in result_lines(found, is_list=found.size_bytes is None and not found.ranking)]
    fits = []
    if found.fits:
        fits = ["", "| layer | error without its inputs | with new weights |", "|---|--:|--:|"]
        fits += [f"| `{fit.name}` | {fit.before:.4f} | {fit.after:.4f} |" for fit in found.fits]
    return "\n".join([f"# Channels of {found.source}", "", *lines, "", *table, *fits]) + "\n"


def _macs(number: int, exact: bool) -> str:
    return f"{number:,} MACs" if exact else f"about {number:,} MACs (unknown sizes taken as nominal)"
