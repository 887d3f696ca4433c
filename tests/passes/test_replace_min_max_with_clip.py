"""Max and Min with a constant: the operators they become, infinities and NaN, near misses."""

import numpy as np
import onnx
import pytest

from onnxcompress.passes.fuse_clip_chain import FuseClipChain
from onnxcompress.passes.replace_min_max_with_clip import ReplaceMinMaxWithClip
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops

F = np.float32
CONSTANTS = {
    "zero": F(0),
    "one": F(1),
    "six": F(6),
    "six1": np.full(1, 6, F),
    "six5": np.full((1, 1, 1, 1, 1), 6, F),
    "nan": F(np.nan),
    "vector": np.full(5, 6, F),
}
X, Y = "float[N,3,4,5] x", "float[N,3,4,5] y"
SPECIAL = np.resize(
    np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 3.4e38, -3.4e38, 1e-45, -1e-45, 7, -2], F), (1, 3, 4, 5)
)


def make(nodes, *, opset=13, x=X, y=Y, **constants):
    known = {**CONSTANTS, **constants}
    text = f"g ({x}) => ({y}) {{ {nodes} }}"
    read = {name for node in onnx.parser.parse_graph(text).node for name in node.input}
    return model(text, opset=opset, ir_version=10, **{k: v for k, v in known.items() if k in read})


@pytest.mark.parametrize("opset", [8, 10, 11, 12, 13])
@pytest.mark.parametrize(
    ("nodes", "made"),
    [
        ("y = Max(x, zero)", ["Relu"]),
        ("y = Max(zero, x)", ["Relu"]),
        ("y = Max(x, one)", ["Clip"]),
        ("y = Min(six1, x)", ["Clip"]),
        ("y = Min(x, zero)", ["Clip"]),
        ("m = Max(x, zero) y = Min(m, six)", ["Relu", "Clip"]),
        ("m = Min(x, zero) y = Max(m, six)", ["Clip", "Clip"]),
    ],
)
def test_replaces(nodes, made, opset):
    before = make(nodes, opset=opset)
    after, result = apply(ReplaceMinMaxWithClip(), before)
    assert result.rewrites == len(made) and ops(after) == made
    assert_equivalent(before, after, sizes={"N": 3})  # bitwise but for the sign of zero
    assert_equivalent(before, after, feeds=[{"x": SPECIAL}])


def test_two_become_one_clip():
    before = make("m = Max(x, one) y = Min(m, six)")
    between, _ = apply(ReplaceMinMaxWithClip(), before)
    after, _ = apply(FuseClipChain(), between)
    assert ops(after) == ["Clip"]
    assert_equivalent(before, after, feeds=[{"x": SPECIAL}])


@pytest.mark.parametrize("kind", ["double", "float16"])
def test_other_types(kind):
    dtype = {"double": np.float64, "float16": np.float16}[kind]
    constants = {k: v.astype(dtype) for k, v in CONSTANTS.items()}
    before = make("m = Max(x, one) y = Min(m, six)", x=f"{kind}{X[5:]}", y=f"{kind}{Y[5:]}", **constants)
    after, result = apply(ReplaceMinMaxWithClip(), before)
    assert result.rewrites == 2 and ops(after) == ["Clip", "Clip"]
    with np.errstate(over="ignore"):
        assert_equivalent(before, after, feeds=[{"x": SPECIAL.astype(dtype)}])


def test_double_has_no_clip_in_old_opsets():
    before = make("y = Max(x, one)", opset=11, x=f"double{X[5:]}", y=f"double{Y[5:]}", one=np.float64(1))
    result = ReplaceMinMaxWithClip().apply(graph_of(before))
    assert result.rewrites == 0 and "opset 12" in result.misses[0].reason


def test_model_outputs_keep_their_names():
    before = make("m = Max(x, one) y = Min(m, six)", y=f"{Y}, float[N,3,4,5] m")
    after, result = apply(ReplaceMinMaxWithClip(), before)
    assert result.rewrites == 2 and [v.name for v in after.graph.output] == ["y", "m"]
    assert_equivalent(before, after)


@pytest.mark.parametrize(
    "nodes",
    [
        "z = Abs(x) y = Max(x, z)",
        "y = Max(x, vector)",
        "y = Max(x, nan)",
        "y = Max(x, w)",
        "y = Max(x, one, six)",
        "y = Max(x)",
    ],
)
def test_another_thing_is_left_alone(nodes):
    before = make(nodes, x=f"{X}, float w")
    after, result = apply(ReplaceMinMaxWithClip(), before)
    assert result.rewrites == 0 and result.misses == [] and ops(after) == ops(before)


def test_a_constant_that_adds_axes():
    before = make("y = Max(x, six5)", y="float[1,N,3,4,5] y")
    assert ReplaceMinMaxWithClip().apply(graph_of(before)).rewrites == 0


def test_integers_are_left_alone():
    before = make("y = Max(x, one)", x=f"int64{X[5:]}", y=f"int64{Y[5:]}", one=np.int64(1))
    after, result = apply(ReplaceMinMaxWithClip(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
