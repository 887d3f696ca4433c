"""Slice after Slice."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.passes.fuse_slice_chain import FuseSliceChain
from onnxcompress.testing import apply, assert_equivalent, model, ops

SIZES = {"N": 7, "M": 6}


def text(first, second, opset):
    """Each a dict axis -> (start, end, step)."""
    constants, calls = {}, []
    for name, cuts in (("a", first), ("b", second)):
        columns = {"starts": [c[0] for c in cuts.values()], "ends": [c[1] for c in cuts.values()], "axes": list(cuts)}
        if opset < 10:
            calls.append("Slice<" + ", ".join(f"{key} = {value}" for key, value in columns.items()) + ">({x})")
            continue
        columns["steps"] = [c[2] for c in cuts.values()]
        constants |= {f"{name}_{key}": np.array(value, np.int64) for key, value in columns.items()}
        calls.append("Slice({x}, " + ", ".join(f"{name}_{key}" for key in columns) + ")")
    a, b = calls[0].format(x="x"), calls[1].format(x="a")
    return model(f"g (float[N,5,M] x) => (float[p,q,r] y) {{ a = {a} b = {b} y = Neg(b) }}", opset=opset, **constants)


@pytest.mark.parametrize("opset", [9, 10, 17])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({0: (1, 5, 1)}, {2: (0, 3, 1)}),
        ({0: (1, 5, 1)}, {0: (1, 3, 1)}),
        ({0: (1, 5, 1)}, {0: (2, 99, 1)}),
        ({0: (3, 5, 1)}, {0: (4, 9, 1)}),  # nothing is left
        ({0: (1, 2**63 - 1, 1)}, {0: (1, 2**63 - 1, 1)}),
        ({1: (-2, 5, 1), 2: (1, -1, 1)}, {0: (0, 4, 1)}),
        ({-1: (1, 4, 1)}, {2: (1, 2, 1), 1: (0, 2, 1)}),
    ],
)
def test_fuses(first, second, opset):
    before = text(first, second, opset)
    after, result = apply(FuseSliceChain(), before)
    assert result.rewrites == 1 and ops(after) == ["Slice", "Neg"]
    assert_equivalent(before, after, sizes=SIZES)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({0: (0, 7, 2)}, {2: (0, 6, 3)}),
        ({0: (6, -99, -2)}, {1: (0, 2, 1)}),
    ],
)
def test_steps_on_different_axes(first, second):
    before = text(first, second, 13)
    after, result = apply(FuseSliceChain(), before)
    assert result.rewrites == 1 and ops(after) == ["Slice", "Neg"]
    assert_equivalent(before, after, sizes=SIZES)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({0: (1, -1, 1)}, {0: (0, 3, 1)}),
        ({0: (1, 5, 1)}, {0: (-2, 3, 1)}),
        ({0: (1, 5, 1)}, {0: (0, -1, 1)}),
        ({0: (0, 5, 2)}, {0: (0, 2, 1)}),
        ({0: (0, 5, 1)}, {-3: (0, 5, 2)}),
    ],
)
def test_near_miss_is_left_alone(first, second):
    before = text(first, second, 13)
    after, result = apply(FuseSliceChain(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and ops(after) == ops(before)
    assert_equivalent(before, after, sizes=SIZES)


def test_first_that_is_read_elsewhere_stays():
    body = "a = Slice<starts = [1], ends = [3]>(x) y = Slice<starts = [0], ends = [1]>(a) z = Neg(a)"
    before = model(f"g (float[N,5] x) => (float[p,q] y, float[r,q] z) {{ {body} }}", opset=9)
    after, result = apply(FuseSliceChain(), before)
    assert result.rewrites == 0 and len(result.misses) == 1
    assert_equivalent(before, after, sizes=SIZES)


def test_computed_bounds_are_left_alone():
    body = "a = Slice(x, zero, n) y = Slice(a, zero, two)"
    before = model(
        f"g (float[N,5] x, int64[1] n) => (float[p,q] y) <int64[1] zero = {{0}}, int64[1] two = {{2}}> {{ {body} }}"
    )
    after, result = apply(FuseSliceChain(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and ops(after) == ops(before)


cut = st.tuples(st.integers(-9, 9), st.integers(-9, 9), st.sampled_from([1, 1, 1, 2, -1]))


@given(*[st.dictionaries(st.sampled_from([0, 1, -1]), cut, min_size=1, max_size=3) for _ in range(2)])
@settings(max_examples=30, deadline=None)
def test_random_pairs(first, second):
    before = text(first, second, 13)
    after, _ = apply(FuseSliceChain(), before)
    for n in (1, 7):
        assert_equivalent(before, after, sizes={"N": n, "M": 6})
