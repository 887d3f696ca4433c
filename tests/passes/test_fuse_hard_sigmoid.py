"""Clip of a line as HardSigmoid: constants, opsets, near misses."""

import numpy as np
import onnx
import pytest

from onnxcompress.passes.fuse_hard_sigmoid import FuseHardSigmoid
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops

F = np.float32
VALUES = {
    "zero": 0,
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "half": 0.5,
    "fifth": 0.2,
    "tenth": 0.1,
}
CONSTANTS = {k: F(v) for k, v in VALUES.items()} | {
    "sixth": F(1 / 6),
    "minus_one": F(-1),
    "three1": np.full(1, 3, F),
    "three5": np.full((1, 1, 1, 1, 1), 3, F),
    "vector": np.full(8, 3, F),
}
X, Y = "float[N,3,4,8] x", "float[N,3,4,8] y"


def make(nodes, *, opset=13, x=X, y=Y, **constants):
    known = {**CONSTANTS, **constants}
    text = f"g ({x}) => ({y}) {{ {nodes} }}"
    read = {name for node in onnx.parser.parse_graph(text).node for name in node.input}
    return model(text, opset=opset, ir_version=10, **{k: v for k, v in known.items() if k in read})


def attributes(proto):
    return {a.name: a.f for a in proto.graph.node[-1].attribute}


FORMS = {
    "paddle": ("a = Add(x, three) c = Clip(a, zero, six) y = Div(c, six)", 1 / 6, 0.5),
    "times a sixth": ("a = Add(three1, x) c = Clip(a, zero, six) y = Mul(sixth, c)", 1 / 6, 0.5),
    "keras": ("m = Mul(x, fifth) a = Add(m, half) y = Clip(a, zero, one)", 0.2, 0.5),
    "slope alone": ("m = Mul(x, fifth) y = Clip(m, zero, one)", 0.2, 0),
    "offset alone": ("a = Add(x, half) y = Clip(a, zero, one)", 1, 0.5),
    "turned about": ("a = Sub(half, x) y = Clip(a, zero, one)", -1, 0.5),
    "two factors": ("a = Add(x, three) c = Clip(a, zero, six) d = Mul(c, half) y = Div(d, three)", 1 / 6, 0.5),
    "shifted range": ("m = Mul(x, two) c = Clip(m, minus_one, one) d = Add(c, one) y = Mul(d, half)", 1, 0.5),
}


@pytest.mark.parametrize("form", FORMS)
def test_fuses_every_form(form):
    nodes, alpha, beta = FORMS[form]
    before = make(nodes)
    after, result = apply(FuseHardSigmoid(), before)
    assert result.rewrites == 1 and result.misses == [] and ops(after) == ["HardSigmoid"]
    assert attributes(after) == pytest.approx({"alpha": alpha, "beta": beta}, rel=1e-6)
    assert_equivalent(before, after, rel=5e-7, sizes={"N": 5})  # measured 6.0e-8


@pytest.mark.parametrize(("opset", "clip"), [(7, "Clip<min=0.0, max=6.0>(a)"), (10, "Clip<min=0.0, max=6.0>(a)")])
def test_bounds_as_attributes(opset, clip):
    before = make(f"a = Add(x, three) c = {clip} y = Div(c, six)", opset=opset)
    after, result = apply(FuseHardSigmoid(), before)
    assert result.rewrites == 1 and ops(after) == ["HardSigmoid"]
    assert_equivalent(before, after, rel=6e-7)  # measured 7.1e-8


def test_half_precision():
    constants = {k: v.astype(np.float16) for k, v in CONSTANTS.items()}
    before = make(FORMS["paddle"][0], x=f"float16{X[5:]}", y=f"float16{Y[5:]}", **constants)
    after, result = apply(FuseHardSigmoid(), before)
    assert result.rewrites == 1 and ops(after) == ["HardSigmoid"]
    assert_equivalent(before, after, rel=2e-3)  # two units of float16; measured 0


