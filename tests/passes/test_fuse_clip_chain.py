"""Clip and Relu after one another: intervals, infinities, NaN and the sign of zero."""

import itertools

import numpy as np
import pytest

from onnxcompress.passes.fuse_clip_chain import FuseClipChain
from onnxcompress.testing import apply, model, ops, run

SPECIAL = np.array([np.inf, -np.inf, np.nan, -0.0, 0.0, 3, -3, 0.5, -0.5, 100, -100, 6, 1.5, 2.5], np.float32)


def same_bits(before, after, x=SPECIAL):
    for a, b in zip(run(before, {"x": x}), run(after, {"x": x}), strict=True):
        nan = np.isnan(a) if a.dtype.kind == "f" else np.zeros(a.shape, bool)
        assert np.array_equal(nan, np.isnan(b) if b.dtype.kind == "f" else nan)
        assert a[~nan].tobytes() == b[~nan].tobytes()


def clip(low, high, opset, name):
    """Text and constants of one clamp; None for an omitted bound, "relu" for Relu."""
    if low == "relu":
        return "Relu({x})", {}
    if opset < 11:
        attrs = ", ".join(f"{key} = {float(v)}" for key, v in (("min", low), ("max", high)) if v is not None)
        return f"Clip<{attrs}>({{x}})" if attrs else "Clip({x})", {}
    constants = {f"{name}{key}": np.float32(v) for key, v in (("lo", low), ("hi", high)) if v is not None}
    inputs = ["{x}", f"{name}lo" if low is not None else "", f"{name}hi" if high is not None else ""]
    while not inputs[-1]:
        inputs.pop()
    return f"Clip({', '.join(inputs)})", constants


CLAMPS = [("relu", None), (0, 6), (0, None), (None, 2), (-1, 1), (2, 3), (None, None), (-0.0, 4)]


@pytest.mark.parametrize("opset", [10, 11, 17])
@pytest.mark.parametrize(("first", "second"), list(itertools.product(CLAMPS, CLAMPS)))
def test_every_pair(first, second, opset):
    one, constants = clip(*first, opset, "a")
    two, more = clip(*second, opset, "b")
    body = f"a = {one.format(x='x')} y = {two.format(x='a')}"
    before = model(f"g (float[N] x) => (float[N] y) {{ {body} }}", opset=opset, **constants, **more)
    after, result = apply(FuseClipChain(), before)
    assert result.rewrites == 1 and len(ops(after)) == 1
    same_bits(before, after)


def test_long_chain():
    before = model(
        "g (float[N] x) => (float[N] y) <float z = {0}, float six = {6}, float m = {-9}> "
        "{ a = Relu(x) b = Clip(a, m, six) c = Relu(b) d = Clip(c, z) y = Neg(d) }"
    )
    after, result = apply(FuseClipChain(), before)
    assert result.rewrites == 3 and ops(after) == ["Clip", "Neg"]
    same_bits(before, after)


def test_integers():
    before = model("g (int32[N] x) => (int32[N] y) <int32 a = {-3}, int32 b = {5}> { c = Clip(x, a) y = Clip(c, , b) }")
    after, result = apply(FuseClipChain(), before)
    assert result.rewrites == 1 and ops(after) == ["Clip"]
    same_bits(before, after, np.array([-(2**31), -4, 0, 9, 2**31 - 1], np.int32))


def test_shared_inner_clamp_is_kept_where_the_outer_adds_nothing():
    before = model("g (float[N] x) => (float[N] y, float[N] z) { a = Relu(x) b = Relu(a) y = Neg(b) z = Abs(a) }")
    after, result = apply(FuseClipChain(), before)
    assert result.rewrites == 1 and ops(after) == ["Relu", "Neg", "Abs"]
    same_bits(before, after)


C = "<float lo = {-1}, float hi = {1}, float nan = {1}, float three = {3}>"
TWO_READERS = f"g (float[N] x) => (float[N] y, float[N] z) {C} {{ a = Relu(x) y = Clip(a, lo, hi) z = Neg(a) }}"
MODEL_OUTPUT = f"g (float[N] x) => (float[N] y, float[N] a) {C} {{ a = Relu(x) y = Clip(a, lo, hi) }}"
BOTH_OUTPUTS = f"g (float[N] x) => (float[N] y, float[N] a) {C} {{ a = Relu(x) y = Relu(a) }}"


@pytest.mark.parametrize("text", [TWO_READERS, MODEL_OUTPUT, BOTH_OUTPUTS])
def test_near_miss_is_left_alone(text):
    before = model(text)
    after, result = apply(FuseClipChain(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and ops(after) == ops(before)
    same_bits(before, after)


@pytest.mark.parametrize(
    "body",
    [
        "t = Neg(lo) a = Relu(x) y = Clip(a, t, hi)",  # a bound that is computed
        "a = Relu(x) y = Clip(a, three, hi)",  # bounds that cross
        "a = Relu(x) y = LeakyRelu(a)",
    ],
)
def test_what_is_no_constant_interval_is_left_alone(body):
    before = model(f"g (float[N] x) => (float[N] y) {C} {{ {body} }}")
    after, result = apply(FuseClipChain(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)


def test_nan_bound_is_left_alone():
    before = model("g (float[N] x) => (float[N] y) { a = Relu(x) y = Clip(a, lo) }", lo=np.array(np.nan, np.float32))
    assert apply(FuseClipChain(), before)[1].rewrites == 0
