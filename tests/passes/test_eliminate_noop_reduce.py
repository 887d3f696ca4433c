"""Reductions over single elements."""

import numpy as np
import pytest

from onnxcompress.passes.eliminate_noop_reduce import EliminateNoopReduce
from onnxcompress.testing import apply, assert_equivalent, model, ops

C = "<int64[1] one = {1}, int64[1] last = {-1}, int64[0] none = {}>"


def chain(call, kind="float", x="[N,1,M]"):
    return f"g ({kind}{x} x) => ({kind}[a,b,c] y) {C} {{ a = Identity(x) b = {call} y = Identity(b) }}"


@pytest.mark.parametrize(
    ("kind", "call", "opset"),
    [
        ("float", "ReduceMax<axes = [1]>(a)", 13),
        ("float", "ReduceMin<axes = [-2], keepdims = 1>(a)", 11),
        ("float", "ReduceProd(a, one)", 18),
        ("int64", "ReduceSum(a, one)", 17),
        ("int32", "ReduceMean<axes = [1]>(a)", 17),
        ("float", "ReduceSum<noop_with_empty_axes = 1>(a)", 17),
        ("float", "ReduceMean<noop_with_empty_axes = 1>(a, none)", 18),
    ],
)
def test_drops(kind, call, opset):
    before = model(chain(call, kind), opset=opset)
    after, result = apply(EliminateNoopReduce(), before)
    assert result.rewrites == 1 and ops(after) == ["Identity", "Identity"]
    assert_equivalent(before, after, sizes={"N": 3, "M": 4})


def test_everything_has_size_1():
    before = model(chain("ReduceMax(a)", x="[1,1,1]"))
    after, result = apply(EliminateNoopReduce(), before)
    assert result.rewrites == 1
    assert_equivalent(before, after)


@pytest.mark.parametrize(
    ("call", "opset"),
    [
        ("ReduceMax<axes = [0]>(a)", 17),  # N may be more than 1
        ("ReduceMax(a)", 17),
        ("ReduceSum(a)", 17),
        ("ReduceL1(a, one)", 18),  # takes the absolute value
        ("ReduceSumSquare<noop_with_empty_axes = 1>(a)", 18),  # squares
        ("ReduceMax(a, p)", 18),
    ],
)
def test_near_miss_is_left_alone(call, opset):
    before = model(chain(call).replace("x)", "x, int64[1] p)", 1), opset=opset)
    after, result = apply(EliminateNoopReduce(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    x = np.random.default_rng(0).normal(size=(3, 1, 2)).astype(np.float32)
    assert_equivalent(before, after, feeds=[{"x": x, "p": np.array([0])}])


def test_axis_that_is_not_kept_stays():
    before = model(
        f"g (float[N,1,M] x) => (float[a,b] y) {C} {{ b = ReduceMax<axes = [1], keepdims = 0>(x) y = Neg(b) }}"
    )
    after, result = apply(EliminateNoopReduce(), before)
    assert result.rewrites == 0
    assert_equivalent(before, after)


@pytest.mark.parametrize("call", ["ReduceSum(a, one)", "ReduceMean<axes = [1]>(a)"])
def test_sum_that_starts_at_zero_stays(call):
    """Whether -0.0 comes out as 0.0 depends on the axes onnxruntime reduces together."""
    before = model(chain(call))
    after, result = apply(EliminateNoopReduce(), before)
    assert result.rewrites == 0 and "-0.0" in result.misses[0].reason
    assert ops(after) == ops(before)
