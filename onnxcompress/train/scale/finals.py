"""The last choice: the most promising networks within the goal are trained for a while, and the best learner goes on.

A predictor is fed with short trainings, and what it says of its best triples differs by less than it is off. So the
best one, the best of the networks that were measured, and others unlike them are pruned from the original and trained
for a quarter of the whole training, as in successive halving (Jamieson & Talwalkar 2016, AISTATS, arXiv 1502.07943).
What they are judged by is what the training makes small, on the validation samples: of a few hundred samples it tells
networks apart that get as many of them right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from onnxcompress.train.scale.options import Point
from onnxcompress.train.scale.predictor import Predictor
from onnxcompress.train.scale.solving import Levels

SHARE = 0.25  # of the steps of the whole training
APART = 0.25  # least distance of two triples, where the way from nothing to all of the saving is 1

Coordinates = Callable[[Sequence[Levels]], tuple[np.ndarray, np.ndarray]]


def finalists(
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
        count: How many at most.
        best: What the predictor takes; the first of them.
        measured: Points.
        triples: All that are within the goal by the table, of which none prunes more than another on every axis.
        predictor: Of the figure.
        coordinates: (n, 3) sizes and (n, 3) places of triples.
        is_within: Whether the real graph at a triple keeps the goal.
    """
    found = [best]
    allowed = set(triples)
    sign = 1.0 if predictor.higher_is_better else -1.0
    known = sorted((p for p in measured if p.levels in allowed), key=lambda point: -sign * point.figure)
    # Half of the places are for what has shown what it can.
    for point in known:
        if len(found) < 1 + count // 2 and point.levels not in found and is_within(point.levels):
            found.append(point.levels)
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
        if is_within(levels):
            found.append(levels)
    return found


def winner(finals: Sequence[Point], *, higher_is_better: bool) -> Point:
    """The point with the least loss; with the best figure where there is no loss to compare."""
    if all(math.isfinite(point.loss) for point in finals):
        return min(finals, key=lambda point: point.loss)
    return max(finals, key=lambda point: point.figure if higher_is_better else -point.figure)
