"""Learning rate schedules at known points."""

from __future__ import annotations

import pytest

from onnxcompress.errors import RecipeError
from onnxcompress.train.schedules import make_schedule


@pytest.mark.parametrize(
    ("name", "warmup", "points"),
    [
        ("cosine", 0.0, {0: 1.0, 50: 0.5, 25: 0.8535534, 99: 0.000246720}),
        ("cosine", 0.1, {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.5}),
        ("linear", 0.0, {0: 1.0, 50: 0.5, 99: 0.01}),
        ("linear", 0.5, {0: 0.02, 49: 1.0, 50: 1.0, 75: 0.5}),
        ("constant", 0.1, {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 99: 1.0}),
        ("onecycle", 0.5, {0: 0.04, 15: 0.52, 30: 1.0, 65: 0.500002, 100: 4e-6}),
    ],
)
def test_factor(name, warmup, points):
    factor = make_schedule(name, 100, warmup)
    assert {step: factor(step) for step in points} == pytest.approx(points, rel=1e-5)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "onecycle"])
@pytest.mark.parametrize("total", [1, 2, 7])
def test_no_step_of_a_short_run_is_void(name, total):
    factor = make_schedule(name, total, 0.05)
    assert all(0 < factor(step) <= 1 for step in range(total))


def test_unknown_or_out_of_range():
    with pytest.raises(RecipeError, match=r"'step' is unknown: choose cosine"):
        make_schedule("step", 10)
    with pytest.raises(RecipeError, match="warm-up 1: expected a share"):
        make_schedule("cosine", 10, 1.0)
