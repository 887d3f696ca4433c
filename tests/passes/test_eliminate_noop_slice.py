"""Slices that take everything, by attribute, by input, by computed bounds."""

import pytest

from onnxcompress.passes.eliminate_noop_slice import EliminateNoopSlice
from onnxcompress.testing import apply, assert_equivalent, model, ops

C = """<int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3},
    int64[1] max32 = {2147483647}, int64[1] max64 = {9223372036854775807},
    int64[1] minus1 = {-1}, int64[1] minus3 = {-3}, int64[1] minus9 = {-9},
    int32[1] zero32 = {0}, int32[1] most32 = {2147483647}, int64[2] zeros = {0, 0}, int64[2] ends = {99, 2147483647},
    int64[2] axes = {1, -1}, int64[2] short = {2, 2147483647}, int64[1] many = {99},
    int64[1] billion = {1000000000}>"""


def chain(call, before=""):
    return f"g (float[N,3,M] x) => (float[a,b,c] y) {C} {{ a = Relu(x) {before} b = {call} y = Neg(b) }}"


@pytest.mark.parametrize(
    ("call", "opset"),
    [
        ("Slice(a, zero, max64, one)", 17),
        ("Slice(a, zero, max32, two, one)", 17),
        ("Slice(a, zero, billion, two)", 17),
        ("Slice(a, zero, three, one)", 10),
        ("Slice(a, minus3, many, one)", 13),
        ("Slice(a, minus9, max32, one)", 13),
        ("Slice(a, zeros, ends, axes)", 13),
        ("Slice(a, zero32, most32)", 13),
        ("Slice<starts = [0, 0], ends = [2147483647, 3]>(a)", 9),
        ("Slice<axes = [-2], starts = [-3], ends = [3]>(a)", 9),
    ],
)
def test_drops(call, opset):
    before = model(chain(call), opset=opset)
    after, result = apply(EliminateNoopSlice(), before)
    assert result.rewrites == 1 and ops(after) == ["Relu", "Neg"]
    for n in (1, 4):
        assert_equivalent(before, after, sizes={"N": n, "M": 5})


@pytest.mark.parametrize("end", ["m", "twice", "more"])
def test_computed_end(end):
    compute = "s = Shape(x) m = Slice(s, two, three) twice = Add(m, m) more = Add(m, one)"
    before = model(chain(f"Slice(a, zero, {end}, two)", compute))
    after, result = apply(EliminateNoopSlice(), before)
    assert result.rewrites == 1 and ops(after).count("Slice") == 1
    for m in (0, 1, 5):
        assert_equivalent(before, after, sizes={"N": 2, "M": m})


@pytest.mark.parametrize(
    "call",
    [
        "Slice(a, one, max64, one)",
        "Slice(a, zero, minus1, one)",
        "Slice(a, zero, two, one)",
        "Slice(a, zero, many, zero)",  # 99 of N
        "Slice(a, minus9, max64, zero)",  # the last 9 of N
        "Slice(a, zero, max64, one, two)",  # every second
        "Slice(a, minus1, minus9, one, minus1)",  # backwards
        "Slice(a, zeros, short, axes)",  # the second axis is whole, the first is not
    ],
)
def test_near_miss_is_left_alone(call):
    before = model(chain(call))
    after, result = apply(EliminateNoopSlice(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert_equivalent(before, after, sizes={"N": 100, "M": 3})


def test_end_computed_from_another_axis_is_left_alone():
    before = model(chain("Slice(a, zero, n, two)", "s = Shape(x) n = Slice(s, zero, one)"))
    after, result = apply(EliminateNoopSlice(), before)
    assert result.rewrites == 0
    assert_equivalent(before, after, sizes={"N": 2, "M": 5})


def test_model_output_that_would_be_an_input_stays():
    before = model(f"g (float[N,3,M] x) => (float[N,3,M] y) {C} {{ y = Slice(x, zero, max64, one) }}")
    after, result = apply(EliminateNoopSlice(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and after == before
