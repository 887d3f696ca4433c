"""Figures for two values, alone and over feeds."""

import json

import ml_dtypes
import numpy as np
import pytest

from onnxcompress.validation.comparison import Comparison, Difference, difference, perturbed, weakness, worse

Y = np.array([[1.0, -2.0, 4.0], [0.5, 3.0, 0.0]], np.float32)


def test_equal_floats():
    found = difference("y", Y, Y.copy())
    assert (found.max_abs, found.relative, found.mismatches, found.problem) == (0, 0, 0, None)
    assert found.cosine == pytest.approx(1)
    assert found.agreement == 1


def test_float_figures():
    other = Y.copy()
    other[1] = (3.5, 3.0, 0.0)
    found = difference("y", Y, other)
    assert found.max_abs == 3
    assert found.relative == 3 / 4
    assert found.agreement == 1 / 2
    assert found.cosine == pytest.approx(np.vdot(Y, other) / np.linalg.norm(Y) / np.linalg.norm(other))


def test_where_everything_is_0_the_difference_is_absolute():
    assert difference("y", np.zeros(3, np.float32), np.full(3, 1e-3, np.float32)).relative == pytest.approx(1e-3)


def test_large_values_do_not_overflow():
    top = np.array([3e38, -3e38], np.float32)
    assert difference("y", top, -top).relative == 2


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.complex64, np.float64])
def test_every_float_type(dtype):
    found = difference("y", Y.astype(dtype), (Y * 1.5).astype(dtype))
    assert found.relative == pytest.approx(0.5)
    assert (found.ulp > 0) == (np.dtype(dtype).itemsize < 4)


@pytest.mark.parametrize(
    ("reference", "candidate", "share"),
    [
        (np.array([1, 2, 3, 4]), np.array([1, 2, 0, 4]), 0.25),
        (np.array([True, False]), np.array([True, True]), 0.5),
        (np.array(["a", "b"], object), np.array(["a", "bc"], object), 0.5),
        (np.array([1, 2], ml_dtypes.int4), np.array([1, 3], ml_dtypes.int4), 0.5),
        (np.zeros((0, 3), np.int64), np.zeros((0, 3), np.int64), 0.0),
    ],
)
def test_integers_booleans_and_strings_are_exact(reference, candidate, share):
    found = difference("y", reference, candidate)
    assert (found.mismatches, found.relative, found.problem) == (share, 0, None)


NAN, INF = np.nan, np.inf


@pytest.mark.parametrize("values", [[NAN, 1.0], [INF, 1.0], [-INF, 1.0], [NAN, INF]])
def test_equal_nan_and_infinity(values):
    assert difference("y", np.array(values), np.array(values)).problem is None


@pytest.mark.parametrize(("one", "two"), [(NAN, 1.0), (1.0, NAN), (INF, -INF), (INF, NAN), (INF, 1.0)])
def test_nan_or_infinity_in_one_only(one, two):
    found = difference("y", np.array([[1.0, one]]), np.array([[1.0, two]]))
    assert found.problem == f"1 of 2 elements: {two} at [0, 1], expected {one}"
    assert found.problem_kind == "values"
    assert not found.equivalent


@pytest.mark.parametrize(
    ("reference", "candidate", "problem", "kind"),
    [
        (Y, Y.astype(np.float64), "type float64, expected float32", "type"),
        (Y, Y.reshape(3, 2), "shape 3x2, expected 2x3", "shape"),
        (Y, Y[:, :1], "shape 2x1, expected 2x3", "shape"),
        (np.array("a", object), np.array(1), "type int64, expected string", "type"),
        ([Y], [Y, Y], "a sequence of 2, expected 1", "shape"),
        ({"a": 1.0}, {"b": 1.0}, "keys 'b', expected 'a'", "shape"),
        (Y, [Y], "a sequence, expected a tensor", "type"),
        (None, Y, "a tensor, expected an empty optional", "type"),
    ],
)
def test_problems_that_no_tolerance_covers(reference, candidate, problem, kind):
    found = difference("y", reference, candidate)
    assert (found.problem, found.problem_kind) == (problem, kind)


def test_sequences_and_maps_are_compared_item_by_item():
    found = difference("y", [{"a": 1.0, "b": 2.0}, {"a": 4.0}], [{"a": 1.0, "b": 2.0}, {"a": 3.0}])
    assert found.max_abs == 1
    assert found.relative == 0.25
    assert difference("y", {"a": "x"}, {"a": "longer"}).mismatches == 1
    assert difference("y", None, None).problem is None


def test_worse_takes_the_worst_of_every_figure():
    found = worse([difference("y", Y, Y), difference("y", Y, 2 * Y), difference("y", Y, Y.T)], "y")
    assert found.relative == 1
    assert found.problem == "shape 3x2, expected 2x3"


def test_message_of_the_worst_output():
    good = Difference("a", relative=1e-7, allowed=1e-5)
    bad = Difference("b", relative=3.14e-3, allowed=1e-5)
    assert Comparison([good, bad], 1e-5, 2).message() == "output 'b': max|d| / max|y| = 3.1e-03, allowed 1e-05"
    labels = Difference("c", mismatches=0.25)
    shape = Difference("d", problem="shape 2, expected 3", problem_kind="shape")
    assert Comparison([bad, labels, shape], 1e-5, 2).message() == (
        "output 'd': shape 2, expected 3; 2 more of 3 outputs differ"
    )
    assert Comparison([labels]).message() == "output 'c': 25.00% of the elements differ, allowed 0.00%"
    assert Comparison([good], 1e-5, 2).message() == (
        "equivalent over 2 inputs: output 'a': max|d| / max|y| = 1.0e-07, allowed 1e-05"
    )


def test_as_dict_is_json():
    comparison = Comparison([difference("y", Y, 2 * Y)], 1e-5, 1)
    found = json.loads(json.dumps(comparison.as_dict(), allow_nan=False))
    assert found["equivalent"] is False
    assert found["summary"] == comparison.message()
    assert found["outputs"][0]["relative"] == 1


def test_perturbed_moves_every_float_a_little():
    feed = {
        "x": np.array([1.0, -2.0, 0.0], np.float32),
        "h": np.array([1.0, -2.0], np.float16),
        "b": np.array([1.0, -2.0], ml_dtypes.bfloat16),
        "i": np.array([1, 2]),
        "s": [np.array([3.0])],
    }
    moved = perturbed(feed, np.random.default_rng(0))
    np.testing.assert_allclose(moved["x"], feed["x"], rtol=1.1e-6)
    assert (moved["x"][:2] != feed["x"][:2]).all()
    assert all(
        (moved[name] != feed[name]).all() for name in "hb"
    )  # by one step of the type: 1e-6 would be rounded away
    assert (moved["i"] == feed["i"]).all()
    assert 0 < abs(moved["s"][0][0] - 3) < 1e-5


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        ([np.array([np.nan, 1.0])], "no output is finite"),
        ([np.array([np.nan, 1.0]), np.array([1.0, 2.0])], None),
        ([np.array([3, 3])], "every output is constant"),
        ([np.array([3])], None),
        ([np.zeros((0, 3))], "every output is empty"),
        ([np.array(["a", "a"], object)], None),
        ([[np.array([1.0, 2.0])], {"a": 1.0}], None),
    ],
)
def test_weakness(outputs, reason):
    assert weakness(outputs) == reason
