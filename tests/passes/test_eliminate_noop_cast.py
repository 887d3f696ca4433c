"""Casts to the type at hand."""

import pytest

from onnxcompress.passes.eliminate_noop_cast import EliminateNoopCast
from onnxcompress.testing import apply, assert_equivalent, model, ops


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("float", "Cast<to = 1>(x)"),
        ("int64", "Cast<to = 7>(x)"),
        ("bool", "Cast<to = 9>(x)"),
        ("float16", "Cast<to = 10>(x)"),
        ("float", "CastLike(x, z)"),
    ],
)
def test_drops(kind, call):
    before = model(f"g ({kind}[N] x, {kind}[M] z) => ({kind}[N] y) {{ a = Identity(x) b = {call} y = Identity(b) }}")
    after, result = apply(EliminateNoopCast(), before)
    assert result.rewrites == 1 and ops(after) == ["Identity", "Identity"]
    assert_equivalent(before, after)


@pytest.mark.parametrize(
    ("kind", "call", "made"),
    [
        ("float", "Cast<to = 10>(x)", "float16"),
        ("int64", "Cast<to = 6>(x)", "int32"),
        ("uint8", "Cast<to = 9>(x)", "bool"),
        ("float", "CastLike(x, z)", "int32"),
    ],
)
def test_another_type_is_left_alone(kind, call, made):
    before = model(f"g ({kind}[N] x, int32[M] z) => ({made}[N] y) {{ b = {call} y = Identity(b) }}")
    after, result = apply(EliminateNoopCast(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert_equivalent(before, after)


def test_model_output_that_would_be_an_input_stays():
    before = model("g (float[N] x) => (float[N] y) { y = Cast<to = 1>(x) }")
    after, result = apply(EliminateNoopCast(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and after == before
