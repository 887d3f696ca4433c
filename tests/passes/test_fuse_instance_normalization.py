"""Decomposed InstanceNormalization: forms, opsets, what is a LayerNormalization instead, near misses."""

import numpy as np
import onnx
import pytest

from onnxcompress.passes.fuse_instance_normalization import FuseInstanceNormalization
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops

F = np.float32
RNG = np.random.default_rng(0)
CONSTANTS = {
    "two": F(2),
    "e": F(1e-5),
    "e6": np.full((6, 1, 1), 1e-5, F),
    "g": RNG.normal(size=(6, 1, 1)).astype(F),
    "g1": RNG.normal(size=(1, 6, 1, 1)).astype(F),
    "gs": F(1.5),
    "gw": RNG.normal(size=5).astype(F),
    "gx": RNG.normal(size=(6, 1, 5)).astype(F),
    "g3": RNG.normal(size=(6, 1)).astype(F),
    "gl": RNG.normal(size=5).astype(F),
    "b": RNG.normal(size=(6, 1, 1)).astype(F),
    "spatial": np.array([2, 3]),
}
X, Y = "float[N,6,4,5] x", "float[N,6,4,5] y"


def make(nodes, *, opset=13, x=X, y=Y, **constants):
    known = {**CONSTANTS, **constants}
    text = f"g ({x}) => ({y}) {{ {nodes} }}"
    read = {name for node in onnx.parser.parse_graph(text).node for name in node.input}
    return model(text, opset=opset, ir_version=10, **{k: v for k, v in known.items() if k in read})


CORE = "m = ReduceMean<axes=[2,3]>(x) d = Sub(x, m) p = Mul(d, d) v = ReduceMean<axes=[-1,-2]>(p) "
CORE += "a = Add(v, e) s = Sqrt(a)"
AFFINE = "h = Mul(n, g) y = Add(h, b)"
FORMS = {
    "division": f"{CORE} n = Div(d, s) {AFFINE}",
    "reciprocal": f"{CORE} r = Reciprocal(s) n = Mul(d, r) {AFFINE}",
    "keras": f"{CORE} r = Reciprocal(s) q = Mul(r, g1) u = Mul(q, x) w = Mul(q, m) z = Sub(b, w) y = Add(u, z)",
    "pool": f"{CORE.replace('ReduceMean<axes=[2,3]>(x)', 'GlobalAveragePool(x)')} n = Div(d, s) {AFFINE}",
    "no scale": f"{CORE} n = Div(d, s) y = Add(n, b)",
    "no shift": f"{CORE} n = Div(d, s) y = Mul(n, g)",
    "scalar scale": f"{CORE} n = Div(d, s) y = Mul(gs, n)",
    "neither": f"{CORE} y = Div(d, s)",
}


@pytest.mark.parametrize("form", FORMS)
def test_fuses_every_form(form):
    before = make(FORMS[form])
    after, result = apply(FuseInstanceNormalization(), before)
    assert result.rewrites == 1 and ops(after) == ["InstanceNormalization"]
    assert [list(t.dims) for t in after.graph.initializer] == [[6], [6]]
    assert_equivalent(before, after, rel=1e-6, sizes={"N": 3})  # measured 1.7e-7


@pytest.mark.parametrize("opset", [7, 9, 11, 17])
def test_any_opset_has_the_operator(opset):
    before = make(FORMS["division"], opset=opset)
    after, result = apply(FuseInstanceNormalization(), before)
    assert result.rewrites == 1 and ops(after) == ["InstanceNormalization"]
    assert_equivalent(before, after, rel=8e-7)  # measured 9.4e-8


def test_axes_as_an_input():
    nodes = FORMS["division"].replace("ReduceMean<axes=[2,3]>(x)", "ReduceMean(x, spatial)")
    before = make(nodes.replace("ReduceMean<axes=[-1,-2]>(p)", "ReduceMean(p, spatial)"), opset=18)
    after, result = apply(FuseInstanceNormalization(), before)
    assert result.rewrites == 1 and ops(after) == ["InstanceNormalization"]
    assert_equivalent(before, after, rel=8e-7)  # measured 9.4e-8


def test_half_precision():
    constants = {k: v.astype(np.float16) for k, v in CONSTANTS.items() if v.dtype == F} | {"e": np.float16(1e-3)}
    before = make(FORMS["division"], x=f"float16{X[5:]}", y=f"float16{Y[5:]}", **constants)
    after, result = apply(FuseInstanceNormalization(), before)
    assert result.rewrites == 1 and ops(after) == ["InstanceNormalization"]
    assert_equivalent(before, after, rel=2e-3)  # two units of float16; measured 0


