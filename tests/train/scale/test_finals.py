"""Which networks are trained for the last choice, and which of them is taken."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onnxcompress.train.scale.finals import APART, finalists, winner
from onnxcompress.train.scale.options import Point
from onnxcompress.train.scale.predictor import Predictor, fit_axis

LAST = 4
TRIPLES = [(d, w, LAST - d - w) for d in range(LAST + 1) for w in range(LAST + 1 - d)]  # each costs the same


def coordinates(triples):
    levels = np.array(triples, np.float64)
    return 1 - 0.2 * levels, levels / LAST


def predictor(*, higher_is_better=True):
    """Depth hurts least, resolution most."""
    sign = 1 if higher_is_better else -1
    fits = {
        axis: fit_axis(axis, [1.0, 0.6, 0.2], [0.9, 0.9 - sign * 0.5 * loss, 0.9 - sign * loss])
        for axis, loss in (("depth", 0.1), ("width", 0.2), ("resolution", 0.4))
    }
    return Predictor(0.9, fits, higher_is_better)


def point(levels, figure, loss=math.nan):
    return Point("mixed", levels, (1.0, 1.0, 1.0), 1.0, 0.5, figure=figure, loss=loss)


MEASURED = [
    point((4, 0, 0), 0.7),
    point((0, 4, 0), 0.8),
    point((0, 0, 4), 0.3),
    point((1, 1, 0), 0.89),  # not within the goal
]


def chosen(count, measured=MEASURED, is_within=lambda levels: True, **wishes):
    return finalists(count, (4, 0, 0), measured, TRIPLES, predictor(**wishes), coordinates, is_within)


def test_the_best_that_was_measured_comes_second():
    assert chosen(2) == [(4, 0, 0), (0, 4, 0)]
    losses = [point(p.levels, 1 - p.figure) for p in MEASURED]
    assert chosen(2, losses, higher_is_better=False) == [(4, 0, 0), (0, 4, 0)]


def test_half_of_the_places_are_for_what_was_measured_and_the_others_for_what_is_unlike():
    found = chosen(6)
    assert found[:4] == [(4, 0, 0), (0, 4, 0), (0, 0, 4), (3, 1, 0)]
    _, places = coordinates(found)
    gaps = [np.linalg.norm(a - b) for n, a in enumerate(places) for b in places[:n]]
    assert min(gaps) >= APART


@pytest.mark.parametrize("refused", [(0, 4, 0), (3, 1, 0)])
def test_a_network_that_does_not_keep_the_goal_is_none(refused):
    found = chosen(5, is_within=lambda levels: levels != refused)
    assert refused not in found and len(found) == 5


def test_no_triple_is_taken_twice_and_none_too_near():
    found = chosen(99)
    assert len(set(found)) == len(found) <= len(TRIPLES)
    near = [point((4, 0, 0), 0.7)]
    assert finalists(4, (4, 0, 0), near, [(4, 0, 0)], predictor(), coordinates, lambda levels: True) == [(4, 0, 0)]


def test_the_least_loss_wins_and_without_losses_the_best_figure():
    finals = [point((4, 0, 0), 0.9, 0.31), point((0, 4, 0), 0.8, 0.29)]
    assert winner(finals, higher_is_better=True).levels == (0, 4, 0)
    blind = [*finals[:1], point((0, 4, 0), 0.8)]
    assert winner(blind, higher_is_better=True).levels == (4, 0, 0)
    assert winner(blind, higher_is_better=False).levels == (0, 4, 0)
