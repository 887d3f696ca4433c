"""Decomposed Gelu: the order of operands, where constants may stand, near misses."""

import math

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.passes.fuse_gelu import FuseGelu
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops

F = np.float32
CONSTANTS = {
    "half": F(0.5),
    "one": F(1),
    "two": F(2),
    "three": F(3),
    "root": F(math.sqrt(2)),
    "inverse": F(math.sqrt(0.5)),
    "half1": np.full(1, 0.5, F),
    "half5": np.full((1, 1, 1, 1, 1), 0.5, F),
    "c": F(0.044715),
    "k": F(math.sqrt(2 / math.pi)),
    "kc": F(math.sqrt(2 / math.pi) * 0.044715),
    "seven_tenths": F(0.7),
    "short_inverse": F(0.7071),
    "wrong_c": F(0.0447),
    "vector": np.full(8, 0.5, F),
}
X, Y = "float[N,3,8] x", "float[N,3,8] y"


def make(nodes, *, opset=20, x=X, y=Y, **constants):
    known = {**CONSTANTS, **constants}
    text = f"g ({x}) => ({y}) {{ {nodes} }}"
    read = {name for node in onnx.parser.parse_graph(text).node for name in node.input}
    return model(text, opset=opset, ir_version=10, **{k: v for k, v in known.items() if k in read})


ERF = "d = Div(x, root) e = Erf(d) a = Add(e, one)"
TANH = "p = Pow(x, three) q = Mul(p, c) s = Add(x, q) u = Mul(s, k) t = Tanh(u) a = Add(t, one)"
FORMS = {
    "torch": f"{ERF} h = Mul(x, a) y = Mul(h, half)",
    "half first": f"z = Mul(x, half) {ERF} y = Mul(z, a)",
    "half on the curve": f"{ERF} z = Mul(half, a) y = Mul(x, z)",
    "halved": f"{ERF} h = Mul(a, x) y = Div(h, two)",
    "multiplied inside": "d = Mul(inverse, x) e = Erf(d) a = Add(one, e) h = Mul(x, a) y = Mul(half1, h)",
    "distributed": "d = Div(x, root) e = Erf(d) f = Mul(e, half) a = Add(f, half) y = Mul(x, a)",
    "tanh": f"{TANH} z = Mul(x, half) y = Mul(z, a)",
    "tanh, torch": "p = Mul(x, x) r = Mul(x, p) q = Mul(c, r) s = Add(x, q) u = Mul(k, s) t = Tanh(u) a = Add(one, t) "
    "h = Mul(x, a) y = Mul(half, h)",
    "tanh, keras": "q = Mul(c, x) r = Mul(x, q) v = Mul(x, r) s = Add(x, v) u = Mul(k, s) t = Tanh(u) a = Add(t, one) "
    "b = Mul(half, a) y = Mul(x, b)",
    "tanh, factored": "p = Mul(x, x) q = Mul(p, kc) r = Add(q, k) u = Mul(x, r) t = Tanh(u) a = Add(t, one) "
    "h = Mul(x, a) y = Mul(h, half)",
}


@pytest.mark.parametrize("form", FORMS)
def test_fuses_every_form(form):
    before = make(FORMS[form])
    after, result = apply(FuseGelu(), before)
    assert result.rewrites == 1 and ops(after) == ["Gelu"]
    (approximate,) = [a.s for a in after.graph.node[0].attribute]
    assert approximate == (b"tanh" if "tanh" in form else b"none")
    assert_equivalent(before, after, rel=6e-7, sizes={"N": 5})  # measured 7.1e-8


def test_input_that_is_itself_scaled():
    before = make(f"x = Mul(x0, half) {FORMS['torch']} z = Add(y, x)", x=f"{X}0", y="float[N,3,8] z")
    after, result = apply(FuseGelu(), before)
    assert result.rewrites == 1 and ops(after) == ["Mul", "Gelu", "Add"]
    assert_equivalent(before, after, rel=5e-7)  # measured 6.1e-8


def test_a_factor_that_follows_stays():
    before = make(f"{FORMS['torch'].replace('y =', 'z =')} y = Mul(z, three)")
    after, result = apply(FuseGelu(), before)
    assert result.rewrites == 1 and ops(after) == ["Gelu", "Mul"]
    assert_equivalent(before, after, rel=2e-7)  # measured 2.4e-8


@pytest.mark.parametrize("form", ["torch", "tanh"])
def test_half_precision(form):
    constants = {k: v.astype(np.float16) for k, v in CONSTANTS.items()}
    before = make(FORMS[form], x="float16[N,3,8] x", y="float16[N,3,8] y", **constants)
    after, result = apply(FuseGelu(), before)
    assert result.rewrites == 1 and ops(after) == ["Gelu"]
    assert_equivalent(before, after, rel=2e-3)  # measured 5.1e-4


def doubles():
    values = {"k": math.sqrt(2 / math.pi), "c": 0.044715, "inverse": math.sqrt(0.5), "root": math.sqrt(2)}
    return {k: np.float64(values.get(k, float(v))) for k, v in CONSTANTS.items() if v.ndim == 0}


