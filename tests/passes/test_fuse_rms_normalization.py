"""Decomposed RMSNormalization: forms, casts, near misses."""

import numpy as np
import onnx
import pytest

from onnxcompress.passes.fuse_rms_normalization import FuseRMSNormalization
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops

F = np.float32
RNG = np.random.default_rng(0)
CONSTANTS = {
    "one": F(1),
    "two": F(2),
    "three": F(3),
    "minus_half": F(-0.5),
    "e": F(1e-5),
    "e8": np.full(8, 1e-5, F),
    "g": RNG.normal(size=8).astype(F),
    "gs": F(np.sqrt(8)),
    "b": RNG.normal(size=8).astype(F),
    "last": np.array([-1]),
    "middle": np.array([1]),
    "two_last": np.array([1, 2]),
}
X, Y = "float[N,3,8] x", "float[N,3,8] y"


def make(nodes, *, opset=23, x=X, y=Y, **constants):
    known = {**CONSTANTS, **constants}
    text = f"g ({x}) => ({y}) {{ {nodes} }}"
    read = {name for node in onnx.parser.parse_graph(text).node for name in node.input}
    return model(text, opset=opset, ir_version=10, **{k: v for k, v in known.items() if k in read})


ROOT = "p = Pow(x, two) v = ReduceMean(p, last) a = Add(v, e) s = Sqrt(a)"
FORMS = {
    "reciprocal": f"{ROOT} r = Reciprocal(s) h = Mul(x, r) y = Mul(h, g)",
    "one over": f"{ROOT} r = Div(one, s) h = Mul(r, x) y = Mul(g, h)",
    "division": f"{ROOT} h = Div(x, s) y = Mul(h, g)",
    "power": "p = Mul(x, x) v = ReduceMean(p, last) a = Add(e, v) r = Pow(a, minus_half) h = Mul(x, r) y = Mul(h, g)",
    "scale in the ratio": f"{ROOT} r = Reciprocal(s) q = Mul(g, r) y = Mul(x, q)",
    "scale in the numerator": f"{ROOT} q = Mul(g, x) y = Div(q, s)",
    "scalar scale": f"{ROOT} h = Div(x, s) y = Mul(h, gs)",
    "no scale": f"{ROOT} y = Div(x, s)",
    "two axes": "p = Mul(x, x) v = ReduceMean(p, two_last) a = Add(v, e) s = Sqrt(a) h = Div(x, s) y = Mul(h, g)",
}


@pytest.mark.parametrize("form", FORMS)
def test_fuses_every_form(form):
    before = make(FORMS[form])
    after, result = apply(FuseRMSNormalization(), before)
    assert result.rewrites == 1 and ops(after) == ["RMSNormalization"]
    assert_equivalent(before, after, rel=1e-6, sizes={"N": 3})  # measured 1.8e-7


def test_there_is_no_shift():
    before = make(f"{FORMS['division'].replace('y =', 'z =')} y = Add(z, b)")
    after, result = apply(FuseRMSNormalization(), before)
    assert result.rewrites == 1 and ops(after) == ["RMSNormalization", "Add"]
    assert_equivalent(before, after, rel=2e-7)  # measured 0


def test_input_that_is_itself_a_product():
    before = make(f"x = Mul(x0, gs) {FORMS['reciprocal']}", x=f"{X}0")
    after, result = apply(FuseRMSNormalization(), before)
    assert result.rewrites == 1 and ops(after) == ["Mul", "RMSNormalization"]
    assert_equivalent(before, after, rel=7e-7)  # measured 9.2e-8


def test_casts_to_float32_and_back_are_the_operator_s_own():
    nodes = f"x = Cast<to=1>(x0) {ROOT} r = Reciprocal(s) h = Mul(x, r) c = Cast<to=10>(h) y = Mul(g, c)"
    before = make(nodes, x="float16[N,3,8] x0", y="float16[N,3,8] y", g=CONSTANTS["g"].astype(np.float16))
    after, result = apply(FuseRMSNormalization(), before)
    assert result.rewrites == 1 and ops(after) == ["RMSNormalization"]
    assert after.graph.node[0].input[0] == "x0"
    assert_equivalent(before, after, rel=2e-3)  # two units of float16; measured 0


WHOLE = FORMS["reciprocal"]
NEAR_MISSES = {
    "opset": (WHOLE, {"opset": 22}, "needs opset 23, the model has 22"),
    "vector epsilon": (WHOLE.replace("Add(v, e)", "Add(v, e8)"), {}, "epsilon"),
    "mean square is an output": (WHOLE, {"y": f"{Y}, float[N,3,1] v"}, "'v', which would go, is a model output"),
    "square is read elsewhere": (f"{WHOLE} z = Neg(p)", {"y": f"{Y}, float[N,3,8] z"}, "'p', which would go, is read"),
    "size is not known": (WHOLE, {"x": "float[N,3,C] x", "y": "float[N,3,C] y"}, "sizes of the normalized axes"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_miss_is_left_alone(case):
    nodes, options, reason = NEAR_MISSES[case]
    before = make(nodes, **options)
    after, result = apply(FuseRMSNormalization(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert len(result.misses) == 1 and reason in result.misses[0].reason
    assert_equivalent(before, after, sizes={"N": 2, "C": 8})


def test_double_is_left_alone():
    constants = {k: v.astype(np.float64) for k, v in CONSTANTS.items() if v.dtype == F}
    before = make(WHOLE, x="double[N,3,8] x", y="double[N,3,8] y", **constants)
    result = FuseRMSNormalization().apply(graph_of(before))
    assert result.rewrites == 0 and "float64" in result.misses[0].reason


OTHER_THINGS = {
    "third power": WHOLE.replace("Pow(x, two)", "Pow(x, three)"),
    "square of something else": f"z = Abs(x) {WHOLE.replace('Pow(x, two)', 'Pow(z, two)')}",
    "another axis": WHOLE.replace("last", "middle"),
    "root is not inverted": WHOLE.replace("r = Reciprocal(s)", "r = Neg(s)"),
    "x twice": WHOLE.replace("h = Mul(x, r)", "w = Mul(x, x) h = Mul(w, r)"),
    "layer normalization": "m = ReduceMean(x, last) d = Sub(x, m) p = Mul(d, d) v = ReduceMean(p, last) a = Add(v, e) "
    "s = Sqrt(a) y = Div(d, s)",
}


@pytest.mark.parametrize("case", OTHER_THINGS)
def test_another_thing_is_left_alone(case):
    before = make(OTHER_THINGS[case])
    after, result = apply(FuseRMSNormalization(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
