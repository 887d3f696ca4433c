"""Decomposed Softmax: forms, opsets, axes, near misses."""

import numpy as np
import onnx
import pytest

from onnxcompress.passes.fuse_softmax import FuseSoftmax
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops, run

F = np.float32
CONSTANTS = {
    "eps": F(1e-9),
    "last": np.array([-1]),
    "second": np.array([2]),
    "middle": np.array([1]),
    "both": np.array([1, 2]),
}
X, Y = "float[N,3,7] x", "float[N,3,7] y"


def make(nodes, *, opset=13, x=X, y=Y, **constants):
    known = {**CONSTANTS, **constants}
    text = f"g ({x}) => ({y}) {{ {nodes} }}"
    read = {name for node in onnx.parser.parse_graph(text).node for name in node.input}
    return model(text, opset=opset, ir_version=10, **{k: v for k, v in known.items() if k in read})


SHIFT = "m = ReduceMax<axes=[-1]>(x) d = Sub(x, m)"
SUM = "e = Exp(d) s = ReduceSum(e, last)"
FORMS = {
    "division": f"{SHIFT} {SUM} y = Div(e, s)",
    "reciprocal": f"{SHIFT} {SUM} r = Reciprocal(s) y = Mul(e, r)",
    "reciprocal first": f"{SHIFT} {SUM} r = Reciprocal(s) y = Mul(r, e)",
    "no maximum": "e = Exp(x) s = ReduceSum(e, last) y = Div(e, s)",
    "axis from the front": "m = ReduceMax<axes=[2]>(x) d = Sub(x, m) e = Exp(d) s = ReduceSum(e, second) y = Div(e, s)",
}


@pytest.mark.parametrize("form", FORMS)
def test_fuses_every_form(form):
    before = make(FORMS[form])
    after, result = apply(FuseSoftmax(), before)
    assert result.rewrites == 1 and ops(after) == ["Softmax"] and after.graph.node[0].input[0] == "x"
    assert_equivalent(before, after, rel=1e-6, sizes={"N": 5})  # measured 2.2e-7


@pytest.mark.parametrize(("opset", "axis"), [(7, 2), (10, 2), (11, -1), (12, -1), (13, -1)])
def test_axis_in_every_opset(opset, axis):
    nodes = "m = ReduceMax<axes=[2]>(x) d = Sub(x, m) e = Exp(d) s = ReduceSum<axes=[2]>(e) y = Div(e, s)"
    before = make(nodes if opset < 13 else nodes.replace("ReduceSum<axes=[2]>(e)", "ReduceSum(e, last)"), opset=opset)
    after, result = apply(FuseSoftmax(), before)
    assert result.rewrites == 1 and ops(after) == ["Softmax"]
    assert [a.i for a in after.graph.node[0].attribute] == [axis]
    assert_equivalent(before, after, rel=6e-7)  # measured 7.5e-8


def test_axes_as_an_input_and_rank_not_known():
    nodes = f"x = Reshape(x0, shape) {FORMS['division'].replace('ReduceMax<axes=[-1]>(x)', 'ReduceMax(x, last)')}"
    before = make(nodes, opset=18, x=f"{X}0, int64[K] shape")
    after, result = apply(FuseSoftmax(), before)
    assert result.rewrites == 1 and ops(after) == ["Reshape", "Softmax"]
    feeds = {"x0": np.random.default_rng(0).normal(size=(2, 3, 7)).astype(F), "shape": np.array([2, 3, 7])}
    assert_equivalent(before, after, rel=1e-6, feeds=[feeds])  # measured 1.3e-7


@pytest.mark.parametrize(("kind", "rel"), [("double", 1e-15), ("float16", 2e-3)])
def test_other_types(kind, rel):
    before = make(FORMS["division"], x=f"{kind}{X[5:]}", y=f"{kind}{Y[5:]}")
    after, result = apply(FuseSoftmax(), before)
    assert result.rewrites == 1 and ops(after) == ["Softmax"]
    assert_equivalent(before, after, rel=rel)  # measured 0 and 0


