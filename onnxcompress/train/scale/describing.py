"""Scale pruning in words: rows and lines for the terminal, Markdown for a report."""

from __future__ import annotations

from collections.abc import Sequence

from onnxcompress.report import bytes_text, environment
from onnxcompress.train.scale.options import Decision, Point, ScalePlan, ScaleResult
from onnxcompress.train.scale.predictor import AXES, AxisFit

POINT_HEADER = ("point", *AXES, "MACs", "cost", "fitted", "trained")
FIT_HEADER = ("axis", "degree", "polynomial", "leave-one-out error")
CHECK_HEADER = ("axis", "size", "x F'/e", "with d w^2 r^2", "e", "bound")
FIGURE_HEADER = ("", "before", "after", "change")


def point_rows(points: Sequence[Point]) -> list[tuple[str, ...]]:
    """A row for each point, as in ``POINT_HEADER``."""
    rows = []
    for point in points:
        sizes = (f"{size:.3f}" for size in point.sizes)
        figures = ("" if value != value else f"{value:.4g}" for value in (point.fitted, point.figure))
        rows.append((point.name, *sizes, f"{point.macs:,.0f}", f"{point.cost:.3f}x", *figures))
    return rows


def fit_rows(fits: Sequence[AxisFit]) -> list[tuple[str, ...]]:
    """A row for each fit, as in ``FIT_HEADER``."""
    rows: list[tuple[str, ...]] = []
    for fit in fits:
        powers = ("", " x", " x^2", " x^3")
        terms = (f"{value:+.4g}{power}" for value, power in zip(fit.coefficients, powers, strict=False))
        rows.append((fit.axis, str(fit.degree), " ".join(terms), f"{fit.loo_error:.2g}"))
    return rows


def check_rows(decision: Decision) -> list[tuple[str, ...]]:
    """A row for each axis, as in ``CHECK_HEADER``."""
    return [
        (one.axis, f"{one.size:.3f}", f"{one.gain:.4f}", f"{one.paper_gain:.4f}", f"{one.exponent:.2f}", one.bound)
        for one in decision.check.axes
    ]


def plan_lines(plan: ScalePlan) -> list[str]:
    """What a run would do."""
    lines = [f"{plan.source}: {plan.goal}, nothing is written"]
    for axis, found in plan.axes.items():
        if found["refusal"]:
            lines.append(f"{axis}: not pruned, {found['refusal']}")
        else:
            size, cost = found["least_size"], found["least_cost"]
            lines.append(f"{axis}: {found['levels']} levels down to {size:.3f}, alone {cost:.3f}x")
    lines.append(
        f"{plan.triples:,} triples within the goal; {len(plan.points)} points on the axes, {plan.mixed} off them, "
        + (f"{plan.candidates} candidates or more for the result" if plan.candidates > 1 else "one for the result")
    )
    times = ", ".join(f"{stage} {_time_text(seconds)}" for stage, seconds in plan.seconds.items())
    lines.append(f"expected time: {times}; {_time_text(sum(plan.seconds.values()))} in all, fits not counted")
    return lines


def decision_lines(decision: Decision) -> list[str]:
    """How the triple was chosen."""
    sizes = ", ".join(f"{axis} {size:.3f}" for axis, size in zip(AXES, decision.sizes, strict=True))
    up = "" if decision.higher_is_better else ", less is better"
    lines = [
        f"chosen of {decision.triples:,} triples: {sizes}; cost {decision.cost:.3f}x, allowed {decision.limit:.3f}x",
        f"{decision.metric}{up}: {decision.predicted:.4g} +- {decision.deviation:.2g} predicted, "
        f"{decision.product:.4g} by the {decision.form} of the fits alone, {decision.base:.4g} originally",
    ]
    if decision.off_axis_error is not None:
        count = sum(point.axis == "mixed" for point in decision.points)
        lines.append(f"off the axes the {decision.form} was off by {decision.off_axis_error:.2g} (rms of {count})")
    if decision.candidates:
        lines.append(f"{len(decision.candidates)} candidates were trained for a while: {_losses(decision.candidates)}")
    lines += [f"{axis} was not pruned: {reason}" for axis, reason in decision.refusals.items()]
    return lines


