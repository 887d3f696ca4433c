"""Matrix products with constant left operands in a row."""

import re

import numpy as np
import pytest

from onnxcompress.passes.fuse_left_matmul_chain import FuseLeftMatMulChain
from onnxcompress.testing import apply, assert_equivalent, model, ops


def normal(*shape, seed=0):
    return np.random.default_rng(seed + sum(shape)).normal(size=shape).astype(np.float32)


WEIGHTS = {"C": normal(32, 8), "D": normal(6, 32), "E": normal(1, 6, 32), "R": normal(5, 6)}


def build(text):
    return model(text, **{k: v for k, v in WEIGHTS.items() if re.search(rf"\b{k}\b", text)})


@pytest.mark.parametrize(("x", "y"), [("N,8,5", "N,6,5"), ("8,5", "6,5"), ("8", "6"), ("2,N,8,T", "2,N,6,T")])
def test_merges(x, y):
    before = build(f"g (float[{x}] x) => (float[{y}] y) {{ t = MatMul(C, x) y = MatMul(D, t) }}")
    after, result = apply(FuseLeftMatMulChain(), before)
    assert result.rewrites == 1 and ops(after) == ["MatMul"]
    assert_equivalent(before, after, rel=3e-6)  # measured 4.6e-7


@pytest.mark.parametrize(
    "text",
    [
        "g (float[N,8,5] x) => (float[N,6,5] y, float[N,32,5] t) { t = MatMul(C, x) y = MatMul(D, t) }",
        "g (float[N,8,5] x) => (float[N,6,5] y) { t = MatMul(C, x) y = MatMul(E, t) }",
        "g (float[N,8,5] x) => (float[N,32,6] y) { t = MatMul(C, x) y = MatMul(t, R) }",
        "g (float[N,8,5] x, float[6,32] d) => (float[N,6,5] y) { t = MatMul(C, x) y = MatMul(d, t) }",
        "g (float[N,8,5] x) => (float[N,6,5] y) { t = MatMul(C, x) r = Relu(t) y = MatMul(D, r) }",
    ],
)
def test_near_miss_is_left_alone(text):
    before = build(text)
    after, result = apply(FuseLeftMatMulChain(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert_equivalent(before, after)


def test_a_merge_that_does_not_pay_is_left_alone():
    before = model(
        "g (float[64,9] x) => (float[64,9] y) { t = MatMul(C, x) y = MatMul(D, t) }", C=normal(2, 64), D=normal(64, 2)
    )
    after, result = apply(FuseLeftMatMulChain(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and ops(after) == ops(before)
