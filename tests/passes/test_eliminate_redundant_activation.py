"""Activations whose effect has happened already."""

import itertools

import numpy as np
import pytest

from onnxcompress.passes.eliminate_redundant_activation import REDUNDANT_AFTER, EliminateRedundantActivation
from onnxcompress.testing import apply, model, ops, run

SPECIAL = np.array(
    [np.inf, -np.inf, np.nan, -0.0, 0.0, 3, -3, 0.5, -0.5, 1e30, -1e30, 1e-45, 88, -104, 2.5], np.float32
)
X = np.concatenate([SPECIAL, np.linspace(-120, 120, 2001, dtype=np.float32)])[None]
PAIRS = [(second, first) for second, firsts in REDUNDANT_AFTER.items() for first in firsts]


def same_bits(before, after):
    (a,), (b,) = run(before, {"x": X}), run(after, {"x": X})
    assert np.array_equal(np.isnan(a), np.isnan(b))
    assert a[~np.isnan(a)].tobytes() == b[~np.isnan(b)].tobytes()


@pytest.mark.parametrize(("second", "first"), PAIRS)
def test_drops(second, first):
    before = model(f"g (float[N,M] x) => (float[a,b] y) {{ a = {first}(x) b = {second}(a) y = Identity(b) }}")
    after, result = apply(EliminateRedundantActivation(), before)
    assert result.rewrites == 1 and ops(after) == [first, "Identity"]
    same_bits(before, after)


OPS = ["Relu", "Abs", "Ceil", "Floor", "Round", "Sign", "Neg", "Sigmoid", "Tanh", "LeakyRelu", "Elu"]


@pytest.mark.parametrize(("second", "first"), [p for p in itertools.product(OPS[:6], OPS) if p not in PAIRS])
def test_other_pairs_are_left_alone(second, first):
    before = model(f"g (float[N,M] x) => (float[N,M] y) {{ a = {first}(x) y = {second}(a) }}")
    after, result = apply(EliminateRedundantActivation(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)


def test_two_outputs_stay():
    before = model("g (float[N,M] x) => (float[N,M] y, float[N,M] z) { y = Abs(x) z = Relu(y) }")
    after, result = apply(EliminateRedundantActivation(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and after == before
