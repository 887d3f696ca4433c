"""Where to cut a chain so that its segments, each merged into one operator, are the fastest together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class SegmentPrice:
    """A segment as one operator: its time, and the bytes by which it is larger than its parts, maybe negative."""

    latency_ms: float
    growth_bytes: int


@dataclass(frozen=True)
class Partition:
    """A partition of the start of a chain: its price, and its segments of more than one part as (start, stop)."""

    latency_ms: float = 0.0
    growth_bytes: int = 0
    merged: tuple[tuple[int, int], ...] = ()


def fastest_partition(
    length: int, price: Callable[[int, int], SegmentPrice | None], *, growth_bytes: int, longest: int
) -> Partition:
    """The fastest partition of a chain that is not larger than allowed.

    Args:
        length: Number of parts.
        price: Price of the parts start to stop - 1 as one; None where they cannot be one. A single part always can.
        growth_bytes: Largest growth of the whole chain; one segment may grow by what another saves.
        longest: Most parts of one segment.
    """
    # Of the partitions up to each place, those that no other one beats in both time and bytes.
    fronts: list[list[Partition]] = [[Partition()]]
    for stop in range(1, length + 1):
        found = []
        for start in range(max(stop - longest, 0), stop):
            segment = price(start, stop)
            if segment is None:
                continue
            merged = ((start, stop),) if stop - start > 1 else ()
            found += [
                Partition(
                    known.latency_ms + segment.latency_ms,
                    known.growth_bytes + segment.growth_bytes,
                    known.merged + merged,
                )
                for known in fronts[start]
            ]
        fronts.append(_undominated(found))
    allowed = [partition for partition in fronts[length] if partition.growth_bytes <= growth_bytes]
    return min(allowed, key=lambda partition: partition.latency_ms)


def _undominated(partitions: list[Partition]) -> list[Partition]:
    front: list[Partition] = []
    for partition in sorted(partitions, key=lambda p: (p.latency_ms, p.growth_bytes, len(p.merged))):
        if not front or partition.growth_bytes < front[-1].growth_bytes:
            front.append(partition)
    return front
