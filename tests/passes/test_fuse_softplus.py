"""Softplus with a threshold: structure, bits around it, thresholds that matter."""

import numpy as np
import onnx
import pytest

from onnxcompress.passes.fuse_softplus import FuseSoftplus
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops

F = np.float32
CONSTANTS = {"t": F(20), "low": F(10), "below": F(-1), "vector": np.full(64, 20, F)}
X, Y = "float[N,64] x", "float[N,64] y"
WIDE = np.array([np.nan, np.inf, -np.inf, -0.0, *np.nextafter(F(20), F([0, 99])), *np.linspace(-110, 110, 58)], F)[None]


def make(nodes, *, opset=18, x=X, y=Y, **constants):
    known = {**CONSTANTS, **constants}
    text = f"g ({x}) => ({y}) {{ {nodes} }}"
    read = {name for node in onnx.parser.parse_graph(text).node for name in node.input}
    return model(text, opset=opset, ir_version=10, **{k: v for k, v in known.items() if k in read})


WHOLE = "s = Softplus(x) c = Greater(x, t) y = Where(c, x, s)"


@pytest.mark.parametrize("test", ["Greater", "GreaterOrEqual"])
def test_drops_the_threshold(test):
    before = make(WHOLE.replace("Greater", test))
    after, result = apply(FuseSoftplus(), before)
    assert result.rewrites == 1 and ops(after) == ["Softplus"]
    assert_equivalent(before, after, feeds=[{"x": WIDE}])


def test_half_precision_needs_the_threshold():
    before = make(WHOLE, x="float16[N,64] x", y="float16[N,64] y", t=np.float16(20))
    after, result = apply(FuseSoftplus(), before)
    assert result.rewrites == 0 and ops(after) == ops(before) and "float16" in result.misses[0].reason


NEAR_MISSES = {
    "threshold is low": (WHOLE.replace("t)", "low)"), {}, "threshold 10 in float32"),
    "threshold is negative": (WHOLE.replace("t)", "below)"), {}, "threshold -1 in float32"),
    "threshold is a vector": (WHOLE.replace("t)", "vector)"), {}, "not a constant scalar"),
    "threshold is an input": (WHOLE.replace("t)", "w)"), {"x": f"{X}, float w"}, "not a constant scalar"),
    "curve is an output": (WHOLE, {"y": f"{Y}, float[N,64] s"}, "'s', which would go, is a model output"),
    "test is read elsewhere": (f"{WHOLE} z = Not(c)", {"y": f"{Y}, bool[N,64] z"}, "'c', which would go, is read"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_miss_is_left_alone(case):
    nodes, options, reason = NEAR_MISSES[case]
    before = make(nodes, **options)
    after, result = apply(FuseSoftplus(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert len(result.misses) == 1 and reason in result.misses[0].reason
    assert_equivalent(before, after)


def test_double_needs_a_higher_threshold():
    before = make(WHOLE, x="double[N,64] x", y="double[N,64] y", t=np.float64(20))
    result = FuseSoftplus().apply(graph_of(before))
    assert result.rewrites == 0 and "threshold 20 in float64" in result.misses[0].reason


@pytest.mark.parametrize(
    "nodes",
    [
        "s = Softplus(x) c = Greater(x, t) y = Where(c, s, x)",
        "s = Softplus(x) c = Less(x, t) y = Where(c, x, s)",
        "s = Softplus(x) c = Greater(t, x) y = Where(c, x, s)",
        "z = Abs(x) s = Softplus(z) c = Greater(x, t) y = Where(c, x, s)",
        "z = Abs(x) s = Softplus(x) c = Greater(z, t) y = Where(c, x, s)",
        "z = Abs(x) s = Softplus(x) c = Greater(x, t) y = Where(c, z, s)",
        "s = Softsign(x) c = Greater(x, t) y = Where(c, x, s)",
    ],
)
def test_another_thing_is_left_alone(nodes):
    before = make(nodes)
    after, result = apply(FuseSoftplus(), before)
    assert result.rewrites == 0 and result.misses == [] and ops(after) == ops(before)
