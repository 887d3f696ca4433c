"""The predictor and what chooses by it, on figures that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onnxcompress.train.scale.predictor import AXES, Predictor, corrected, fit_axis
from onnxcompress.train.scale.solving import EFFICIENTNET, CostTable, cross_check, last_level, step_levels

SIZES = [1.0, 0.85, 0.7, 0.55, 0.4]


def table(levels=10, exponents=(1.0, 2.0, 2.0)):
    """Costs d^a w^b r^c on a grid from 1 to 0.4."""
    sizes = tuple(float(size) for size in np.linspace(1.0, 0.4, levels))
    d, w, r = np.meshgrid(*[np.array(sizes)] * 3, indexing="ij")
    return CostTable((sizes,) * 3, 1e6 * d ** exponents[0] * w ** exponents[1] * r ** exponents[2], 1e6)


def test_a_line_is_found_again():
    fit = fit_axis("width", SIZES, [0.7 + 0.2 * size for size in SIZES])
    assert fit.degree == 1 and fit.coefficients == pytest.approx([0.7, 0.2], abs=1e-9)
    assert fit(0.6) == pytest.approx(0.82) and fit.slope(0.6) == pytest.approx(0.2)
    assert fit.loo_error < 1e-9 and set(fit.candidates) == {"1", "2", "3"}


def test_a_curve_is_found_again_but_for_its_shrinkage():
    curve = np.polynomial.Polynomial([0.5, 0.7, -0.3])
    fit = fit_axis("width", SIZES, curve(np.array(SIZES)))
    grid = np.linspace(0.4, 1, 25)
    assert fit.degree > 1 and np.abs(fit(grid) - curve(grid)).max() < 0.004  # measured 0.0035
    assert fit(1.0) == pytest.approx(0.9)  # the unpruned point is known
    assert fit.slope(0.6) == pytest.approx(curve.deriv()(0.6), abs=0.02)


def test_chance_in_the_figures_is_evened_out():
    rng = np.random.default_rng(0)
    grid = np.linspace(0.4, 1, 25)
    errors = []
    for _ in range(40):
        fit = fit_axis("depth", SIZES, 0.7 + 0.2 * np.array(SIZES) + rng.normal(scale=0.01, size=5))
        errors.append(float(np.sqrt(np.mean((fit(grid) - 0.7 - 0.2 * grid) ** 2))))
    assert np.mean(errors) < 0.007  # measured 0.0060, with a standard deviation of 0.01 in each point


def test_few_points_are_enough_for_a_line():
    fit = fit_axis("depth", [1.0, 0.5], [0.9, 0.8])
    assert fit.degree == 1 and fit(0.75) == pytest.approx(0.85)
    alone = fit_axis("depth", [1.0], [0.9])
    assert alone.degree == 0 and alone(0.3) == pytest.approx(0.9)


def known(loss=(0.1, 0.2, 0.4)):
    """A predictor whose axes lose at these rates."""
    fits = {
        axis: fit_axis(axis, SIZES, [0.9 * (1 - k * (1 - s)) for s in SIZES])
        for axis, k in zip(AXES, loss, strict=True)
    }
    return Predictor(0.9, fits)


def test_the_product_is_that_of_the_shares():
    found = known().product(np.array([[0.5, 0.6, 0.7], [1, 1, 1]]))
    assert found == pytest.approx([0.9 * 0.95 * 0.92 * 0.88, 0.9])


def test_a_figure_that_is_nothing_at_first_adds_up():
    fits = {axis: fit_axis(axis, [1.0, 0.5], [0.0, 0.2]) for axis in AXES[:2]}
    predictor = Predictor(0.0, fits, higher_is_better=False)
    assert predictor.form == "sum"
    assert predictor.product(np.array([[0.5, 0.5, 1.0]])) == pytest.approx([0.4])
    places = np.zeros((2, 3))
    assert predictor.best(np.array([[0.5, 0.5, 1.0], [0.5, 1.0, 1.0]]), places) == 1


def test_a_correction_holds_near_the_points_and_fades():
    predictor = known()
    sizes, places = np.array([[0.7, 0.8, 0.9]]), np.array([[0.4, 0.4, 0.2]])
    better = corrected(predictor, sizes, places, predictor.product(sizes) + 0.05, noise=0.005)
    there, deviation = better.predict(sizes, places)
    assert there == pytest.approx(predictor.product(sizes) + 0.05, abs=0.001)
    assert deviation[0] < 0.006
    far, unsure = better.predict(sizes, np.array([[3.0, -2.0, 0.0]]))
    assert far == pytest.approx(predictor.product(sizes), abs=1e-6) and unsure[0] > 0.03


def test_noise_corrects_little():
    predictor = known()
    sizes, places = np.array([[0.7, 0.8, 0.9]]), np.array([[0.4, 0.4, 0.2]])
    found = corrected(predictor, sizes, places, predictor.product(sizes) + 0.004, noise=0.02)
    shift = found.predict(sizes, places)[0] - predictor.product(sizes)
    assert 0 < shift[0] < 0.002


# -- costs -------------------------------------------------------------------------------------------------------------


def test_rounds_go_down_to_the_goal_in_equal_steps_of_cost():
    alone = np.array([100, 95, 88, 80, 71, 66, 52, 49, 30])
    assert last_level(alone, 50) == 7
    assert step_levels(alone, 7, 4) == [2, 4, 5, 7]
    assert last_level(alone, 20) == 8  # out of reach: to its end
    assert step_levels(alone, 8, 2) == [5, 8]
    assert step_levels(np.array([100]), 0, 4) == []
    assert step_levels(np.array([100, 40]), last_level(np.array([100, 40]), 50), 4) == [1]


def test_triples_within_the_goal():
    costs = table()
    found = costs.within(5e5, least=4e5)
    assert found and all(4e5 <= costs.cost(levels) <= 5e5 for levels in found)
    assert all(levels[1] == 0 for levels in costs.within(5e5, last=[9, 0, 9]))
    assert sum(costs.place((9, 0, 0), costs.cost((9, 0, 0)))) == pytest.approx(1)


def test_the_largest_triples_leave_nothing_to_give_back():
    costs = table()
    within = costs.within(5e5)
    largest = costs.largest(within)
    assert 0 < len(largest) < len(within)
    for levels in largest:
        for axis in range(3):
            less = tuple(level - (axis == number) for number, level in enumerate(levels))
            assert min(less) < 0 or costs.cost(less) > 5e5


def test_the_nearest_triple_saves_in_the_wanted_proportions():
    costs = table(40)
    near = costs.within(3e5, least=2.9e5)
    place = np.array(costs.place(costs.nearest(near, EFFICIENTNET, 3e5), 3e5))
    assert place / place.sum() == pytest.approx(np.array(EFFICIENTNET) / sum(EFFICIENTNET), abs=0.03)  # measured 0.015


def test_the_conditions_hold_at_an_optimum_inside():
    # F = prod x^k: x F_x / F = k, and with the cost d^k w^2k r^2k the whole surface is optimal.
    costs = table(25)
    fits = {axis: fit_axis(axis, SIZES, [s**k for s in SIZES]) for axis, k in zip(AXES, (0.1, 0.2, 0.2), strict=True)}
    predictor = Predictor(1.0, fits)
    last = dict.fromkeys(AXES, 24)
    near = costs.within(3e5, least=2.9e5)
    middle = costs.nearest(near, (1, 1, 1), 3e5)
    check = cross_check(costs, predictor, middle, 3e5, last)
    assert check.interior and check.spread < 0.02  # measured 0.004: polynomials stand for powers
    assert [one.exponent for one in check.axes] == pytest.approx([1, 2, 2], rel=0.01)
    assert check.exponents == pytest.approx((1, 2, 2), rel=1e-6) and abs(check.model_error) < 1e-9
    assert check.continuous_figure == pytest.approx(check.chosen_figure, abs=0.01)


@pytest.mark.parametrize("chosen", [(2, 0, 0), (1, 1, 0), (2, 1, 0)])
def test_an_axis_may_go_whole(chosen):
    costs = CostTable(
        ((1.0, 0.5, 0.0), (1.0, 0.5), (1.0,)), np.array([[[100.0], [60]], [[60.0], [35]], [[20.0], [10]]]), 100.0
    )
    fits = {
        "depth": fit_axis("depth", [1.0, 0.5, 0.0], [0.9, 0.8, 0.6]),
        "width": fit_axis("width", [1, 0.5], [0.9, 0.7]),
    }
    for limit in (20.0, 40.0, 60.0):
        check = cross_check(costs, Predictor(0.9, fits), chosen, limit, {"depth": 2, "width": 1})
        assert [one.axis for one in check.axes] == ["depth", "width"]
        assert all(math.isfinite(value) for one in check.axes for value in (one.gain, one.paper_gain, one.exponent))
        assert all(math.isfinite(value) for value in check.exponents)


def test_a_bound_is_said():
    costs, predictor = table(), known((0.05, 0.9, 0.9))
    near = costs.within(4e5)
    best = near[predictor.best(np.array([costs.size(n) for n in near]), np.array([costs.place(n, 4e5) for n in near]))]
    check = cross_check(costs, predictor, best, 4e5, dict.fromkeys(AXES, 9))
    assert best == (9, 0, 0) and not check.interior
    assert [one.bound for one in check.axes] == ["most pruned", "unpruned", "unpruned"]
    assert math.isnan(check.spread)
    assert check.axes[0].gain < check.axes[1].gain  # a per cent of cost is worth least where most was taken
