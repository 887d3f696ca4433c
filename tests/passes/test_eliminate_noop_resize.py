"""Resize and Upsample that keep every size."""

import numpy as np
import pytest

from onnxcompress.passes.eliminate_noop_resize import EliminateNoopResize
from onnxcompress.testing import apply, assert_equivalent, model, ops

C = """<float[4] ones = {1, 1, 1, 1}, float[4] twice = {1, 1, 2, 1}, int64[4] same = {2, 3, 4, 5},
    int64[4] other = {2, 3, 4, 6}, float[8] roi = {0, 0, 0, 0.5, 1, 1, 1, 1}, float[0] no = {}, int64[2] last = {4, 5},
    float[2] two = {1, 1}, int64[1] zero = {0}, int64[1] two1 = {2}, int64[1] max = {9223372036854775807}>"""


def chain(call, x="float[2,3,4,5] x", before=""):
    return f"g ({x}, float[4] f) => (float[a,b,c,d] y) {C} {{ a = Relu(x) {before} b = {call} y = Neg(b) }}"


@pytest.mark.parametrize(
    ("call", "opset"),
    [
        ("Resize(a, , ones)", 17),
        ('Resize<mode = "linear">(a, no, ones)', 11),
        ('Resize<mode = "cubic", coordinate_transformation_mode = "align_corners">(a, , ones)', 13),
        ('Resize<mode = "linear", antialias = 1>(a, , ones)', 18),
        ("Resize(a, , , same)", 17),
        ("Resize<axes = [2, 3]>(a, , , last)", 18),
        ("Resize<axes = [-1, -2]>(a, , two)", 18),
        ('Resize<mode = "nearest">(a, ones)', 10),
        ("Upsample(a, ones)", 9),
        ("Upsample<scales = [1.0, 1.0, 1.0, 1.0]>(a)", 7),
    ],
)
def test_drops(call, opset):
    before = model(chain(call), opset=opset)
    after, result = apply(EliminateNoopResize(), before)
    assert result.rewrites == 1 and ops(after) == ["Relu", "Neg"]
    assert_equivalent(before, after)


def test_computed_sizes():
    compute = "s = Shape(a) h = Slice(s, two1, max) n = Slice(s, zero, two1) t = Concat<axis = 0>(n, h)"
    before = model(chain("Resize(a, , , t)", "float[N,3,H,W] x", compute))
    after, result = apply(EliminateNoopResize(), before)
    assert result.rewrites == 1 and "Resize" not in ops(after)
    assert_equivalent(before, after, sizes={"H": 4, "W": 3})


@pytest.mark.parametrize(
    "call",
    [
        "Resize(a, , twice)",
        "Resize(a, , , other)",
        'Resize<mode = "linear", coordinate_transformation_mode = "tf_crop_and_resize">(a, roi, ones)',
        "Resize(a, , f)",
    ],
)
def test_near_miss_is_left_alone(call):
    before = model(chain(call))
    after, result = apply(EliminateNoopResize(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    assert_equivalent(before, after, feeds=[{"x": x, "f": np.array([1, 1, 2, 2], np.float32)}])
