"""Expand before an operator that broadcasts by itself."""

import numpy as np
import pytest

from onnxcompress.passes.eliminate_redundant_expand import ELEMENTWISE, EliminateRedundantExpand
from onnxcompress.testing import apply, assert_equivalent, model, ops

C = "<int64[2] two_eight = {2, 8}, int64[1] eight = {8}, int64[2] ones = {1, 1}, int64[3] more = {5, 1, 8}>"


def build(call, left="float[N,8] x", right="float[N,1] z", out="float[a,b] y", kind="float"):
    body = f"s = Shape(x) e = Expand(z, {{}}) {call}".replace("{}", "s" if "shape" not in call else "two_eight")
    return model(f"g ({left}, {right}) => ({out}) {C} {{ {body.replace('shape ', '')} }}")


@pytest.mark.parametrize("op", [op for op in ELEMENTWISE if op not in ("And", "Or", "Xor", "Where", "Mod")])
def test_drops(op):
    compares = op in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")
    before = build(f"y = {op}(x, e)", out="bool[a,b] y" if compares else "float[a,b] y")
    after, result = apply(EliminateRedundantExpand(), before)
    assert result.rewrites == 1 and "Expand" not in ops(after)
    for n in (0, 1, 3):
        assert_equivalent(before, after, sizes={"N": n})


@pytest.mark.parametrize("op", ["And", "Or", "Xor"])
def test_drops_logic(op):
    before = build(f"y = {op}(e, x)", "bool[N,8] x", "bool[N,1] z", "bool[a,b] y")
    after, result = apply(EliminateRedundantExpand(), before)
    assert result.rewrites == 1 and "Expand" not in ops(after)
    assert_equivalent(before, after, sizes={"N": 3})


@pytest.mark.parametrize(
    ("call", "right"),
    [
        ("c = Less(x, x) y = Where(c, x, e)", "float[N,1] z"),
        ("c = Less(x, x) y = Where(c, e, e)", "float[N,1] z"),
        ("y = Add(e, x)", "float[8] z"),
        ("y = Add(e, x)", "float z"),
        ("f = Expand(z, s) g = Add(e, x) y = Mul(f, g)", "float[1,8] z"),
    ],
)
def test_drops_other_forms(call, right):
    before = build(call, right=right)
    after, result = apply(EliminateRedundantExpand(), before)
    assert result.rewrites >= 1 and "Expand" not in ops(after)
    for n in (1, 3):
        assert_equivalent(before, after, sizes={"N": n})


def test_axes_come_from_different_operands():
    text = """g (float[N,1] x, float[1,M] w, float[1,1] z) => (float[a,b] y) {
        k = Add(x, w) s = Shape(k) e = Expand(z, s) c = Less(x, x) y = Where(c, w, e)
    }"""
    before = model(text)
    after, result = apply(EliminateRedundantExpand(), before)
    assert result.rewrites == 1 and "Expand" not in ops(after)
    assert_equivalent(before, after, sizes={"N": 3, "M": 4})


def test_expand_that_is_read_elsewhere_stays():
    before = build("y = Add(x, e) q = Neg(e)", out="float[a,b] y, float[c,d] q")
    after, result = apply(EliminateRedundantExpand(), before)
    assert result.rewrites == 1 and "Expand" in ops(after)
    add = next(node for node in after.graph.node if node.op_type == "Add")
    assert list(add.input) == ["x", "z"]
    assert_equivalent(before, after, sizes={"N": 3})


@pytest.mark.parametrize(
    ("call", "left", "right"),
    [
        ("y = Add(w, e) w = Neg(z)", "float[N,8] x", "float[N,1] z"),  # the Expand makes the shape
        ("y = Add(e, e)", "float[N,8] x", "float[N,1] z"),
        ("shape y = Add(x, e)", "float[N,8] x", "float[1,8] z"),  # N may be 1
    ],
)
def test_near_miss_is_left_alone(call, left, right):
    if call.endswith("w = Neg(z)"):
        call = "w = Neg(z) y = Add(w, e)"
    before = build(call, left, right)
    after, result = apply(EliminateRedundantExpand(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and ops(after) == ops(before)
    assert_equivalent(before, after, sizes={"N": 1})


@pytest.mark.parametrize("call", ["y = Pow(x, e)", "y = Max(x, e)", "y = MatMul(e, t) t = Transpose(x)"])
def test_other_operators_are_left_alone(call):
    if "MatMul" in call:
        call = "t = Transpose(x) y = MatMul(e, t)"
    before = build(call)
    after, result = apply(EliminateRedundantExpand(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)


def test_unknown_size_is_not_taken_for_one():
    """z has K rows: 1 or N, and with 1 the Expand is needed by nothing but the shape of x."""
    before = build("y = Add(x, e)", right="float[K,1] z")
    after, _ = apply(EliminateRedundantExpand(), before)
    rng = np.random.default_rng(0)
    for k in (1, 3):
        x, z = (rng.normal(size=(n, m)).astype(np.float32) for n, m in ((3, 8), (k, 1)))
        assert_equivalent(before, after, feeds=[{"x": x, "z": z}])
