"""LayerNormalization over the channels: forms, what is too small or too large, near misses."""

import numpy as np
import onnx
import pytest

from onnxcompress.passes.fuse_channel_layer_normalization import FuseChannelLayerNormalization
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops

F = np.float32
RNG = np.random.default_rng(0)
CONSTANTS = {
    "two": F(2),
    "e": F(1e-6),
    "e32": np.full((32, 1, 1), 1e-6, F),
    "g": RNG.normal(size=(32, 1, 1)).astype(F),
    "g5": RNG.normal(size=5).astype(F),
    "b": RNG.normal(size=(32, 1, 1)).astype(F),
    "g3": RNG.normal(size=(32, 1)).astype(F),
}
X, Y = "float[N,32,4,5] x", "float[N,32,4,5] y"


def make(nodes, *, opset=17, x=X, y=Y, **constants):
    known = {**CONSTANTS, **constants}
    text = f"g ({x}) => ({y}) {{ {nodes} }}"
    read = {name for node in onnx.parser.parse_graph(text).node for name in node.input}
    return model(text, opset=opset, ir_version=10, **{k: v for k, v in known.items() if k in read})


CORE = "m = ReduceMean<axes=[1]>(x) d = Sub(x, m) p = Pow(d, two) v = ReduceMean<axes=[1]>(p) a = Add(v, e) s = Sqrt(a)"
WHOLE = f"{CORE} n = Div(d, s) h = Mul(g, n) y = Add(h, b)"


@pytest.mark.parametrize(
    ("nodes", "left"),
    [
        (WHOLE, []),
        (f"{CORE} y = Div(d, s)", []),
        (f"{CORE} r = Reciprocal(s) n = Mul(d, r) y = Mul(g, n)", []),
        (f"{CORE} n = Div(d, s) y = Mul(n, g5)", ["Mul"]),
    ],
)
def test_fuses(nodes, left):
    before = make(nodes)
    after, result = apply(FuseChannelLayerNormalization(), before)
    assert result.rewrites == 1 and ops(after) == ["Transpose", "LayerNormalization", "Transpose", *left]
    assert_equivalent(before, after, rel=1e-6, sizes={"N": 3})  # measured 1.5e-7


@pytest.mark.parametrize(("size", "scale"), [("[N,32,7]", "g3"), ("[N,32,3,2,4]", "e")])
def test_one_and_three_spatial_axes(size, scale):
    before = make(f"{CORE} n = Div(d, s) y = Mul(n, {scale})", x=f"float{size} x", y=f"float{size} y")
    after, result = apply(FuseChannelLayerNormalization(), before)
    assert result.rewrites == 1 and ops(after) == ["Transpose", "LayerNormalization", "Transpose"]
    assert_equivalent(before, after, rel=2e-6)  # measured 2.3e-7


def test_two_in_a_row():
    second = "m2 = ReduceMean<axes=[1]>(z) d2 = Sub(z, m2) p2 = Pow(d2, two) v2 = ReduceMean<axes=[1]>(p2) "
    second += "a2 = Add(v2, e) s2 = Sqrt(a2)"
    before = make(f"{CORE} z = Div(d, s) {second} y = Div(d2, s2)")
    after, result = apply(FuseChannelLayerNormalization(), before)
    assert result.rewrites == 2 and ops(after).count("LayerNormalization") == 2
    assert_equivalent(before, after, rel=9e-7)  # measured 1.1e-7


NEAR_MISSES = {
    "opset": (WHOLE, {"opset": 16}, "needs opset 17, the model has 16"),
    "few channels": (f"{CORE} y = Div(d, s)", {"x": "float[N,31,4,5] x", "y": "float[N,31,4,5] y"}, "31 channels"),
    "large batch": (WHOLE, {"x": "float[2,32,14,15] x", "y": "float[2,32,14,15] y"}, "2 batches of 210 positions"),
    "channels are not known": (f"{CORE} y = Div(d, s)", {"x": "float[N,C,4,5] x", "y": "float[N,C,4,5] y"}, "channels"),
    "vector epsilon": (WHOLE.replace("Add(v, e)", "Add(v, e32)"), {}, "epsilon"),
    "deviation is an output": (WHOLE, {"y": f"{Y}, float[N,32,4,5] d"}, "'d', which would go, is a model output"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_miss_is_left_alone(case):
    nodes, options, reason = NEAR_MISSES[case]
    before = make(nodes, **options)
    after, result = apply(FuseChannelLayerNormalization(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert len(result.misses) == 1 and reason in result.misses[0].reason
    assert_equivalent(before, after)


@pytest.mark.parametrize("size", ["[1,32,14,15]", "[2,32,14,14]", "[N,32,14,15]"])
def test_the_largest_that_are_fused(size):
    before = make(WHOLE, x=f"float{size} x", y=f"float{size} y")
    _, result = apply(FuseChannelLayerNormalization(), before)
    assert result.rewrites == 1


def test_double_is_left_alone():
    constants = {k: v.astype(np.float64) for k, v in CONSTANTS.items() if v.dtype == F}
    before = make(WHOLE, x="double[N,32,4,5] x", y="double[N,32,4,5] y", **constants)
    result = FuseChannelLayerNormalization().apply(graph_of(before))
    assert result.rewrites == 0 and "float64" in result.misses[0].reason


@pytest.mark.parametrize(("axes", "size"), [("[2]", "[N,32,4,5]"), ("[1,2]", "[N,32,4,5]"), ("[1]", "[N,32]")])
def test_other_axes_are_another_thing(axes, size):
    nodes = f"{CORE} y = Div(d, s)".replace("[1]", axes)
    before = make(nodes, x=f"float{size} x", y=f"float{size} y")
    after, result = apply(FuseChannelLayerNormalization(), before)
    assert result.rewrites == 0 and result.misses == [] and ops(after) == ops(before)