def test_large_inputs_overflow_no_more():
    before = make(FORMS["no maximum"])
    after, _ = apply(FuseSoftmax(), before)
    feeds = {"x": np.full((1, 3, 7), 100, F)}
    assert np.isnan(run(before, feeds)[0]).all()
    assert np.allclose(run(after, feeds)[0], 1 / 7)


def test_a_maximum_over_another_axis_is_a_shift_like_any_other():
    before = make(f"{SHIFT.replace('[-1]', '[1]')} {SUM} y = Div(e, s)")
    after, result = apply(FuseSoftmax(), before)
    assert result.rewrites == 1 and ops(after) == ["ReduceMax", "Sub", "Softmax"]
    assert_equivalent(before, after, rel=8e-7)  # measured 9.5e-8


WHOLE = FORMS["division"]
NEAR_MISSES = {
    "exponential is an output": (WHOLE, {"y": f"{Y}, float[N,3,7] e"}, "'e', which would go, is a model output"),
    "difference is read elsewhere": (f"{WHOLE} z = Neg(d)", {"y": f"{Y}, float[N,3,7] z"}, "'d', which would go"),
    "another axis": (WHOLE.replace("[-1]", "[1]").replace("last", "middle"), {}, "last axis"),
    "two axes": (WHOLE.replace("[-1]", "[1,2]").replace("last", "both"), {}, "last axis"),
    "dropped axis": (
        WHOLE.replace("ReduceSum(", "ReduceSum<keepdims=0>("),
        {"x": "float[7,7] x", "y": "float[7,7] y"},
        "drops it",
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_miss_is_left_alone(case):
    nodes, options, reason = NEAR_MISSES[case]
    before = make(nodes, **options)
    after, result = apply(FuseSoftmax(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert len(result.misses) == 1 and reason in result.misses[0].reason
    assert_equivalent(before, after)


OTHER_THINGS = {
    "another numerator": f"{SHIFT} {SUM} z = Exp(x) y = Div(z, s)",
    "turned about": f"{SHIFT} {SUM} y = Div(s, e)",
    "mean": WHOLE.replace("ReduceSum(e, last)", "ReduceMean<axes=[-1]>(e)"),
    "epsilon": f"{SHIFT} {SUM} t = Add(s, eps) y = Div(e, t)",
    "no exponential": "d = Abs(x) s = ReduceSum(d, last) y = Div(d, s)",
    "product with another function": f"{SHIFT} {SUM} r = Neg(s) y = Mul(e, r)",
    "another numerator over another axis": f"{SHIFT} e = Exp(d) s = ReduceSum(e, middle) z = Neg(x) y = Div(z, s)",
    "product": f"{SHIFT} {SUM} y = Mul(e, s)",
}


@pytest.mark.parametrize("case", OTHER_THINGS)
def test_another_thing_is_left_alone(case):
    before = make(OTHER_THINGS[case])
    after, result = apply(FuseSoftmax(), before)
    assert result.rewrites == 0 and result.misses == [] and ops(after) == ops(before)


def test_a_type_that_is_not_known_is_left_alone():
    text = f"""<ir_version: 8, opset_import: ["" : 13, "ours" : 1]>
    g ({X}0) => ({Y}) {{ x = ours.Thing(x0) {FORMS["no maximum"]} }}"""
    result = FuseSoftmax().apply(graph_of(model(text, last=CONSTANTS["last"])))
    assert result.rewrites == 0 and "not known" in result.misses[0].reason


def test_the_rank_is_needed_in_old_opsets():
    nodes = f"x = Reshape(x0, shape) {FORMS['no maximum'].replace('ReduceSum(e, last)', 'ReduceSum<axes=[-1]>(e)')}"
    before = make(nodes, opset=10, x=f"{X}0, int64[K] shape")
    result = FuseSoftmax().apply(graph_of(before))
    assert result.rewrites == 0 and "rank" in result.misses[0].reason
