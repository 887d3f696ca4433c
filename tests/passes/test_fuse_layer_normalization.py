"""Decomposed LayerNormalization: the ways to write it, what is taken in, near misses."""

import numpy as np
import onnx
import pytest

from onnxcompress.passes.fuse_layer_normalization import FuseLayerNormalization
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops

F = np.float32
RNG = np.random.default_rng(0)
CONSTANTS = {
    "one": F(1),
    "two": F(2),
    "three": F(3),
    "half": F(0.5),
    "minus_half": F(-0.5),
    "eighth": F(1 / 8),
    "seventh": F(1 / 7),
    "eight": F(8),
    "e": F(1e-5),
    "e1": np.full(1, 1e-5, F),
    "e8": np.full(8, 1e-5, F),
    "minus_e": F(-1e-5),
    "g": RNG.normal(size=8).astype(F),
    "g3": RNG.normal(size=(1, 1, 8)).astype(F),
    "g4": RNG.normal(size=(1, 1, 1, 8)).astype(F),
    "gs": F(1.5),
    "gt": RNG.normal(size=(3, 1)).astype(F),
    "g38": RNG.normal(size=(3, 8)).astype(F),
    "b": RNG.normal(size=8).astype(F),
    "infinite": np.full(8, np.inf, F),
    "last": np.array([-1]),
    "two_last": np.array([1, 2]),
    "target": np.array([-1, 3, 1]),
}
X, Y = "float[N,3,8] x", "float[N,3,8] y"


def make(nodes, *, opset=17, x=X, y=Y, **constants):
    known = {**CONSTANTS, **constants}
    text = f"g ({x}) => ({y}) {{ {nodes} }}"
    read = {name for node in onnx.parser.parse_graph(text).node for name in node.input}
    return model(text, opset=opset, ir_version=10, **{k: v for k, v in known.items() if k in read})


DEVIATION = "m = ReduceMean<axes=[-1]>(x) d = Sub(x, m)"
VARIANCE = "p = Mul(d, d) v = ReduceMean<axes=[-1]>(p) a = Add(v, e)"
AFFINE = "h = Mul(n, g) y = Add(h, b)"
CORE = f"{DEVIATION} {VARIANCE} s = Sqrt(a)"
FORMS = {
    "pow": f"{DEVIATION} p = Pow(d, two) v = ReduceMean<axes=[2]>(p) a = Add(e, v) s = Sqrt(a) n = Div(d, s) {AFFINE}",
    "mul": f"{CORE} n = Div(d, s) h = Mul(g, n) y = Add(b, h)",
    "reciprocal": f"{CORE} r = Reciprocal(s) n = Mul(d, r) {AFFINE}",
    "one over": f"{CORE} r = Div(one, s) n = Mul(r, d) {AFFINE}",
    "power": f"{DEVIATION} {VARIANCE} r = Pow(a, minus_half) n = Mul(d, r) {AFFINE}",
    "root as power": f"{DEVIATION} {VARIANCE} s = Pow(a, half) n = Div(d, s) {AFFINE}",
    "scale in the ratio": f"{CORE} r = Reciprocal(s) q = Mul(r, g) h = Mul(d, q) y = Add(h, b)",
    "scale in the numerator": f"{CORE} q = Mul(g, d) h = Div(q, s) y = Add(h, b)",
    "two deviations": f"{CORE} m2 = ReduceMean<axes=[2]>(x) d2 = Sub(x, m2) n = Div(d2, s) {AFFINE}",
    "keras": f"{CORE} r = Reciprocal(s) q = Mul(r, g) u = Mul(x, q) w = Mul(m, q) z = Sub(b, w) y = Add(u, z)",
    "sums": f"""t = ReduceSum(x, last) m = Mul(t, eighth) d = Sub(x, m) p = Mul(d, d) u = ReduceSum(p, last)
        v = Div(u, eight) a = Add(v, e) s = Sqrt(a) n = Div(d, s) {AFFINE}""",
    "dropped axis": f"""{DEVIATION} p = Mul(d, d) u = ReduceMean<axes=[-1], keepdims=0>(p) v = Unsqueeze(u, last)
        a = Add(v, e) s = Sqrt(a) n = Div(d, s) {AFFINE}""",
    "reshaped": f"""{DEVIATION} p = Mul(d, d) u = ReduceMean<axes=[-1], keepdims=0>(p) v = Reshape(u, target)
        a = Add(v, e) s = Sqrt(a) n = Div(d, s) {AFFINE}""",
    "vector epsilon of one": f"""{DEVIATION} p = Mul(d, d) v = ReduceMean<axes=[-1]>(p) a = Add(v, e1) s = Sqrt(a)
        n = Div(d, s) h = Mul(n, g3) y = Add(h, b)""",
}


