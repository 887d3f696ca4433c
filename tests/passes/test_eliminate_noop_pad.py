"""Pads of nothing."""

import pytest

from onnxcompress.passes.eliminate_noop_pad import EliminateNoopPad
from onnxcompress.testing import apply, assert_equivalent, model, ops

C = """<int64[4] zeros = {0, 0, 0, 0}, int64[4] some = {0, 1, 0, 0}, int64[4] crop = {0, 0, 0, -1},
    int64[2] two = {0, 0}, int64[1] axis = {1}, float value = {7}>"""


def chain(call):
    return f"g (float[N,4] x, int64[4] p) => (float[a,b] y) {C} {{ a = Relu(x) b = {call} y = Neg(b) }}"


@pytest.mark.parametrize(
    ("call", "opset"),
    [
        ("Pad(a, zeros)", 17),
        ('Pad<mode = "reflect">(a, zeros)', 11),
        ("Pad(a, zeros, value)", 13),
        ("Pad(a, two, , axis)", 18),
        ("Pad<pads = [0, 0, 0, 0]>(a)", 10),
    ],
)
def test_drops(call, opset):
    before = model(chain(call), opset=opset)
    after, result = apply(EliminateNoopPad(), before)
    assert result.rewrites == 1 and ops(after) == ["Relu", "Neg"]
    assert_equivalent(before, after)


@pytest.mark.parametrize(
    ("call", "opset"),
    [
        ("Pad(a, some)", 17),
        ("Pad(a, crop)", 17),
        ("Pad(a, p)", 17),
        ("Pad<pads = [0, 0, 0, 2]>(a)", 10),
    ],
)
def test_near_miss_is_left_alone(call, opset):
    before = model(chain(call), opset=opset)
    after, result = apply(EliminateNoopPad(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert_equivalent(before, after)
