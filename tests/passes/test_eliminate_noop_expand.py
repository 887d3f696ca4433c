"""Expand and Tile that repeat nothing."""

import pytest

from onnxcompress.passes.eliminate_noop_expand import EliminateNoopExpand
from onnxcompress.testing import apply, assert_equivalent, model, ops

C = """<int64[3] ones = {1, 1, 1}, int64[1] one = {1}, int64[2] tail = {3, 8}, int64[3] same = {2, 3, 8},
    int64[4] more = {1, 1, 3, 8}, int64[3] twice = {2, 1, 1}, int64[1] zero = {0}>"""


def chain(x, call, before="", out="float[a,b,c] y"):
    return f"g ({x}, int64[3] p) => ({out}) {C} {{ a = Relu(x) {before} b = {call} y = Neg(b) }}"


@pytest.mark.parametrize(
    ("x", "call"),
    [
        ("float[N,3,8] x", "Expand(a, ones)"),
        ("float[N,3,8] x", "Expand(a, one)"),
        ("float[N,3,8] x", "Expand(a, tail)"),
        ("float[2,3,8] x", "Expand(a, same)"),
        ("float[N,M,8] x", "Tile(a, ones)"),
    ],
)
def test_drops(x, call):
    before = model(chain(x, call))
    after, result = apply(EliminateNoopExpand(), before)
    assert result.rewrites == 1 and ops(after) == ["Relu", "Neg"]
    for n in (1, 4):
        assert_equivalent(before, after, sizes={"N": n, "M": 3})


@pytest.mark.parametrize("target", ["s", "t"])
def test_computed_shape(target):
    compute = "s = Shape(x) n = Slice(s, zero, one) t = Concat<axis = 0>(n, one, one)"
    before = model(chain("float[N,M,8] x", f"Expand(a, {target})", compute))
    after, result = apply(EliminateNoopExpand(), before)
    assert result.rewrites == 1 and "Expand" not in ops(after)
    for n in (0, 1, 3):
        assert_equivalent(before, after, sizes={"N": n, "M": 3})


@pytest.mark.parametrize(
    ("x", "call"),
    [
        ("float[N,3,8] x", "Expand(a, same)"),  # N may be 1
        ("float[1,3,8] x", "Expand(a, same)"),
        ("float[2,3,8] x", "Tile(a, twice)"),
        ("float[N,3,8] x", "Expand(a, s)"),  # Shape of another tensor, whose sizes may be larger
    ],
)
def test_near_miss_is_left_alone(x, call):
    before = model(chain(f"{x}, float[K,3,8] z", call, "s = Shape(z)"))
    after, result = apply(EliminateNoopExpand(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert_equivalent(before, after, sizes={"N": 1, "K": 2})


def test_an_axis_that_is_added_counts():
    before = model(chain("float[N,3,8] x", "Expand(a, more)", out="float[a,b,c,d] y"))
    after, result = apply(EliminateNoopExpand(), before)
    assert result.rewrites == 0
    assert_equivalent(before, after)
