"""Concat in Concat."""

import pytest

from onnxcompress.passes.fuse_concat_chain import FuseConcatChain
from onnxcompress.testing import apply, assert_equivalent, model, ops

X = "float[N,3] x, float[N,M] z"


@pytest.mark.parametrize(
    "body",
    [
        "a = Concat<axis = 1>(x, z) y = Concat<axis = 1>(x, a, z)",
        "a = Concat<axis = -1>(z, x) y = Concat<axis = 1>(a, x)",
        "a = Concat<axis = 0>(x, x) y = Concat<axis = 0>(x, a)",
    ],
)
def test_fuses(body):
    before = model(f"g ({X}) => (float[a,b] y) {{ {body} }}")
    after, result = apply(FuseConcatChain(), before)
    assert result.rewrites == 1 and ops(after) == ["Concat"]
    assert_equivalent(before, after, sizes={"M": 4})


def test_deep_and_twice():
    body = "a = Concat<axis = 1>(x, z) b = Concat<axis = 1>(z, x) c = Concat<axis = 1>(a, b) y = Concat<axis = 1>(c, x)"
    before = model(f"g ({X}) => (float[a,b] y) {{ {body} }}")
    after, result = apply(FuseConcatChain(), before)
    assert result.rewrites == 3 and ops(after) == ["Concat"]
    assert list(after.graph.node[0].input) == ["x", "z", "z", "x", "x"]
    assert_equivalent(before, after, sizes={"M": 4})


READ_TWICE = "a = Concat<axis = 1>(x, z) y = Concat<axis = 1>(a, a)"
READ_ELSEWHERE = "a = Concat<axis = 1>(x, z) b = Neg(a) y = Concat<axis = 1>(a, b)"


@pytest.mark.parametrize("body", [READ_TWICE, READ_ELSEWHERE])
def test_near_miss_is_left_alone(body):
    before = model(f"g ({X}) => (float[a,b] y) {{ {body} }}")
    after, result = apply(FuseConcatChain(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and ops(after) == ops(before)
    assert_equivalent(before, after)


@pytest.mark.parametrize(
    "body",
    [
        "a = Concat<axis = 1>(x, z) y = Concat<axis = 0>(a, a)",
        "a = Concat<axis = 1>(x, x) y = Concat<axis = -2>(a, a)",
    ],
)
def test_another_axis_is_left_alone(body):
    before = model(f"g ({X}) => (float[a,b] y) {{ {body} }}")
    after, result = apply(FuseConcatChain(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)


def test_model_output_stays():
    before = model(
        f"g ({X}) => (float[a,b] y, float[a,c] a) {{ a = Concat<axis = 1>(x, z) y = Concat<axis = 1>(a, x) }}"
    )
    after, result = apply(FuseConcatChain(), before)
    assert result.rewrites == 0 and len(result.misses) == 1
    assert_equivalent(before, after)