def test_casts_stay():
    nodes = f"x = Cast<to=1>(x0) {CORE} n = Div(d, s) y = Cast<to=10>(n)"
    before = make(nodes, x=f"float16{X[5:]}0", y=f"float16{Y[5:]}")
    after, result = apply(FuseInstanceNormalization(), before)
    assert result.rewrites == 1 and ops(after) == ["Cast", "InstanceNormalization", "Cast"]
    assert_equivalent(before, after, rel=2e-3)  # two units of float16; measured 0


CORE3 = (
    "m = ReduceMean<axes=[2]>(x) d = Sub(x, m) p = Pow(d, two) v = ReduceMean<axes=[2]>(p) a = Add(v, e) s = Sqrt(a)"
)
X3, Y3 = "float[N,6,5] x", "float[N,6,5] y"
LONG = {"x": "float[N,6,5000] x", "y": "float[N,6,5000] y"}


@pytest.mark.parametrize(
    ("nodes", "opset", "shapes"),
    [
        (f"{CORE3} n = Div(d, s) y = Mul(n, g3)", 17, {"x": X3, "y": Y3}),
        (f"{CORE3} y = Div(d, s)", 16, {"x": X3, "y": Y3}),
        (f"{CORE3} y = Div(d, s)", 17, LONG),
    ],
)
def test_three_axes(nodes, opset, shapes):
    before = make(nodes, opset=opset, **shapes)
    after, result = apply(FuseInstanceNormalization(), before)
    assert result.rewrites == 1 and ops(after) == ["InstanceNormalization"]
    assert_equivalent(before, after, rel=1e-6)  # measured 1.3e-7


LAYERS = {
    "scale along the last axis": (f"{CORE3} n = Div(d, s) y = Mul(n, gl)", {"opset": 13, "x": X3, "y": Y3}),
    "three axes without a scale": (f"{CORE3} y = Div(d, s)", {"opset": 17, "x": X3, "y": Y3}),
    "scale along the width": (f"{CORE} n = Div(d, s) y = Mul(n, gw)", {}),
    "scale along both": (f"{CORE} n = Div(d, s) y = Mul(n, gx)", {}),
}


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_normalization_is_left_alone(case):
    nodes, options = LAYERS[case]
    before = make(nodes, **options)
    after, result = apply(FuseInstanceNormalization(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert "LayerNormalization" in result.misses[0].reason


WHOLE = FORMS["division"]
NEAR_MISSES = {
    "vector epsilon": (WHOLE.replace("Add(v, e)", "Add(v, e6)"), {}, "epsilon"),
    "deviation is an output": (WHOLE, {"y": f"{Y}, float[N,6,4,5] d"}, "'d', which would go, is a model output"),
    "channels are not known": (f"{CORE} y = Div(d, s)", {"x": "float[N,C,4,5] x", "y": "float[N,C,4,5] y"}, "channels"),
    "scale in the ratio, along the width": (f"{CORE} r = Div(gw, s) y = Mul(d, r)", {}, "scale does not lie"),
    "shift along the width": (FORMS["keras"].replace("Sub(b, w)", "Sub(gw, w)"), {}, "shift does not lie"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_miss_is_left_alone(case):
    nodes, options, reason = NEAR_MISSES[case]
    before = make(nodes, **options)
    after, result = apply(FuseInstanceNormalization(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert len(result.misses) == 1 and reason in result.misses[0].reason
    assert_equivalent(before, after)


def test_double_is_left_alone():
    constants = {k: v.astype(np.float64) for k, v in CONSTANTS.items() if v.dtype == F}
    before = make(WHOLE, x="double[N,6,4,5] x", y="double[N,6,4,5] y", **constants)
    result = FuseInstanceNormalization().apply(graph_of(before))
    assert result.rewrites == 0 and "float64" in result.misses[0].reason


def test_a_sequence_of_unknown_length_is_another_thing():
    nodes = f"{CORE3} n = Div(d, s) y = Mul(n, gl)"
    before = make(nodes, x="float[N,T,5] x", y="float[N,T,5] y")
    after, result = apply(FuseInstanceNormalization(), before)
    assert result.rewrites == 0 and result.misses == [] and ops(after) == ops(before)


@pytest.mark.parametrize("axes", ["[1]", "[1,2,3]", "[3]", "[0,2,3]", "[2]"])
def test_other_axes_are_another_thing(axes):
    before = make(WHOLE.replace("[2,3]", axes).replace("[-1,-2]", axes))
    after, result = apply(FuseInstanceNormalization(), before)
    assert result.rewrites == 0 and result.misses == [] and ops(after) == ops(before)
