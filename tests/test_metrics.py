"""Figures of merit against NumPy, by hand, and the user's own."""

import math

import numpy as np
import pytest

from onnxcompress.errors import DataError, RecipeError
from onnxcompress.validation.metrics import METRICS, find_metric

SCORES = np.array(
    [[0.1, 0.9, 0, 0, 0, 0], [0.5, 0.4, 0.3, 0.2, 0.1, 0], [0, 1, 2, 3, 4, 5], [6, 5, 4, 3, 2, 1]], np.float32
)
LABELS = np.array([1, 1, 0, 4])


def measured(name, expected, predicted):
    return find_metric(name).measure(np.asarray(expected), np.asarray(predicted))


def test_top1_and_top5():
    assert measured("top1", LABELS, SCORES) == 0.25
    assert measured("top5", LABELS, SCORES) == 0.75
    assert measured("top1", np.eye(6)[LABELS], SCORES) == 0.25
    assert measured("top1", LABELS, SCORES.reshape(4, 6, 1, 1)) == 0.25


def test_top1_of_class_indices_and_of_a_probability():
    assert measured("top1", [3, 1, 2], np.array([3, 1, 0])) == pytest.approx(2 / 3)
    assert measured("top1", [1, 0, 1], np.array([[0.9], [0.2], [0.4]], np.float32)) == pytest.approx(2 / 3)


def test_agreement():
    assert measured("agreement", SCORES, SCORES[[0, 1, 3, 3]]) == 0.75
    assert measured("agreement", np.array([1, 2]), np.array([1, 3])) == 0.5


def test_errors():
    y, other = np.array([[1.0, 2], [3, 4]]), np.array([[1.0, 2], [3, 2]])
    assert measured("mse", y, other) == 1
    assert measured("mae", y, other) == 0.5
    assert measured("psnr", y, other) == pytest.approx(10 * math.log10(9))
    assert measured("psnr", y, y) == math.inf
    cosine = np.mean([1, (9 + 8) / (5 * math.sqrt(13))])
    assert measured("cosine", y, other) == pytest.approx(cosine)
    assert measured("cosine", np.zeros((1, 2)), np.zeros((1, 2))) == 1


def test_a_drop_is_positive_when_it_is_worse():
    y = np.array([2.0, 4.0])
    assert METRICS["top1"].drop(0.9, 0.8, LABELS) == pytest.approx(0.1)
    assert METRICS["mse"].drop(1.0, 2.0, y) == pytest.approx(1 / 10)
    assert METRICS["mae"].drop(1.0, 2.5, y) == pytest.approx(1.5 / 3)
    assert METRICS["psnr"].drop(math.inf, math.inf, y) == 0
    assert METRICS["psnr"].drop(30, 28, y) == 2


def test_labels_that_do_not_fit():
    with pytest.raises(DataError, match="3 labels for 4 rows"):
        measured("top1", LABELS[:3], SCORES)
    with pytest.raises(DataError, match=r"mse: shape \(4, 6\) is compared with \(4,\)"):
        measured("mse", LABELS, SCORES)


def test_own_function(tmp_path, monkeypatch):
    (tmp_path / "own_metric.py").write_text(
        "def share(y_true, y_pred):\n    return (y_true == y_pred.argmax(1)).mean()\n"
        "def broken(y_true, y_pred):\n    return 1 / 0\n"
    )
    monkeypatch.chdir(tmp_path)
    assert measured("own_metric:share", LABELS, SCORES) == 0.25
    with pytest.raises(DataError, match="own_metric:broken: ZeroDivisionError"):
        measured("own_metric:broken", LABELS, SCORES)
    with pytest.raises(RecipeError, match="own_metric:absent: AttributeError"):
        find_metric("own_metric:absent")


def test_an_unknown_metric():
    with pytest.raises(RecipeError, match="metric 'f1' is unknown: choose top1, top5"):
        find_metric("f1")
