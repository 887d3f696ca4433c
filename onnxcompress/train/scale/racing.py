"""The last choices: candidates are trained for a while, and the best of them to the end.

A predictor is fed with short trainings, and what it says of its best triples differs by less than it is off. So its
choice, the points off the axes, the best axis alone and others unlike them are each pruned at once from the original
and trained for as long as all rounds of an axis, as in successive halving (Jamieson & Talwalkar 2016, AISTATS,
arXiv 1502.07943). The neighbours of the best follow, one block or one step of pixels away, until none is better: a
good triple often has one block less than another. The best few of all are trained to the end. They are judged by what
the training makes small, on the validation samples: of a few hundred samples it tells networks apart that get as many
of them right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from onnxcompress.train.scale.options import Point
from onnxcompress.train.scale.predictor import Predictor
from onnxcompress.train.scale.solving import Levels

COARSE = 0.03  # an axis whose levels are at least so far apart has neighbours
APART = 0.25  # least distance of two candidates, where the way from nothing to all of the saving is 1

Coordinates = Callable[[Sequence[Levels]], tuple[np.ndarray, np.ndarray]]


def candidates(
    count: int,
    best: Levels,
    measured: Sequence[Point],
    triples: Sequence[Levels],
    predictor: Predictor,
    coordinates: Coordinates,
    is_within: Callable[[Levels], bool],
) -> list[Levels]:
    """The triples that are worth a training.

    Args:
        count: How many; points off the axes, which are trained already, may make it more.
        best: What the predictor takes; the first of them.
        measured: Points, on the axes and off them.
        triples: All that are within the goal by the table, of which none prunes more than another on every axis.
        predictor: Of the figure.
        coordinates: (n, 3) sizes and (n, 3) places of triples.
        is_within: Whether the real graph at a triple keeps the goal.
    """
    found = [best]
    allowed = set(triples)

    def take(levels: Levels) -> bool:
        if levels in found or not is_within(levels):
            return False
        found.append(levels)
        return True

    within = [point for point in measured if point.levels in allowed]
    for point in within:
        if point.axis == "mixed":
            take(point.levels)
    alone = [point for point in within if point.axis != "mixed"]
    for point in in_order(alone, higher_is_better=predictor.higher_is_better):
        if len(found) >= count or take(point.levels):
            break
    left = [levels for levels in triples if levels not in found]
    while left and len(found) < count:
        _, taken = coordinates(found)
        sizes, places = coordinates(left)
        distance = np.sqrt(((places[:, None, :] - taken[None, :, :]) ** 2).sum(axis=2)).min(axis=1)
        far = np.flatnonzero(distance >= APART)
        if not len(far):
            break
        levels = left[int(far[predictor.best(sizes[far], places[far])])]
        left.remove(levels)
        take(levels)
    return found


def neighbours(best: Levels, triples: Sequence[Levels], coordinates: Coordinates) -> list[Levels]:
    """Triples that differ from one by a level of a coarse axis, the others making up for it as little as they can.

    Args:
        best: The one.
        triples: All that are within the goal, of which none prunes more than another on every axis.
        coordinates: (n, 3) sizes and (n, 3) places of triples.
    """
    found: list[Levels] = []
    _, places = coordinates([best, *triples])
    own, others = places[0], places[1:]
    for axis in range(3):
        for level in (best[axis] + 1, best[axis] - 1):
            there = [number for number, levels in enumerate(triples) if levels[axis] == level]
            if not there or abs(others[there[0]][axis] - own[axis]) < COARSE:
                continue
            nearest = min(there, key=lambda number: float(((others[number] - own) ** 2).sum()))
            if triples[nearest] not in found:
                found.append(triples[nearest])
    return found


def in_order(points: Sequence[Point], *, higher_is_better: bool) -> list[Point]:
    """The best first: by loss, by figure where there is no loss to compare."""
    if all(math.isfinite(point.loss) for point in points):
        return sorted(points, key=lambda point: point.loss)
    return sorted(points, key=lambda point: -point.figure if higher_is_better else point.figure)
