"""Concat of one tensor, and of tensors without elements."""

import pytest

from onnxcompress.passes.eliminate_noop_concat import EliminateNoopConcat
from onnxcompress.testing import apply, assert_equivalent, model, ops


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("a = Relu(x) b = Concat<axis = 1>(a) y = Neg(b)", ["Relu", "Neg"]),
        ("a = Relu(x) b = Concat<axis = 1>(a, e) y = Neg(b)", ["Relu", "Neg"]),
        ("a = Relu(x) b = Concat<axis = -1>(e, a, e) y = Neg(b)", ["Relu", "Neg"]),
        ("a = Relu(x) y = Concat<axis = 1>(e, x, a)", ["Relu", "Concat"]),
        ("a = Relu(x) y = Concat<axis = 1>(a)", ["Relu"]),
        ("y = Concat<axis = 1>(x, e)", ["Concat"]),
    ],
)
def test_drops(body, left):
    empty = "<float[2,0] e = {}>" if "e," in body or ", e" in body else ""
    before = model(f"g (float[2,3] x) => (float[2,b] y) {empty} {{ {body} }}")
    after, result = apply(EliminateNoopConcat(), before)
    assert result.rewrites == 1 and ops(after) == left
    assert not after.graph.initializer
    assert_equivalent(before, after)


def test_all_empty():
    before = model("g (float[2,0] x) => (float[2,0] y) { a = Concat<axis = 1>(x, x) y = Neg(a) }")
    after, result = apply(EliminateNoopConcat(), before)
    assert result.rewrites == 1 and ops(after) == ["Neg"]
    assert_equivalent(before, after)


EMPTY_ON_ANOTHER_AXIS = "g (float[0,3] x, float[0,2] z) => (float[0,5] y) { a = Concat<axis = 1>(x, z) y = Neg(a) }"
UNKNOWN_SIZE = "g (float[2,N] x, float[2,M] z) => (float[2,b] y) { a = Concat<axis = 1>(x, z) y = Neg(a) }"


@pytest.mark.parametrize("text", [EMPTY_ON_ANOTHER_AXIS, UNKNOWN_SIZE])
def test_near_miss_is_left_alone(text):
    before = model(text)
    after, result = apply(EliminateNoopConcat(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert_equivalent(before, after, sizes={"N": 0, "M": 3})


def test_model_output_that_would_be_an_input_stays():
    before = model("g (float[2,3] x) => (float[2,3] y) { y = Concat<axis = 1>(x) }")
    after, result = apply(EliminateNoopConcat(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and after == before
