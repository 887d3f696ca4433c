"""Figures of a run in words."""

from __future__ import annotations

from onnxcompress.compression.goal import Goal, Limit
from onnxcompress.compression.point import Point


def drop_text(point: Point, *, bare: bool = False) -> str:
    """``top1 drops by 0.50%``."""
    if point.drop is None:
        return "the drop is not known"
    amount = f"{point.drop:.2%}"
    return amount if bare else f"{point.criterion} drops by {amount}"


def too_much_text(point: Point, allowed: float) -> str:
    """``top1 drops by 3.00%, allowed 1.00%``, with as many digits as tell them apart."""
    assert point.drop is not None
    digits = next((count for count in (2, 3, 4) if f"{point.drop:.{count}%}" != f"{allowed:.{count}%}"), 6)
    return f"{point.criterion} drops by {point.drop:.{digits}%}, allowed {allowed:.{digits}%}"


def goal_figure(limit: Limit, point: Point, original: Point) -> str:
    """A figure in the form in which its goal was given: ``size 9.8x``."""
    if limit.key == "size":
        ratio = f"{original.size_bytes / point.size_bytes:.2f}x"
        return f"size {ratio if limit.relative else f'{point.size_bytes:,} bytes'}"
    if limit.key == "macs":
        return f"macs {point.macs / max(original.macs, 1):.3f}x" if limit.relative else f"{point.macs:,} macs"
    if limit.relative:
        return f"latency {point.latency_share:.3f}x"
    return f"latency {point.figure('latency'):.3f} ms"


def nearest_text(goal: Goal, point: Point, original: Point) -> str:
    """Where a point stands in all that was wished."""
    figures = [goal_figure(limit, point, original) for limit in goal.limits]
    if goal.is_smallest:
        figures.append(f"size {original.size_bytes / point.size_bytes:.2f}x")
    if point.drop is not None:
        figures.append(drop_text(point))
    return ", ".join(figures)


def bytes_and_ratio(point: Point, original: Point) -> str:
    return f"{point.size_bytes:,} ({original.size_bytes / point.size_bytes:.2f}x)"


def latency_text(point: Point, original: Point) -> str:
    """Of the original in ms, else beside the original's of the same minute: a machine is not as fast at all times."""
    if point.latency is None:
        return ""
    return f"{point.latency.result_ms:.3f} ms" if point is original else f"{point.latency_share:.2f}x"


def error_text(point: Point) -> str:
    return "" if point.error is None else f"{point.error:.3g}"