@pytest.mark.parametrize("form", ["torch", "tanh"])
def test_double_is_left_alone(form):
    before = make(FORMS[form], x="double[N,3,8] x", y="double[N,3,8] y", **doubles())
    result = FuseGelu().apply(graph_of(before))
    assert result.rewrites == 0 and "float64" in result.misses[0].reason


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_order(data):
    """0.5 * x * (1 + Erf(x / sqrt(2))) with the constants spread over the factors and all operands in any order."""

    def call(op, a, b):
        return f"{op}({', '.join(data.draw(st.permutations([a, b])))})"

    first, second = data.draw(st.sampled_from([0.25, 0.75])), data.draw(st.sampled_from([3.0, 5.0]))
    weights = {"w1": F(first), "w2": F(second), "w3": F(0.5 / first / second), "s1": F(second)}
    weights |= {"one": F(1), "s2": F(math.sqrt(0.5) / second)}
    nodes = f"u1 = {call('Mul', 'x', 's1')} u2 = {call('Mul', 'u1', 's2')} e = Erf(u2) "
    nodes += f"a1 = {call('Add', 'e', 'one')} a2 = {call('Mul', 'a1', 'w1')} "
    if data.draw(st.booleans()):
        nodes += f"v1 = {call('Mul', 'x', 'w2')} v2 = {call('Mul', 'v1', 'a2')} "
    else:
        nodes += f"v1 = {call('Mul', 'x', 'a2')} v2 = {call('Mul', 'v1', 'w2')} "
    nodes += f"y = {call('Mul', 'v2', 'w3')}"
    before = make(nodes, **weights)
    after, result = apply(FuseGelu(), before)
    assert result.rewrites == 1 and ops(after) == ["Gelu"]
    assert_equivalent(before, after, rel=1e-6)  # measured 1.2e-7


WHOLE = FORMS["torch"]
NEAR_MISSES = {
    "opset": (WHOLE, {"opset": 19}, "needs opset 20, the model has 19"),
    "0.7 for 1 / sqrt(2)": (FORMS["multiplied inside"].replace("inverse", "seven_tenths"), {}, "Erf is of 0.7 x"),
    "0.7071 for 1 / sqrt(2)": (FORMS["multiplied inside"].replace("inverse", "short_inverse"), {}, "Erf is of 0.7071"),
    "0.0447 for 0.044715": (FORMS["tanh"].replace("Mul(p, c)", "Mul(p, wrong_c)"), {}, "Tanh is of"),
    "not halved": (f"{ERF} y = Mul(x, a)", {}, "1 x + 1 x Erf"),
    "difference": (WHOLE.replace("a = Add(e, one)", "a = Sub(e, one)"), {}, "it is -0.5 x + 0.5 x Erf"),
    "multiplied by 0.7": (WHOLE.replace("half", "seven_tenths"), {}, "it is 0.7 x"),
    "curve is an output": (WHOLE, {"y": f"{Y}, float[N,3,8] e"}, "'e', which would go, is a model output"),
    "sum is read elsewhere": (f"{WHOLE} z = Neg(a)", {"y": f"{Y}, float[N,3,8] z"}, "'a', which would go, is read"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_miss_is_left_alone(case):
    nodes, options, reason = NEAR_MISSES[case]
    before = make(nodes, **options)
    after, result = apply(FuseGelu(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert len(result.misses) == 1 and reason in result.misses[0].reason
    assert_equivalent(before, after)


NOT_HALVED = {
    "vector": WHOLE.replace("half", "vector"),
    "constant is an input": WHOLE.replace("half", "w"),
    "adds axes": WHOLE.replace("half", "half5"),
}


@pytest.mark.parametrize("case", NOT_HALVED)
def test_what_is_halved_by_no_scalar_is_left_alone(case):
    y = "float[1,1,N,3,8] y" if case == "adds axes" else Y
    before = make(NOT_HALVED[case], x=f"{X}, float w", y=y)
    after, result = apply(FuseGelu(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert [miss.reason for miss in result.misses] == ["it is 1 x + 1 x Erf, not 0.5 x + 0.5 x Erf"]


OTHER_THINGS = {
    "another factor": f"z = Abs(x) {ERF} h = Mul(z, a) y = Mul(h, half)",
    "square": TANH.replace("three", "two") + " h = Mul(x, a) y = Mul(h, half)",
    "root of x below": WHOLE.replace("Div(x, root)", "Div(root, x)"),
}


@pytest.mark.parametrize("case", OTHER_THINGS)
def test_another_thing_is_left_alone(case):
    before = make(OTHER_THINGS[case])
    after, result = apply(FuseGelu(), before)
    assert result.rewrites == 0 and result.misses == [] and ops(after) == ops(before)


def test_a_type_that_is_not_known_is_left_alone():
    text = f"""<ir_version: 9, opset_import: ["" : 20, "ours" : 1]>
    g ({X}0) => ({Y}) {{ x = ours.Thing(x0) {WHOLE} }}"""
    graph = graph_of(model(text, **{k: CONSTANTS[k] for k in ("root", "one", "half")}))
    assert FuseGelu().apply(graph).rewrites == 0


def test_scalar_of_rank_1_beside_a_tensor_of_unknown_rank():
    before = make(f"x = Reshape(x0, shape) {FORMS['torch'].replace('half', 'half1')}", x=f"{X}0, int64[K] shape")
    assert FuseGelu().apply(graph_of(before)).rewrites == 0
    before = make(f"x = Reshape(x0, shape) {FORMS['torch']}", x=f"{X}0, int64[K] shape")
    assert FuseGelu().apply(graph_of(before)).rewrites == 1


def test_foreign_operator_of_the_same_name_is_left_alone():
    text = f"g ({X}) => ({Y}) {{ {WHOLE.replace('e = Erf', 'e = ours.Erf')} }}"
    text = f'<ir_version: 9, opset_import: ["" : 20, "ours" : 1]> {text}'
    graph = graph_of(model(text, **{k: CONSTANTS[k] for k in ("root", "one", "half")}))
    assert FuseGelu().apply(graph).rewrites == 0
