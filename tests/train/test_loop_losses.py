"""Losses against NumPy."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from onnxcompress.errors import RecipeError
from onnxcompress.train.batches import Batch
from onnxcompress.train.losses import (
    LossSettings,
    WeightedSum,
    classes_first,
    label_loss,
    output_distance,
    relative_mse,
)

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(5, 4)) * 2
OTHER = RNG.normal(size=(5, 4)) * 2
LABELS = np.array([0, 3, 1, 1, 2])


def log_softmax(values: np.ndarray) -> np.ndarray:
    return values - np.log(np.exp(values).sum(1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing):
    targets = np.eye(4)[LABELS] * (1 - smoothing) + smoothing / 4
    expected = -(targets * log_softmax(LOGITS)).sum(1).mean()
    logits = torch.tensor(LOGITS)
    assert float(label_loss(logits, torch.tensor(LABELS), "classes", smoothing)) == pytest.approx(expected, rel=1e-6)
    assert float(label_loss(logits, torch.tensor(targets), "distribution")) == pytest.approx(expected, rel=1e-6)


def test_values():
    found = label_loss(torch.tensor(LOGITS), torch.tensor(OTHER).reshape(5, 2, 2), "values")
    assert float(found) == pytest.approx(((LOGITS - OTHER) ** 2).mean(), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_divergence_from_a_teacher(temperature):
    p, q = (log_softmax(values / temperature) for values in (LOGITS, OTHER))
    expected = (np.exp(q) * (q - p)).sum(1).mean() * temperature**2
    found = output_distance(torch.tensor(LOGITS), torch.tensor(OTHER), 1, temperature)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    same = output_distance(torch.tensor(OTHER), torch.tensor(OTHER), 1, temperature)
    assert float(same) == pytest.approx(0.0, abs=1e-7)


def test_distance_of_values_has_no_unit():
    student, teacher = torch.tensor(LOGITS), torch.tensor(OTHER)
    expected = ((LOGITS - OTHER) ** 2).mean() / (OTHER**2).mean()
    assert float(relative_mse(student, teacher)) == pytest.approx(expected)
    assert float(relative_mse(student * 1000, teacher * 1000)) == pytest.approx(expected)
    assert float(relative_mse(torch.zeros(2, 2), torch.zeros(2, 2))) == 0.0


@pytest.mark.parametrize(
    ("logits", "labels", "expected"),
    [
        ((5, 4), (5,), ((5, 4), (5,))),
        ((5, 4), (5, 1), ((5, 4), (5,))),
        ((5, 4, 1, 1), (5,), ((5, 4), (5,))),
        ((5, 4, 6, 7), (5, 6, 7), ((5, 4, 6, 7), (5, 6, 7))),
        ((5, 6, 4), (5, 6), ((5, 4, 6), (5, 6))),
    ],
)
def test_where_the_classes_are(logits, labels, expected):
    found = classes_first(torch.zeros(logits), torch.zeros(labels))
    assert tuple(tuple(part.shape) for part in found) == expected


def test_terms_are_weighted():
    values = {"logits": torch.tensor(LOGITS), "inner": torch.tensor(LOGITS) * 3}
    teacher = {"logits": torch.tensor(OTHER), "deep": torch.tensor(OTHER)}
    settings = LossSettings(smoothing=0.1, temperature=2.0, distill_weight=0.25, feature_weight=0.5)
    objective = WeightedSum(
        settings,
        label_output="logits",
        distilled={"logits": 1},
        features=(("inner", "deep"),),
        teacher=SimpleNamespace(of=lambda batch, names: {name: teacher[name] for name in names}),
    )
    found = objective(lambda feeds, names: {name: values[name] for name in names}, Batch({}, torch.tensor(LABELS)))
    labels = label_loss(values["logits"], torch.tensor(LABELS), "classes", 0.1)
    distance = output_distance(values["logits"], teacher["logits"], 1, 2.0)
    features = relative_mse(values["inner"].float(), teacher["deep"].float())
    assert float(found) == pytest.approx(float(0.75 * labels + 0.25 * distance + 0.5 * features), rel=1e-6)


@pytest.mark.parametrize(
    "bad", [{"smoothing": 1.0}, {"temperature": 0.0}, {"distill_weight": 1.5}, {"feature_weight": -1.0}]
)
def test_bad_settings(bad):
    with pytest.raises(RecipeError, match="expected"):
        LossSettings(**bad)
