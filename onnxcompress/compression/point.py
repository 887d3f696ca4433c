"""Where a file stands: bytes, multiply-accumulates, latency beside the original's, and what was lost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from onnxcompress.compression.goal import Goal, Key, Limit
from onnxcompress.measure import LatencyFigures


@dataclass(frozen=True)
class Point:
    """Figures of one file.

    Attributes:
        size_bytes: On disk, external data included.
        macs: At batch 1.
        latency: Original and file in turns; None where it was not measured.
        criterion: What ``drop`` is a drop of; "" where nothing could be said.
        drop: Against the original; None without samples.
        before: The original's metric; None without labels.
        after: The file's.
        error: Relative error of the worst output.
        macs_exact: Whether no size is assumed in ``macs``.
    """

    size_bytes: int
    macs: int
    latency: LatencyFigures | None
    criterion: str
    drop: float | None
    before: float | None
    after: float | None
    error: float | None
    macs_exact: bool = True

    @property
    def latency_share(self) -> float:
        """Of the original's latency."""
        return math.nan if self.latency is None else 1 / self.latency.ratio

    @property
    def loss(self) -> float:
        """What candidates are compared by: the drop, and between equal ones the error of the outputs."""
        return (self.drop or 0.0) + 1e-6 * min(self.error or 0.0, 1.0)

    def figure(self, key: Key) -> float:
        """In the unit of a goal's limit."""
        if key == "size":
            return float(self.size_bytes)
        if key == "macs":
            return float(self.macs)
        return math.nan if self.latency is None else self.latency.result_ms

    def meets(self, limit: Limit, original: Point) -> bool:
        """Whether one limit is kept."""
        if limit.key == "latency":
            return self.latency_share <= allowed_share(limit, self)
        return self.figure(limit.key) <= limit.allowed(original.figure(limit.key))

    def within(self, drop: float | None) -> bool:
        """Whether no more was lost."""
        return drop is None or self.drop is None or self.drop <= drop + 1e-12

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def allowed_share(limit: Limit, point: Point) -> float:
    """Of the original's latency, as it was when the point was timed."""
    if limit.relative or point.latency is None:
        return limit.amount
    return limit.amount / point.latency.original_ms


def excess(goal: Goal, point: Point, original: Point) -> float:
    """How far a point is from the limits: the sum of what it has above them, in powers of e."""
    found = 0.0
    for limit in goal.limits:
        if limit.key == "latency":
            share = point.latency_share / allowed_share(limit, point)
        else:
            share = point.figure(limit.key) / max(limit.allowed(original.figure(limit.key)), 1e-9)
        found += max(0.0, math.log(max(share, 1e-9)))
    return found


def reached(goal: Goal, point: Point, original: Point) -> bool:
    """Whether a point is what was wished."""
    return point.within(goal.drop) and all(point.meets(limit, original) for limit in goal.limits)


def point_of(found: Mapping[str, Any]) -> Point:
    """Of what ``as_dict`` gave."""
    latency = found["latency"]
    return Point(**{**found, "latency": None if latency is None else LatencyFigures(**latency)})