@pytest.mark.parametrize("form", FORMS)
def test_fuses_every_form(form):
    before = make(FORMS[form])
    after, result = apply(FuseLayerNormalization(), before)
    assert result.rewrites == 1 and ops(after) == ["LayerNormalization"]
    node = after.graph.node[0]
    assert node.input[0] == "x" and len(node.input) == 3
    assert_equivalent(before, after, rel=7e-7, sizes={"N": 3})  # measured 9.0e-8


@pytest.mark.parametrize(
    ("nodes", "left"),
    [
        (f"{CORE} y = Div(d, s)", []),
        (f"{CORE} n = Div(d, s) y = Add(n, b)", []),
        (f"{CORE} n = Div(d, s) y = Mul(n, gs)", []),
        (f"{CORE} n = Div(d, s) h = Mul(n, gs) y = Mul(h, g)", ["Mul"]),
        (f"{CORE} n = Div(d, s) y = Mul(n, gt)", ["Mul"]),
        (f"{CORE} n = Div(d, s) y = Mul(n, g38)", ["Mul"]),
        (f"{CORE} n = Div(d, s) h = Mul(n, t) y = Add(h, b)", ["Mul", "Add"]),
        (f"{CORE} q = Mul(half, d) n = Div(q, s) {AFFINE}", []),
    ],
)
def test_what_follows_is_taken_in_as_far_as_it_fits(nodes, left):
    before = make(nodes, x=f"{X}, float[8] t")
    after, result = apply(FuseLayerNormalization(), before)
    assert result.rewrites == 1 and ops(after) == ["LayerNormalization", *left]
    assert_equivalent(before, after, rel=1e-6)  # measured 1.4e-7


@pytest.mark.parametrize("opset", [17, 18, 22])
def test_several_axes(opset):
    mean = "ReduceMean<axes=[1, 2]>({})" if opset < 18 else "ReduceMean({}, two_last)"
    nodes = f"m = {mean.format('x')} d = Sub(x, m) p = Mul(d, d) v = {mean.format('p')} a = Add(v, e) s = Sqrt(a) "
    before = make(f"{nodes} n = Div(d, s) h = Mul(n, g38) y = Add(h, b)", opset=opset)
    after, result = apply(FuseLayerNormalization(), before)
    assert result.rewrites == 1 and ops(after) == ["LayerNormalization"]
    (axis,) = [a.i for a in after.graph.node[0].attribute if a.name == "axis"]
    assert axis == -2
    assert [list(t.dims) for t in after.graph.initializer] == [[3, 8], [3, 8]]
    assert_equivalent(before, after, rel=7e-7)  # measured 9.3e-8


def test_half_precision():
    constants = {k: v.astype(np.float16) for k, v in CONSTANTS.items() if v.dtype == F} | {"e": np.float16(1e-3)}
    x, y = "float16[N,3,8] x", "float16[N,3,8] y"
    before = make(FORMS["pow"], x=x, y=y, **constants)
    after, result = apply(FuseLayerNormalization(), before)
    assert result.rewrites == 1 and ops(after) == ["LayerNormalization"]
    assert_equivalent(before, after, rel=2e-3)  # two units of float16; measured 0


def test_casts_to_float32_and_back_are_the_operator_s_own():
    nodes = f"x = Cast<to=1>(x0) {CORE} n = Div(d, s) c = Cast<to=10>(n) h = Mul(c, g) y = Add(h, b)"
    halves = {k: CONSTANTS[k].astype(np.float16) for k in ("g", "b")}
    before = make(nodes, x="float16[N,3,8] x0", y="float16[N,3,8] y", **halves)
    after, result = apply(FuseLayerNormalization(), before)
    assert result.rewrites == 1 and ops(after) == ["LayerNormalization"]
    assert after.graph.node[0].input[0] == "x0"
    assert_equivalent(before, after, rel=2e-3)  # two units of float16; measured 0


