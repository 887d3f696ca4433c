"""A run in words: tables of what was tried, and Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from onnxcompress.compression.attempts import Attempt
from onnxcompress.compression.options import CompressResult
from onnxcompress.compression.planning import Plan
from onnxcompress.compression.point import Point
from onnxcompress.compression.wording import bytes_and_ratio, drop_text, error_text, latency_text

ATTEMPT_HEADER = ("step", "on", "bytes", "MACs", "latency", "drop", "s", "")


def attempt_rows(result: CompressResult) -> list[list[str]]:
    """The original and everything that was tried."""
    rows = [["0 original", "", *_figures(result.original, result.original), "", ""]]
    for attempt in result.attempts:
        figures = ["", "", "", ""] if attempt.point is None else _figures(attempt.point, result.original)
        on = "" if attempt.base is None else str(attempt.base.number)
        rows.append(
            [f"{attempt.number} {attempt.step.text}", on, *figures, f"{attempt.seconds:.0f}", _verdict(attempt)]
        )
    return rows


def attempt_line(attempt: Attempt) -> str:
    """While the run goes on: what a step gave."""
    if attempt.point is None:
        found = f"failed: {attempt.failure}"
    else:
        point = attempt.point
        lost = "" if point.drop is None else f", {drop_text(point)}"
        latency = "" if point.latency is None else f", {point.latency_share:.2f}x latency"
        found = f"{point.size_bytes:,} bytes, {point.macs:,} MACs{latency}{lost}"
    return f"step {attempt.number}, {attempt.step.text}: {found}; {attempt.seconds:.0f} s"


def _figures(point: Point, original: Point) -> list[str]:
    drop = "" if point.drop is None or point is original else drop_text(point, bare=True)
    return [bytes_and_ratio(point, original), f"{point.macs:,}", latency_text(point, original), drop]


def _verdict(attempt: Attempt) -> str:
    if attempt.failure:
        return f"failed: {attempt.failure}"
    return attempt.verdict or "not taken"


def result_lines(result: CompressResult) -> list[str]:
    """What came of it."""
    lines = []
    if result.goal:
        lines.append(f"goal {result.goal}: {'reached' if result.met else 'not reached'}; {result.standing}")
    point = result.result
    if point.before is not None and point.after is not None:
        lines.append(f"{point.criterion} on {result.samples} samples: {point.before:.4f} -> {point.after:.4f}")
    elif point.drop is not None:
        lines.append(f"{drop_text(point)} on {result.samples} samples; outputs are off by {error_text(point)}")
    elif point.error is not None:
        lines.append(f"outputs are off by {error_text(point)}, relative, on made-up inputs")
    lines.append(f"steps: {' -> '.join(attempt.step.text for attempt in result.chain) or 'none, a copy'}")
    lines += [f"step {attempt.number}: {'; '.join(attempt.summary)}" for attempt in result.chain if attempt.summary]
    lines += [f"note: {note}" for note in result.notes]
    where = f"written to {result.output}" if result.output is not None else "nothing was written"
    return [*lines, f"{where}; {result.seconds:.1f} s"]


def failure_line(result: CompressResult) -> str:
    """For stderr, where the goal was not reached."""
    kept = f"it is in {result.output}" if result.output is not None else "--nearest writes it"
    steps = " -> ".join(attempt.step.text for attempt in result.chain) or "the original"
    return f"{result.source}: {result.goal} is out of reach; the nearest is {result.standing} ({steps}); {kept}"


def result_markdown(result: CompressResult) -> str:
    """A report."""
    lines = [f"# {result.source}", "", *(f"- {line}" for line in result_lines(result)), ""]
    lines += _table(ATTEMPT_HEADER, attempt_rows(result))
    return "\n".join([*lines, "", "A recipe that repeats the run:", "", "```toml", result.recipe.rstrip(), "```", ""])


def plan_lines(plan: Plan) -> list[str]:
    """What would be tried, in its order."""
    lines = [f"goal {plan.goal}: each step is measured, the run ends where it is reached"] if plan.goal else []
    for number, planned in enumerate(plan.steps, 1):
        lines.append(f"{number}. {planned.step.text}")
        lines.append(f"     {planned.when}: {planned.why}")
        lines += [f"     expected: {planned.expected}"] if planned.expected else []
    return [*lines, *(f"note: {note}" for note in plan.notes)]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return [line(header), f"|{'---|' * len(header)}", *map(line, rows)]
