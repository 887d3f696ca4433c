"""Dropout: dropped in inference, in the form of every opset."""

import pytest

from onnxcompress.passes.eliminate_dropout import EliminateDropout
from onnxcompress.testing import apply, assert_equivalent, model, ops

X, Y = "float[N,4] x", "float[N,4] y"
C = "<float half = {0.5}, float none = {0}, bool no = {0}, bool yes = {1}>"


@pytest.mark.parametrize(
    ("call", "opset"),
    [
        ("a = Dropout<ratio = 0.5>(x)", 7),
        ("a, m = Dropout<ratio = 0.5>(x)", 11),
        ("a = Dropout(x)", 12),
        ("a, m = Dropout(x, half)", 13),
        ("a = Dropout(x, half, no)", 17),
        ("a = Dropout(x, none, yes)", 17),
        ("a = Dropout(x, none, t)", 17),
    ],
)
def test_drops(call, opset):
    before = model(f"g ({X}, bool t) => ({Y}) {C} {{ {call} y = Neg(a) }}", opset=opset)
    after, result = apply(EliminateDropout(), before)
    assert result.rewrites == 1 and ops(after) == ["Neg"]
    assert_equivalent(before, after)


MASK_READ = f"g ({X}, bool t) => ({Y}, bool[N,4] k) {C} {{ a, m = Dropout(x) y = Neg(a) k = Not(m) }}"
MASK_IS_OUTPUT = f"g ({X}, bool t) => ({Y}, bool[N,4] m) {C} {{ a, m = Dropout(x) y = Neg(a) }}"
INPUT_IS_OUTPUT = f"g ({X}, bool t) => ({Y}) {C} {{ y = Dropout(x) }}"


@pytest.mark.parametrize("text", [MASK_READ, MASK_IS_OUTPUT, INPUT_IS_OUTPUT])
def test_near_miss_is_left_alone(text):
    before = model(text)
    after, result = apply(EliminateDropout(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and ops(after) == ops(before)
    assert_equivalent(before, after)


def test_before_opset_7_it_may_be_training():
    before = model(f"g ({X}) => ({Y}) {{ a = Dropout<is_test = 0>(x) y = Neg(a) }}", opset=6)
    after, result = apply(EliminateDropout(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and after == before


@pytest.mark.parametrize("inputs", ["x, half, yes", "x, half, t", "x, , yes"])
def test_training_mode_is_left_alone(inputs):
    before = model(f"g ({X}, bool t) => ({Y}) {C} {{ a = Dropout({inputs}) y = Neg(a) }}")
    after, result = apply(EliminateDropout(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and after == before
