"""Decomposed LogSoftmax: forms, opsets, near misses."""

import numpy as np
import onnx
import pytest

from onnxcompress.passes.fuse_log_softmax import FuseLogSoftmax
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops

F = np.float32
CONSTANTS = {"last": np.array([-1]), "middle": np.array([1])}
X, Y = "float[N,3,7] x", "float[N,3,7] y"


def make(nodes, *, opset=13, x=X, y=Y, **constants):
    known = {**CONSTANTS, **constants}
    text = f"g ({x}) => ({y}) {{ {nodes} }}"
    read = {name for node in onnx.parser.parse_graph(text).node for name in node.input}
    return model(text, opset=opset, ir_version=10, **{k: v for k, v in known.items() if k in read})


SHIFT = "m = ReduceMax<axes=[-1]>(x) d = Sub(x, m)"
SUM = "e = Exp(d) s = ReduceSum(e, last) l = Log(s)"
FORMS = {
    "softmax": "p = Softmax(x) y = Log(p)",
    "log of a sum": "l = ReduceLogSumExp<axes=[2]>(x) y = Sub(x, l)",
    "shifted": f"{SHIFT} {SUM} y = Sub(d, l)",
    "not shifted": "e = Exp(x) s = ReduceSum(e, last) l = Log(s) y = Sub(x, l)",
    "shifted back": f"{SHIFT} {SUM} k = Add(m, l) y = Sub(x, k)",
    "shifted back, turned about": f"{SHIFT} {SUM} k = Add(l, m) y = Sub(x, k)",
}


@pytest.mark.parametrize("form", FORMS)
def test_fuses_every_form(form):
    before = make(FORMS[form])
    after, result = apply(FuseLogSoftmax(), before)
    assert result.rewrites == 1 and ops(after) == ["LogSoftmax"] and after.graph.node[0].input[0] == "x"
    assert_equivalent(before, after, rel=8e-7, sizes={"N": 5})  # measured 9.7e-8


@pytest.mark.parametrize("opset", [7, 11, 13])
@pytest.mark.parametrize("axis", ["", "<axis=0>", "<axis=1>", "<axis=2>"])
def test_log_of_softmax_keeps_the_axis(opset, axis):
    before = make(f"p = Softmax{axis}(x) y = Log(p)", opset=opset)
    after, result = apply(FuseLogSoftmax(), before)
    assert result.rewrites == 1 and ops(after) == ["LogSoftmax"]
    assert_equivalent(before, after, rel=7e-7, sizes={"N": 3})  # measured 8.7e-8


@pytest.mark.parametrize("opset", [7, 10, 11, 12])
def test_sum_in_old_opsets(opset):
    before = make("l = ReduceLogSumExp<axes=[2]>(x) y = Sub(x, l)", opset=opset)
    after, result = apply(FuseLogSoftmax(), before)
    assert result.rewrites == 1 and ops(after) == ["LogSoftmax"]
    assert_equivalent(before, after, rel=1e-6)  # measured 1.2e-7


@pytest.mark.parametrize(("kind", "rel"), [("double", 1e-15), ("float16", 2e-3)])
def test_other_types(kind, rel):
    before = make(FORMS["log of a sum"], x=f"{kind}{X[5:]}", y=f"{kind}{Y[5:]}")
    after, result = apply(FuseLogSoftmax(), before)
    assert result.rewrites == 1 and ops(after) == ["LogSoftmax"]
    assert_equivalent(before, after, rel=rel)  # measured 1.1e-16 and 0


WHOLE = FORMS["shifted"]
NEAR_MISSES = {
    "softmax is an output": (FORMS["softmax"], {"y": f"{Y}, float[N,3,7] p"}, "'p', which would go"),
    "difference is read elsewhere": (f"{WHOLE} z = Neg(d)", {"y": f"{Y}, float[N,3,7] z"}, "'d', which would go"),
    "another axis": (WHOLE.replace("[-1]", "[1]").replace("last", "middle"), {}, "last axis"),
    "log of a sum over another axis": (FORMS["log of a sum"].replace("[2]", "[1]"), {}, "last axis"),
    "dropped axis": (
        FORMS["log of a sum"].replace("axes=[2]", "axes=[1], keepdims=0"),
        {"x": "float[7,7] x", "y": "float[7,7] y"},
        "drops it",
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_miss_is_left_alone(case):
    nodes, options, reason = NEAR_MISSES[case]
    before = make(nodes, **options)
    after, result = apply(FuseLogSoftmax(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert len(result.misses) == 1 and reason in result.misses[0].reason
    assert_equivalent(before, after)


OTHER_THINGS = {
    "sum of something else": f"{SHIFT} z = Abs(x) {SUM} y = Sub(z, l)",
    "log of a sum of something else": "z = Abs(x) l = ReduceLogSumExp<axes=[2]>(z) y = Sub(x, l)",
    "turned about": f"{SHIFT} {SUM} y = Sub(l, d)",
    "not shifted back": f"{SHIFT} {SUM} y = Sub(x, l)",
    "shifted by something else": f"{SHIFT} z = ReduceMin<axes=[-1]>(x) {SUM} k = Add(z, l) y = Sub(x, k)",
    "shifted back twice": f"{SHIFT} {SUM} k = Add(m, l) y = Sub(d, k)",
    "log of a sigmoid": "p = Sigmoid(x) y = Log(p)",
    "log of a plain sum": f"{SHIFT} s = ReduceSum(d, last) l = Log(s) y = Sub(d, l)",
    "root of a sum": f"{SHIFT} e = Exp(d) s = ReduceSum(e, last) l = Sqrt(s) y = Sub(d, l)",
    "hard": f"{SHIFT} e = Exp(d) s = ReduceSum(e, last) y = Sub(d, s)",
}


@pytest.mark.parametrize("case", OTHER_THINGS)
def test_another_thing_is_left_alone(case):
    before = make(OTHER_THINGS[case])
    after, result = apply(FuseLogSoftmax(), before)
    assert result.rewrites == 0 and result.misses == [] and ops(after) == ops(before)


@pytest.mark.parametrize("form", ["log of a sum", "not shifted"])
def test_the_rank_is_needed_in_old_opsets(form):
    nodes = FORMS[form].replace("[2]", "[-1]").replace("ReduceSum(e, last)", "ReduceSum<axes=[-1]>(e)")
    before = make(f"x = Reshape(x0, shape) {nodes}", opset=10, x=f"{X}0, int64[K] shape")
    result = FuseLogSoftmax().apply(graph_of(before))
    assert result.rewrites == 0 and "rank" in result.misses[0].reason


def test_a_type_that_is_not_known_is_left_alone():
    text = f"""<ir_version: 8, opset_import: ["" : 13, "ours" : 1]>
    g ({X}) => ({Y}) {{ u = ours.Thing(x) p = Softmax(u) y = Log(p) }}"""
    result = FuseLogSoftmax().apply(graph_of(model(text)))
    assert result.rewrites == 0 and "not known" in result.misses[0].reason
