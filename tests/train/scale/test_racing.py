"""Which networks are trained for the last choice, and which of them is taken."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from onnxcompress.channels.options import Goal
from onnxcompress.train.scale.deciding import Decider
from onnxcompress.train.scale.options import Point, ScaleOptions
from onnxcompress.train.scale.predictor import Predictor, fit_axis
from onnxcompress.train.scale.racing import APART, candidates, in_order, neighbours

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


def point(axis, levels, figure, loss=math.nan):
    return Point(axis, levels, (1.0, 1.0, 1.0), 1.0, 0.5, figure=figure, loss=loss)


MEASURED = [
    point("depth", (4, 0, 0), 0.7),
    point("width", (0, 2, 0), 0.85),  # not within the goal
    point("width", (0, 4, 0), 0.8),
    point("resolution", (0, 0, 4), 0.3),
    point("mixed", (2, 1, 1), 0.6),
]


def chosen(count, measured=MEASURED, is_within=lambda levels: True, **wishes):
    return candidates(count, (4, 0, 0), measured, TRIPLES, predictor(**wishes), coordinates, is_within)


def test_the_best_axis_alone_is_one_of_them_and_points_off_the_axes_are_free():
    assert chosen(3) == [(4, 0, 0), (2, 1, 1), (0, 4, 0)]
    assert chosen(1) == [(4, 0, 0), (2, 1, 1)]
    costs = [point(p.axis, p.levels, 1 - p.figure) for p in MEASURED]
    assert chosen(3, costs, higher_is_better=False) == [(4, 0, 0), (2, 1, 1), (0, 4, 0)]


def test_the_others_are_promising_and_unlike_those_that_are_there():
    found = chosen(6)
    assert found[:4] == [(4, 0, 0), (2, 1, 1), (0, 4, 0), (3, 1, 0)]
    _, places = coordinates(found)
    assert min(np.linalg.norm(a - b) for n, a in enumerate(places) for b in places[:n]) >= APART


@pytest.mark.parametrize("refused", [(0, 4, 0), (2, 1, 1), (3, 1, 0)])
def test_a_network_that_does_not_keep_the_goal_is_none(refused):
    found = chosen(5, is_within=lambda levels: levels != refused)
    assert refused not in found and len(found) == 5
    assert (0, 4, 0) in found or (0, 0, 4) in found  # an axis alone


def test_no_triple_is_taken_twice_and_none_too_near():
    found = chosen(99)
    assert sorted(found) == sorted(TRIPLES)

    def halves(triples):
        return coordinates(np.array(triples) / 2)

    fine = [(d, w, 8 - d - w) for d in range(9) for w in range(9 - d)]
    found = candidates(
        99, (8, 0, 0), [], fine, predictor(), lambda t: coordinates(np.array(t) / 2), lambda levels: True
    )
    places = np.array(found) / 8
    assert min(np.linalg.norm(a - b) for n, a in enumerate(places) for b in places[:n]) >= APART
    assert len(set(found)) == len(found) < len(fine)
    only = [point("depth", (4, 0, 0), 0.7)]
    assert candidates(4, (4, 0, 0), only, [(4, 0, 0)], predictor(), coordinates, lambda levels: True) == [(4, 0, 0)]


def test_the_least_loss_comes_first_and_without_losses_the_best_figure():
    points = [point("mixed", (4, 0, 0), 0.9, 0.31), point("mixed", (0, 4, 0), 0.8, 0.29)]
    assert in_order(points, higher_is_better=True) == points[::-1]
    blind = [point("mixed", p.levels, p.figure) for p in points]
    assert in_order(blind, higher_is_better=True) == blind
    assert in_order(blind, higher_is_better=False) == blind[::-1]


def test_neighbours_differ_by_one_level_and_the_others_make_up_for_it():
    found = neighbours((2, 1, 1), TRIPLES, coordinates)
    assert len(found) == len(set(found)) >= 4
    assert {abs(d - 2) + abs(w - 1) + abs(r - 1) for d, w, r in found} == {2}
    assert {levels[0] for levels in neighbours((4, 0, 0), TRIPLES, coordinates)} == {3}


def test_an_axis_of_many_levels_has_no_neighbours():
    fine = [(d, 100 - 25 * d, 0) for d in range(5)] + [(0, 99, 1)]

    def places(triples):
        levels = np.array(triples, np.float64)
        return levels, levels / np.array([4, 100, 50])

    assert neighbours((0, 100, 0), fine, places) == [(1, 75, 0)]  # a step of pixels is 0.02 here


def test_the_triples_are_listed_anew_when_what_was_timed_has_moved_them():
    """A candidate that is timed faster than expected brings triples within the goal, and the race goes on to one."""
    new, listed, trained = (1, 0, LAST - 1), [], []

    def triples(measured):
        listed.append(1)
        return [one for one in TRIPLES if one != new or len(listed) > 1]

    def collect(wanted):
        trained.extend(found.levels for found, *_ in wanted)
        return [point("candidate", found.levels, 0.8, loss=float(found.levels[2] < 3)) for found, *_ in wanted]

    table = SimpleNamespace(
        largest=list,
        size=lambda levels: (1.0, 1.0, 1.0),
        macs=lambda levels: 1.0,
        cost=lambda levels: 1.0,
        original=2.0,
    )
    space = SimpleNamespace(
        given=SimpleNamespace(options=ScaleOptions("data", "val", Goal("macs", 0.5, True), candidates=2, rounds=1)),
        table=table,
        triples=triples,
        coordinates=coordinates,
        is_within=lambda levels: True,
    )
    decider = Decider(space, Path(), lambda now: None)
    decider._race(SimpleNamespace(collect=collect), predictor(), (0, 0, LAST), {}, [])
    assert trained[0] == (0, 0, LAST) and new in trained
