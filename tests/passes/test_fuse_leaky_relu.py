"""LeakyRelu written with Max or Min: structure, bits with infinities and NaN, near misses."""

import numpy as np
import onnx
import pytest

from onnxcompress.passes.fuse_leaky_relu import FuseLeakyRelu
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops

F = np.float32
CONSTANTS = {
    "tenth": F(0.1),
    "tenth1": np.full(1, 0.1, F),
    "tenth5": np.full((1, 1, 1, 1, 1), 0.1, F),
    "ten": F(10),
    "zero": F(0),
    "minus": F(-0.1),
    "vector": np.full(5, 0.1, F),
    "quarter": F(0.25),
}
X, Y = "float[N,3,4,5] x", "float[N,3,4,5] y"
SPECIAL = np.resize(
    np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 3.4e38, -3.4e38, 1e-45, -1e-45, 2, -2], F), (1, 3, 4, 5)
)


def make(nodes, *, opset=13, x=X, y=Y, **constants):
    known = {**CONSTANTS, **constants}
    text = f"g ({x}) => ({y}) {{ {nodes} }}"
    read = {name for node in onnx.parser.parse_graph(text).node for name in node.input}
    return model(text, opset=opset, ir_version=10, **{k: v for k, v in known.items() if k in read})


@pytest.mark.parametrize(
    ("nodes", "alpha"),
    [
        ("m = Mul(x, tenth) y = Max(x, m)", 0.1),
        ("m = Mul(tenth1, x) y = Max(m, x)", 0.1),
        ("m = Mul(x, ten) y = Min(x, m)", 10),
    ],
)
@pytest.mark.parametrize("opset", [8, 13])
def test_fuses(nodes, alpha, opset):
    before = make(nodes, opset=opset)
    after, result = apply(FuseLeakyRelu(), before)
    assert result.rewrites == 1 and ops(after) == ["LeakyRelu"]
    assert [a.f for a in after.graph.node[0].attribute] == pytest.approx([alpha])
    assert_equivalent(before, after, sizes={"N": 3})
    assert_equivalent(before, after, feeds=[{"x": SPECIAL}])


def test_division_is_a_slope_too():
    before = make("m = Div(x, ten) y = Max(x, m)")
    after, result = apply(FuseLeakyRelu(), before)
    assert result.rewrites == 1 and ops(after) == ["LeakyRelu"]
    assert_equivalent(before, after, rel=6e-8)  # measured 7.5e-9


def test_half_precision():
    before = make("m = Mul(x, tenth) y = Max(x, m)", x=f"float16{X[5:]}", y=f"float16{Y[5:]}", tenth=np.float16(0.1))
    after, result = apply(FuseLeakyRelu(), before)
    assert result.rewrites == 1 and ops(after) == ["LeakyRelu"]
    assert_equivalent(before, after)


WHOLE = "m = Mul(x, tenth) y = Max(x, m)"
NEAR_MISSES = {
    "the smaller": ("m = Mul(x, tenth) y = Min(x, m)", {}, "Min of x and 0.1 x"),
    "steep": ("m = Mul(x, ten) y = Max(x, m)", {}, "Max of x and 10 x"),
    "negative slope": ("m = Mul(x, minus) y = Max(x, m)", {}, "-0.1 x"),
    "product is an output": (WHOLE, {"y": f"{Y}, float[N,3,4,5] m"}, "'m', which would go, is a model output"),
    "product is read elsewhere": (
        f"{WHOLE} z = Neg(m)",
        {"y": f"{Y}, float[N,3,4,5] z"},
        "'m', which would go, is read",
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_miss_is_left_alone(case):
    nodes, options, reason = NEAR_MISSES[case]
    before = make(nodes, **options)
    after, result = apply(FuseLeakyRelu(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert len(result.misses) == 1 and reason in result.misses[0].reason
    assert_equivalent(before, after)


OTHER_THINGS = {
    "slope 0": "m = Mul(x, zero) y = Max(x, m)",
    "of something else": "z = Abs(x) m = Mul(x, tenth) y = Max(z, m)",
    "vector": "m = Mul(x, vector) y = Max(x, m)",
    "three": "z = Abs(x) m = Mul(x, tenth) y = Max(x, m, z)",
    "slope is an input": "m = Mul(x, w) y = Max(x, m)",
    "offset": "m = Mul(x, tenth) k = Add(m, tenth) y = Max(x, k)",
    "x itself": "y = Max(x, x)",
}


@pytest.mark.parametrize("case", OTHER_THINGS)
def test_another_thing_is_left_alone(case):
    before = make(OTHER_THINGS[case], x=f"{X}, float w")
    after, result = apply(FuseLeakyRelu(), before)
    assert result.rewrites == 0 and result.misses == [] and ops(after) == ops(before)


def test_a_constant_that_adds_axes():
    before = make("m = Mul(x, tenth5) y = Max(x, m)", y="float[1,N,3,4,5] y")
    assert FuseLeakyRelu().apply(graph_of(before)).rewrites == 0


@pytest.mark.parametrize(("opset", "slope", "rewrites"), [(16, 0.25, 1), (16, 0.1, 0), (15, 0.25, 0)])
def test_double_only_with_a_slope_that_float32_holds(opset, slope, rewrites):
    before = make(WHOLE, opset=opset, x=f"double{X[5:]}", y=f"double{Y[5:]}", tenth=np.float64(slope))
    after, result = apply(FuseLeakyRelu(), before)
    assert result.rewrites == rewrites and len(result.misses) == 1 - rewrites
    assert_equivalent(before, after)


def test_integers_are_left_alone():
    before = make("m = Mul(x, ten) y = Min(x, m)", x=f"int32{X[5:]}", y=f"int32{Y[5:]}", ten=np.int32(10))
    after, result = apply(FuseLeakyRelu(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
