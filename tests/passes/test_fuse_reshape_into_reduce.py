"""Reductions that keep or drop their axes themselves."""

import pytest

from onnxcompress.passes.fuse_reshape_into_reduce import REDUCTIONS, FuseReshapeIntoReduce
from onnxcompress.testing import apply, assert_equivalent, model, ops

C = """<int64[1] last = {-1}, int64[1] one = {1}, int64[1] zero = {0}, int64[2] rows = {-1, 1}, int64[2] both = {0, -1},
    int64[3] copy = {0, 0, 1}, int64[3] middle = {0, 1, 8}>"""


def build(body, x="float[N,3,8] x", dims=3, opset=17, kind="float"):
    shape = ",".join("abcd"[:dims])
    return model(f"g ({x}) => ({kind}[{shape}] y) {C} {{ {body} }}", opset=opset)


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize("opset", [11, 18])
def test_every_reduction(op, opset):
    attrs, axes = "keepdims = 0", ""
    if op.startswith("Arg"):
        attrs += ", axis = -1"
    elif opset < 13 or (op != "ReduceSum" and opset < 18):
        attrs += ", axes = [-1]"
    else:
        axes = ", last"
    view = "Unsqueeze<axes = [2]>(r)" if opset < 13 else "Unsqueeze(r, last)"
    kind = "int64" if op.startswith("Arg") else "float"
    before = build(f"p = Abs(x) r = {op}<{attrs}>(p{axes}) y = {view}", opset=opset, kind=kind)
    after, result = apply(FuseReshapeIntoReduce(), before)
    assert result.rewrites == 1 and ops(after) == ["Abs", op]
    for n in (1, 3):
        assert_equivalent(before, after, sizes={"N": n})


@pytest.mark.parametrize(
    ("body", "dims"),
    [
        ("r = ReduceSum<keepdims = 0>(x, one) y = Unsqueeze(r, one)", 3),
        ("r = ReduceSum<keepdims = 0>(x, last) y = Reshape(r, copy)", 3),
        ("r = ReduceSum<keepdims = 0>(x, one) y = Reshape(r, middle)", 3),
        ("r = ReduceSum(x, last) y = Squeeze(r, last)", 2),
        ("r = ReduceSum(x, both) y = Reshape(r, last)", 1),
    ],
)
def test_forms(body, dims):
    before = build(body, dims=dims)
    after, result = apply(FuseReshapeIntoReduce(), before)
    assert result.rewrites == 1 and len(ops(after)) == 1
    for n in (1, 3):
        assert_equivalent(before, after, sizes={"N": n})


@pytest.mark.parametrize(
    ("body", "dims"),
    [
        ("r = ReduceSum<keepdims = 0>(x, one) y = Unsqueeze(r, last)", 3),  # another place
        ("r = ReduceSum(x, last) y = Squeeze(r, zero)", 2),  # another axis of size 1
        ("r = ReduceSum<keepdims = 0>(x, last) y = Reshape(r, last)", 1),
        ("r = ReduceSum<noop_with_empty_axes = 1>(x) y = Unsqueeze(r, one)", 4),
    ],
)
def test_near_miss_is_left_alone(body, dims):
    before = build(body, dims=dims)
    after, result = apply(FuseReshapeIntoReduce(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert_equivalent(before, after, sizes={"N": 1})


SUM = "r = ReduceSum<keepdims = 0>(x, one) y = Unsqueeze(r, one)"


def test_reduction_that_is_read_elsewhere_stays():
    before = model(f"g (float[N,3] x) => (float[a,b] y, float[a] z) {C} {{ {SUM} z = Neg(r) }}")
    after, result = apply(FuseReshapeIntoReduce(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and ops(after) == ops(before)


def test_model_output_stays():
    before = model(f"g (float[N,3] x) => (float[a,b] y, float[a] r) {C} {{ {SUM} }}")
    after, result = apply(FuseReshapeIntoReduce(), before)
    assert result.rewrites == 0 and len(result.misses) == 1
    assert_equivalent(before, after)
