"""Figures of merit of predictions: against labels, or against another model's outputs.

top1, top5    share of rows whose label is the class with the largest score, or among the five largest
agreement     share of rows in which two models choose the same class
mse, mae      mean squared and mean absolute difference
cosine        mean cosine similarity of the samples
psnr          peak signal-to-noise ratio in dB, the peak being the range of what is expected
module:name   a function of (y_true, y_pred), both arrays with one sample per row; higher is better
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxcompress.errors import DataError, RecipeError

Function = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Metric:
    """A figure of merit.

    Attributes:
        name: As the user gave it.
        function: Of the expected values and the predictions.
        labels: "needed", "used" when there are any, or "ignored".
        higher_is_better: Which way is up.
    """

    name: str
    function: Function
    labels: str = "used"
    higher_is_better: bool = True

    def measure(self, expected: np.ndarray, predicted: np.ndarray) -> float:
        """The figure for all samples.

        Raises:
            DataError: The shapes do not fit together, or the user's function fails.
        """
        try:
            return float(self.function(expected, predicted))
        except DataError:
            raise
        except Exception as error:  # the user's function may raise anything
            raise DataError(f"metric {self.name}: {type(error).__name__}: {error}") from error

    def drop(self, before: float, after: float, expected: np.ndarray) -> float:
        """How much worse ``after`` is; for mse and mae as a share of mean y^2 and mean |y|."""
        worse = before - after if self.higher_is_better else after - before
        if self.name in ("mse", "mae") and expected.size:
            y = np.abs(expected.astype(np.float64))
            scale = float(np.mean(y**2 if self.name == "mse" else y))
            return worse / scale if scale else worse
        return 0.0 if before == after else worse  # inf - inf


def find_metric(name: str) -> Metric:
    """A metric by its name, or the user's ``module:function``.

    Raises:
        RecipeError: There is no such metric or function.
    """
    if name in METRICS:
        return METRICS[name]
    module, separator, function = name.partition(":")
    if not separator:
        raise RecipeError(f"metric {name!r} is unknown: choose {', '.join(METRICS)}, or module:function")
    path = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # importing the user's module may raise anything
        raise RecipeError(f"metric {name}: {type(error).__name__}: {error}") from error
    finally:
        sys.path[:] = path
    return Metric(name, found)


def _classes(expected: np.ndarray, predicted: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Class indices (n,) and scores (n, classes) out of what a model and its labels may look like."""
    scores = predicted.reshape(len(predicted), -1) if predicted.ndim != 1 else predicted[:, None]
    if scores.shape[1] == 1:  # a class index, or the probability of the second of two classes
        chosen = scores[:, 0] if predicted.dtype.kind in "iub" else scores[:, 0] > 0.5
        scores = np.stack([chosen.astype(np.int64) == k for k in range(max(2, int(chosen.max(initial=0)) + 1))], axis=1)
    labels = expected.reshape(len(expected), -1)
    if labels.shape[1] > 1:
        labels = labels.argmax(axis=1)[:, None]  # one-hot
    if len(labels) != len(scores):
        raise DataError(f"metric {what}: {len(labels)} labels for {len(scores)} rows of scores")
    return labels[:, 0], scores.astype(np.float64)


def _top(k: int, expected: np.ndarray, predicted: np.ndarray) -> float:
    labels, scores = _classes(expected, predicted, f"top{k}")
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return float(np.mean((best == labels[:, None]).any(axis=1)))


def _pair(expected: np.ndarray, predicted: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    if expected.size != predicted.size:
        raise DataError(f"metric {what}: shape {predicted.shape} is compared with {expected.shape}")
    return expected.astype(np.float64).reshape(predicted.shape), predicted.astype(np.float64)


def _agreement(expected: np.ndarray, predicted: np.ndarray) -> float:
    y, other = _pair(expected, predicted, "agreement")
    if y.ndim < 2 or y.shape[-1] == 1:
        whole = predicted.dtype.kind in "iub"
        return float(np.mean(y == other if whole else (y > 0.5) == (other > 0.5)))
    return float(np.mean(y.argmax(axis=-1) == other.argmax(axis=-1)))


def _mse(expected: np.ndarray, predicted: np.ndarray) -> float:
    y, other = _pair(expected, predicted, "mse")
    return float(np.mean((y - other) ** 2))


def _mae(expected: np.ndarray, predicted: np.ndarray) -> float:
    y, other = _pair(expected, predicted, "mae")
    return float(np.mean(np.abs(y - other)))


def _cosine(expected: np.ndarray, predicted: np.ndarray) -> float:
    y, other = (array.reshape(len(array), -1) for array in _pair(expected, predicted, "cosine"))
    norms = np.linalg.norm(y, axis=1) * np.linalg.norm(other, axis=1)
    same = (y == other).all(axis=1)  # also where both are 0
    return float(np.mean(np.where(same, 1.0, (y * other).sum(axis=1) / np.where(norms == 0, 1.0, norms))))


def _psnr(expected: np.ndarray, predicted: np.ndarray) -> float:
    y, other = _pair(expected, predicted, "psnr")
    mse, peak = float(np.mean((y - other) ** 2)), float(np.ptp(y))
    if mse == 0:
        return math.inf
    return 10 * math.log10(peak**2 / mse) if peak else -math.inf


METRICS = {
    "top1": Metric("top1", lambda y, p: _top(1, y, p), "needed"),
    "top5": Metric("top5", lambda y, p: _top(5, y, p), "needed"),
    "agreement": Metric("agreement", _agreement, "ignored"),
    "mse": Metric("mse", _mse, higher_is_better=False),
    "mae": Metric("mae", _mae, higher_is_better=False),
    "cosine": Metric("cosine", _cosine),
    "psnr": Metric("psnr", _psnr),
}
