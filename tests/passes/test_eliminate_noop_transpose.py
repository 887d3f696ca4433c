"""Transposes that move nothing."""

import pytest

from onnxcompress.passes.eliminate_noop_transpose import EliminateNoopTranspose
from onnxcompress.testing import apply, assert_equivalent, model, ops


def chain(x, call):
    kind = "float[" + ",".join("abcd"[: x.count(",") + 1]) + "]" if "[" in x else "float"
    return f"g ({x}) => ({kind} y) {{ a = Relu(x) b = {call} y = Neg(b) }}"


@pytest.mark.parametrize(
    ("x", "call"),
    [
        ("float[N,3,M] x", "Transpose<perm = [0, 1, 2]>(a)"),
        ("float[N] x", "Transpose(a)"),
        ("float[1,1,N] x", "Transpose<perm = [1, 0, 2]>(a)"),
        ("float[1,N,1] x", "Transpose<perm = [2, 1, 0]>(a)"),
        ("float[1,N,1] x", "Transpose(a)"),
    ],
)
def test_drops(x, call):
    before = model(chain(x, call))
    after, result = apply(EliminateNoopTranspose(), before)
    assert result.rewrites == 1 and ops(after) == ["Relu", "Neg"]
    assert_equivalent(before, after, sizes={"N": 3, "M": 4})


@pytest.mark.parametrize(
    ("x", "call"),
    [
        ("float[N,3,M] x", "Transpose<perm = [0, 2, 1]>(a)"),
        ("float[N,M] x", "Transpose(a)"),
        ("float[N,N] x", "Transpose(a)"),  # the same shape, other elements
        ("float[1,N,M] x", "Transpose<perm = [1, 0, 2]>(a)"),  # another shape
        ("float[N,K,M] x", "Transpose<perm = [1, 0, 2]>(a)"),  # K is 1 in the test, and not known to be
    ],
)
def test_near_miss_is_left_alone(x, call):
    before = model(chain(x, call))
    after, result = apply(EliminateNoopTranspose(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert_equivalent(before, after, sizes={"N": 3, "M": 4, "K": 1})


def test_model_output_that_would_be_an_input_stays():
    before = model("g (float[N,M] x) => (float[N,M] y) { y = Transpose<perm = [0, 1]>(x) }")
    after, result = apply(EliminateNoopTranspose(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and after == before