def test_a_cast_that_others_read_stays_for_them():
    nodes = f"x = Cast<to=1>(x0) z = Relu(x) {CORE} n = Div(d, s) y = Cast<to=10>(n)"
    before = make(nodes, x="float16[N,3,8] x0", y="float16[N,3,8] y, float[N,3,8] z")
    after, result = apply(FuseLayerNormalization(), before)
    assert result.rewrites == 1 and sorted(ops(after)) == ["Cast", "LayerNormalization", "Relu"]
    assert_equivalent(before, after, rel=2e-3)  # two units of float16; measured 0


def test_scale_before_the_cast_keeps_its_precision():
    nodes = f"x = Cast<to=1>(x0) {CORE} n = Div(d, s) h = Mul(n, g) y = Cast<to=10>(h)"
    before = make(nodes, x="float16[N,3,8] x0", y="float16[N,3,8] y")
    after, result = apply(FuseLayerNormalization(), before)
    assert result.rewrites == 1 and ops(after) == ["Cast", "LayerNormalization", "Cast"]
    assert_equivalent(before, after, rel=2e-3)  # two units of float16; measured 0


def test_shared_scale_is_not_changed_for_the_other_reader():
    before = make(f"{CORE} n = Div(d, s) h = Mul(n, g) y = Add(h, b) z = Mul(x, g)", y=f"{Y}, float[N,3,8] z")
    after, result = apply(FuseLayerNormalization(), before)
    assert result.rewrites == 1 and ops(after) == ["LayerNormalization", "Mul"]
    assert_equivalent(before, after, rel=1e-6)  # measured 1.2e-7


def test_fuses_in_a_branch():
    body = FORMS["pow"].replace("y = Add", "r = Add")
    text = f"""y = If(c) <
        then_branch = t () => (float[N,3,8] r) {{ {body} }},
        else_branch = f () => (float[N,3,8] r2) {{ r2 = Neg(x) }}
    >"""
    names = ("two", "e", "g", "b")
    before = model(f"g ({X}, bool c) => ({Y}) {{ {text} }}", **{k: CONSTANTS[k] for k in names})
    after, result = apply(FuseLayerNormalization(), before)
    assert result.rewrites == 1
    then = next(a.g for a in after.graph.node[0].attribute if a.name == "then_branch")
    assert [node.op_type for node in then.node] == ["LayerNormalization"]
    feeds = [{"x": RNG.normal(size=(2, 3, 8)).astype(F), "c": np.array(flag)} for flag in (True, False)]
    assert_equivalent(before, after, rel=7e-7, feeds=feeds)  # measured 8.9e-8


