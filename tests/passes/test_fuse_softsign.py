"""Decomposed Softsign: forms, near misses."""

import numpy as np
import onnx
import pytest

from onnxcompress.passes.fuse_softsign import FuseSoftsign
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops

F = np.float32
CONSTANTS = {"one": F(1), "one1": np.ones(1, F), "two": F(2), "vector": np.ones(5, F)}
X, Y = "float[N,4,5] x", "float[N,4,5] y"


def make(nodes, *, opset=13, x=X, y=Y, **constants):
    known = {**CONSTANTS, **constants}
    text = f"g ({x}) => ({y}) {{ {nodes} }}"
    read = {name for node in onnx.parser.parse_graph(text).node for name in node.input}
    return model(text, opset=opset, ir_version=10, **{k: v for k, v in known.items() if k in read})


@pytest.mark.parametrize("total", ["Add(a, one)", "Add(one1, a)"])
@pytest.mark.parametrize("opset", [7, 13, 22])
def test_fuses(total, opset):
    before = make(f"a = Abs(x) s = {total} y = Div(x, s)", opset=opset)
    after, result = apply(FuseSoftsign(), before)
    assert result.rewrites == 1 and ops(after) == ["Softsign"]
    assert_equivalent(before, after, rel=7e-7, sizes={"N": 3})  # measured 8.5e-8


WHOLE = "a = Abs(x) s = Add(a, one) y = Div(x, s)"
NEAR_MISSES = {
    "plus 2": (WHOLE.replace("one", "two"), {}, "divided by 2 + 1 Abs(x)"),
    "magnitude is an output": (WHOLE, {"y": f"{Y}, float[N,4,5] a"}, "'a', which would go, is a model output"),
    "sum is read elsewhere": (f"{WHOLE} z = Neg(s)", {"y": f"{Y}, float[N,4,5] z"}, "'s', which would go, is read"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_miss_is_left_alone(case):
    nodes, options, reason = NEAR_MISSES[case]
    before = make(nodes, **options)
    after, result = apply(FuseSoftsign(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert len(result.misses) == 1 and reason in result.misses[0].reason
    assert_equivalent(before, after)


def test_double_has_no_kernel():
    before = make(WHOLE, x="double[4] x", y="double[4] y", one=np.float64(1))
    result = FuseSoftsign().apply(graph_of(before))
    assert result.rewrites == 0 and "float32 only" in result.misses[0].reason


@pytest.mark.parametrize(
    "nodes",
    [
        "a = Abs(x) s = Sub(a, one) y = Div(x, s)",
        "a = Abs(x) s = Sub(one, a) y = Div(x, s)",
        "a = Abs(x) s = Add(a, one) y = Div(s, x)",
        "z = Neg(x) a = Abs(z) s = Add(a, one) y = Div(x, s)",
        "a = Abs(x) s = Add(a, vector) y = Div(x, s)",
        "a = Relu(x) s = Add(a, one) y = Div(x, s)",
        "a = Abs(x) y = Div(x, a)",
    ],
)
def test_another_thing_is_left_alone(nodes):
    before = make(nodes)
    after, result = apply(FuseSoftsign(), before)
    assert result.rewrites == 0 and result.misses == [] and ops(after) == ops(before)
