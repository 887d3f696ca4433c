"""Decomposed Sigmoid: forms, near misses."""

import numpy as np
import onnx
import pytest

from onnxcompress.passes.fuse_sigmoid import FuseSigmoid
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops

F = np.float32
CONSTANTS = {
    "one": F(1),
    "one1": np.ones(1, F),
    "two": F(2),
    "zero": F(0),
    "minus": F(-1),
    "minus_two": F(-2),
    "vector": np.ones(5, F),
}
X, Y = "float[N,4,5] x", "float[N,4,5] y"


def make(nodes, *, opset=13, x=X, y=Y, **constants):
    known = {**CONSTANTS, **constants}
    text = f"g ({x}) => ({y}) {{ {nodes} }}"
    read = {name for node in onnx.parser.parse_graph(text).node for name in node.input}
    return model(text, opset=opset, ir_version=10, **{k: v for k, v in known.items() if k in read})


@pytest.mark.parametrize("minus", ["Neg(x)", "Mul(x, minus)", "Sub(zero, x)", "Div(x, minus)"])
@pytest.mark.parametrize("inverse", ["Reciprocal(s)", "Div(one, s)"])
@pytest.mark.parametrize("total", ["Add(e, one)", "Add(one1, e)"])
def test_fuses(minus, inverse, total):
    before = make(f"n = {minus} e = Exp(n) s = {total} y = {inverse}")
    after, result = apply(FuseSigmoid(), before)
    assert result.rewrites == 1 and ops(after) == ["Sigmoid"]
    assert_equivalent(before, after, rel=5e-7, sizes={"N": 3})  # measured 6.8e-8


@pytest.mark.parametrize(("kind", "rel"), [("double", 1e-15), ("float16", 2e-3)])
def test_other_types(kind, rel):
    dtype = {"double": np.float64, "float16": np.float16}[kind]
    nodes = "n = Neg(x) e = Exp(n) s = Add(e, one) y = Reciprocal(s)"
    before = make(nodes, x=f"{kind}{X[5:]}", y=f"{kind}{Y[5:]}", one=dtype(1))
    after, result = apply(FuseSigmoid(), before)
    assert result.rewrites == 1 and ops(after) == ["Sigmoid"]
    assert_equivalent(before, after, rel=rel)  # measured 1.4e-16 and 0


WHOLE = "n = Neg(x) e = Exp(n) s = Add(e, one) y = Reciprocal(s)"
NEAR_MISSES = {
    "plus sign": ("e = Exp(x) s = Add(e, one) y = Reciprocal(s)", {}, "not -x"),
    "twice x": (WHOLE.replace("Neg(x)", "Mul(x, minus_two)"), {}, "not -x"),
    "exponential is an output": (WHOLE, {"y": f"{Y}, float[N,4,5] e"}, "'e', which would go, is a model output"),
    "sum is read elsewhere": (f"{WHOLE} z = Neg(s)", {"y": f"{Y}, float[N,4,5] z"}, "'s', which would go, is read"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_miss_is_left_alone(case):
    nodes, options, reason = NEAR_MISSES[case]
    before = make(nodes, **options)
    after, result = apply(FuseSigmoid(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert len(result.misses) == 1 and reason in result.misses[0].reason
    assert_equivalent(before, after)


@pytest.mark.parametrize(
    "nodes",
    [
        WHOLE.replace("one", "two"),
        WHOLE.replace("one", "vector"),
        WHOLE.replace("Add(e, one)", "Sub(e, one)"),
        WHOLE.replace("Reciprocal(s)", "Div(two, s)"),
        WHOLE.replace("Reciprocal(s)", "Div(x, s)"),
        WHOLE.replace("Reciprocal(s)", "Div(s, one)"),
        WHOLE.replace("Reciprocal(s)", "Neg(s)"),
        WHOLE.replace("Exp(n)", "Tanh(n)"),
        WHOLE.replace("s = Add(e, one) y = Reciprocal(s)", "y = Reciprocal(e)"),
    ],
)
def test_another_thing_is_left_alone(nodes):
    before = make(nodes)
    after, result = apply(FuseSigmoid(), before)
    assert result.rewrites == 0 and result.misses == [] and ops(after) == ops(before)


def test_a_type_that_is_not_known_is_left_alone():
    text = f"""<ir_version: 8, opset_import: ["" : 13, "ours" : 1]>
    g ({X}) => ({Y}) {{ u = ours.Thing(x) {WHOLE.replace("Neg(x)", "Neg(u)")} }}"""
    result = FuseSigmoid().apply(graph_of(model(text, one=F(1))))
    assert result.rewrites == 0 and "not known" in result.misses[0].reason