WHOLE = FORMS["pow"]
NEAR_MISSES = {
    "opset": (WHOLE, {"opset": 16}, "needs opset 17, the model has 16"),
    "vector epsilon": (WHOLE.replace("Add(e, v)", "Add(e8, v)"), {}, "epsilon"),
    "epsilon is an input": (WHOLE.replace("Add(e, v)", "Add(t, v)"), {"x": f"{X}, float t"}, "epsilon"),
    "negative epsilon": (WHOLE.replace("Add(e, v)", "Add(minus_e, v)"), {}, "epsilon"),
    "deviation is an output": (WHOLE, {"y": f"{Y}, float[N,3,8] d"}, "'d', which would go, is a model output"),
    "variance is an output": (WHOLE, {"y": f"{Y}, float[N,3,1] v"}, "'v', which would go, is a model output"),
    "mean is read elsewhere": (f"{WHOLE} z = Relu(m)", {"y": f"{Y}, float[N,3,1] z"}, "'m', which would go, is read"),
    "size is not known": (WHOLE, {"x": "float[N,3,C] x", "y": "float[N,3,C] y"}, "sizes of the normalized axes"),
    "scale is not finite": (WHOLE.replace("Mul(n, g)", "Mul(n, infinite)"), {}, "not finite"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_miss_is_left_alone(case):
    nodes, options, reason = NEAR_MISSES[case]
    before = make(nodes, **options)
    after, result = apply(FuseLayerNormalization(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert len(result.misses) == 1 and reason in result.misses[0].reason
    if case != "epsilon is an input":
        assert_equivalent(before, after, sizes={"N": 2, "C": 8})


def test_double_is_left_alone():
    constants = {k: v.astype(np.float64) for k, v in CONSTANTS.items() if v.dtype == F}
    before = make(WHOLE, x="double[N,3,8] x", y="double[N,3,8] y", **constants)
    result = FuseLayerNormalization().apply(graph_of(before))
    assert result.rewrites == 0 and "float64" in result.misses[0].reason


OTHER_THINGS = {
    "mean of something else": WHOLE.replace("m = ReduceMean<axes=[-1]>(x)", "u = Abs(x) m = ReduceMean<axes=[-1]>(u)"),
    "square of something else": WHOLE.replace("Pow(d, two)", "Mul(d, x)"),
    "variance of something else": WHOLE.replace("p = Pow(d, two)", "u = Abs(d) p = Pow(u, two)"),
    "third power": WHOLE.replace("Pow(d, two)", "Pow(d, three)"),
    "mean over another axis": WHOLE.replace("m = ReduceMean<axes=[-1]>(x)", "m = ReduceMean<axes=[1]>(x)"),
    "variance over another axis": WHOLE.replace("ReduceMean<axes=[2]>(p)", "ReduceMean<axes=[1]>(p)"),
    "both over another axis": WHOLE.replace("axes=[2]", "axes=[1]").replace("axes=[-1]", "axes=[1]"),
    "numerator is x": WHOLE.replace("n = Div(d, s)", "n = Div(x, s)"),
    "turned about": WHOLE.replace("n = Div(d, s)", "n = Div(s, d)"),
    "mean minus x": WHOLE.replace("d = Sub(x, m)", "d = Sub(m, x)"),
    "root is not inverted": WHOLE.replace("n = Div(d, s)", "n = Mul(d, s)"),
    "no root": WHOLE.replace("s = Sqrt(a)", "s = Exp(a)"),
    "epsilon outside": WHOLE.replace("a = Add(e, v) s = Sqrt(a)", "a = Sqrt(v) s = Add(a, e)"),
    "unbiased": FORMS["sums"].replace("v = Div(u, eight)", "v = Mul(u, seventh)"),
    "maximum": WHOLE.replace("m = ReduceMean<axes=[-1]>(x)", "m = ReduceMax<axes=[-1]>(x)"),
    "keras with another ratio": FORMS["keras"].replace("w = Mul(m, q)", "w = Mul(m, r)"),
    "keras with another mean": FORMS["keras"].replace("w = Mul(m, q)", "w = Mul(v, q)"),
}


@pytest.mark.parametrize("case", OTHER_THINGS)
def test_another_thing_is_left_alone(case):
    before = make(OTHER_THINGS[case])
    after, result = apply(FuseLayerNormalization(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)


def test_a_dropped_axis_that_broadcasts_along_the_wrong_one():
    nodes = "m = ReduceMean<axes=[-1], keepdims=0>(x) d = Sub(x, m) p = Mul(d, d) "
    nodes += "v = ReduceMean<axes=[-1], keepdims=0>(p) a = Add(v, e) s = Sqrt(a) y = Div(d, s)"
    before = make(nodes, x="float[8,8] x", y="float[8,8] y")
    after, result = apply(FuseLayerNormalization(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)


def test_the_rank_is_not_known():
    before = make(WHOLE.replace("m = ", "x = Reshape(x0, shape) m = ", 1), x=f"{X}0, int64[K] shape")
    result = FuseLayerNormalization().apply(graph_of(before))
    assert result.rewrites == 0


def test_foreign_operator_of_the_same_name_is_left_alone():
    text = f"g ({X}) => ({Y}) {{ {WHOLE.replace('s = Sqrt', 's = ours.Sqrt')} }}"
    text = f'<ir_version: 8, opset_import: ["" : 17, "ours" : 1]> {text}'
    graph = graph_of(model(text, **{k: CONSTANTS[k] for k in ("two", "e", "g", "b")}))
    assert FuseLayerNormalization().apply(graph).rewrites == 0