def test_a_factor_before_is_taken_in_only_when_nothing_else_reads_it():
    line = "m = Mul(x, fifth) a = Add(m, three) c = Clip(a, zero, six) y = Div(c, six)"
    after, result = apply(FuseHardSigmoid(), make(line))
    assert result.rewrites == 1 and ops(after) == ["HardSigmoid"]
    before = make(f"{line} z = Neg(m)", y=f"{Y}, float[N,3,4,8] z")
    after, result = apply(FuseHardSigmoid(), before)
    assert result.rewrites == 1 and sorted(ops(after)) == ["HardSigmoid", "Mul", "Neg"]
    assert_equivalent(before, after, rel=1e-6)  # measured 1.1e-7


WHOLE = FORMS["paddle"][0]
NEAR_MISSES = {
    "divided by 5": (WHOLE.replace("Div(c, six)", "Div(c, five)"), {}, "the range is [0, 1.2], not [0, 1]"),
    "from 1 on": (WHOLE.replace("zero", "one"), {}, "the range is [0.1666667, 1], not [0, 1]"),
    "falling": (WHOLE.replace("y = Div(c", "d = Sub(six, c) y = Div(d"), {}, "the range is [1, 0], not [0, 1]"),
    "clip is an output": (WHOLE, {"y": f"{Y}, float[N,3,4,8] c"}, "'c', which would go, is a model output"),
    "sum is read elsewhere": (f"{WHOLE} z = Neg(a)", {"y": f"{Y}, float[N,3,4,8] z"}, "'a', which would go, is read"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_miss_is_left_alone(case):
    nodes, options, reason = NEAR_MISSES[case]
    before = make(nodes, **options)
    after, result = apply(FuseHardSigmoid(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert len(result.misses) == 1 and reason in result.misses[0].reason
    assert_equivalent(before, after)


OTHER_THINGS = {
    "nothing around": "y = Clip(x, zero, one)",
    "nothing before": "c = Clip(x, zero, six) y = Div(c, six)",
    "not scaled to 1": "a = Add(x, three) y = Clip(a, zero, six)",
    "relu": WHOLE.replace("Clip(a, zero, six)", "Relu(a)"),
    "no upper bound": WHOLE.replace("Clip(a, zero, six)", "Clip(a, zero)"),
    "no lower bound": WHOLE.replace("Clip(a, zero, six)", "Clip(a, , six)"),
    "vector": WHOLE.replace("three", "vector"),
    "adds axes": WHOLE.replace("three", "three5"),
    "bound is an input": WHOLE.replace("Clip(a, zero, six)", "Clip(a, zero, w)"),
    "turned about": "a = Add(x, three) c = Clip(a, one, six) y = Div(one, c)",
    "square": "a = Mul(x, x) y = Clip(a, zero, one)",
}


@pytest.mark.parametrize("case", OTHER_THINGS)
def test_another_thing_is_left_alone(case):
    y = "float[1,N,3,4,8] y" if case == "adds axes" else Y
    before = make(OTHER_THINGS[case], x=f"{X}, float w", y=y)
    after, result = apply(FuseHardSigmoid(), before)
    assert result.rewrites == 0 and result.misses == [] and ops(after) == ops(before)


def test_a_polynomial_in_the_clip_is_left_alone():
    before = make("a = Add(x, three) c = Clip(a, zero, two) h = Mul(c, half) q = Mul(c, c) y = Add(h, q)")
    after, result = apply(FuseHardSigmoid(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)


@pytest.mark.parametrize("kind", ["double", "int32"])
def test_types_without_the_operator(kind):
    dtype = {"double": np.float64, "int32": np.int32}[kind]
    constants = {k: v.astype(dtype) for k, v in CONSTANTS.items()}
    nodes = "a = Add(x, three) c = Sub(a, three) d = Add(c, three) y = Clip(d, zero, one)"
    before = make(nodes, x=f"{kind}{X[5:]}", y=f"{kind}{Y[5:]}", **constants)
    assert FuseHardSigmoid().apply(graph_of(before)).rewrites == 0