def check_lines(decision: Decision) -> list[str]:
    """The cross-check in words."""
    check = decision.check
    where = "inside" if check.interior else "on a bound"
    gap = f", gains differ by {check.spread:.0%}" if check.spread == check.spread else ""
    sizes = ", ".join(f"{size:.3f}" for size in check.continuous)
    return [
        f"the optimum is {where}{gap}; with sizes as real numbers it would be {sizes}: {check.continuous_figure:.4g} "
        f"by the fits, {check.chosen_figure:.4g} at the triple",
        f"d w^2 r^2 is off by {check.model_error:+.1%} at worst near the goal",
    ]


def figure_rows(result: ScaleResult) -> list[tuple[str, ...]]:
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


def result_lines(result: ScaleResult) -> list[str]:
    """What was done."""
    lines = [f"{result.source} -> {result.output}; goal: {result.goal}; learned from {result.learned_from}"]
    if result.decision is not None:
        lines += decision_lines(result.decision)
    if len(result.finalists) > 1:
        lines.append(f"{len(result.finalists)} of them were trained to the end: {_losses(result.finalists)}")
    gone = sum(whole - kept for kept, whole in result.channels.values())
    lines.append(
        f"{len(result.deleted)} blocks deleted, {gone} channels removed from {len(result.channels)} groups, "
        f"{result.pixels[0]} pixels high -> {result.pixels[1]}"
    )
    if result.native and result.pixels[0] != result.pixels[1]:
        lines.append("the input has the new size itself; latency is that with the image made smaller inside")
    run = result.training
    resumed = f", resumed at step {run.resumed_from}" if run.resumed_from is not None else ""
    lines.append(
        f"{result.fitted:.4g} fitted; trained {run.steps} of {run.total} steps{resumed}, best at {run.best_step}"
    )
    lines.append(f"merged and unmerged differ by {result.merge_error:.1e} at most; {result.seconds:.1f} s")
    return lines


def result_markdown(result: ScaleResult) -> str:
    """A result as Markdown."""
    parts = [f"# {result.source}\n", *(f"- {line}" for line in result_lines(result)), ""]
    parts += _table(FIGURE_HEADER, figure_rows(result))
    if result.decision is not None:
        parts.append("\n## Points\n")
        parts += _table(POINT_HEADER, point_rows(_measured(result)))
        parts.append("\n## Fits\n")
        parts += _table(FIT_HEADER, fit_rows(list(result.decision.fits.values())))
        parts.append("\n## Conditions of Karush, Kuhn and Tucker\n")
        parts += _table(CHECK_HEADER, check_rows(result.decision))
        parts += ["", *(f"- {line}" for line in check_lines(result.decision))]
    if result.channels:
        parts.append("\n## Channels\n")
        rows = [(name, str(kept), str(whole)) for name, (kept, whole) in result.channels.items()]
        parts += _table(("group", "kept", "of"), rows)
    parts.append("\n" + ", ".join(f"{name} {number}" for name, number in environment().items()))
    return "\n".join(parts) + "\n"


def _measured(result: ScaleResult) -> list[Point]:
    assert result.decision is not None
    raced = [point for point in result.decision.candidates if point.axis == "candidate"]
    return [*result.decision.points, *raced, *result.finalists]


def _losses(points: Sequence[Point]) -> str:
    """With their loss, or their figure where there is none, the best one first."""
    with_loss = all(point.loss == point.loss for point in points)
    levels = (("-".join(map(str, p.levels)), p.loss if with_loss else p.figure) for p in points)
    text = ", ".join(f"{name} {value:.4g}" for name, value in levels)
    return f"{text} ({'loss on' if with_loss else 'of'} validation samples)"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return [*lines, *(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows)]


def _change(before: float, after: float) -> str:
    return f"{(after - before) / before:+.1%}" if before else ""


def _time_text(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
