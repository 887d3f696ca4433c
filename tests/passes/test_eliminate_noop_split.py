"""Splits into one piece."""

import pytest

from onnxcompress.passes.eliminate_noop_split import EliminateNoopSplit
from onnxcompress.testing import apply, assert_equivalent, model, ops


@pytest.mark.parametrize(
    ("call", "opset"),
    [
        ("Split<axis = 1>(a, four)", 17),
        ("Split<axis = 1, split = [4]>(a)", 11),
        ("Split<axis = 1, num_outputs = 1>(a)", 18),
    ],
)
def test_drops(call, opset):
    text = f"g (float[N,4] x) => (float[N,4] y) <int64[1] four = {{4}}> {{ a = Relu(x) b = {call} y = Neg(b) }}"
    before = model(text, opset=opset)
    after, result = apply(EliminateNoopSplit(), before)
    assert result.rewrites == 1 and ops(after) == ["Relu", "Neg"]
    assert_equivalent(before, after)


def test_two_pieces_stay():
    before = model("g (float[N,4] x) => (float[N,2] y) { a, b = Split<axis = 1>(x) y = Sub(a, b) }")
    after, result = apply(EliminateNoopSplit(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert_equivalent(before, after)


def test_model_output_that_would_be_an_input_stays():
    before = model("g (float[N,4] x) => (float[N,4] y) { y = Split<axis = 1>(x) }")
    after, result = apply(EliminateNoopSplit(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and after == before
