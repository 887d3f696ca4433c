"""Decomposed Mish: structure, bits, near misses."""

import pytest

from onnxcompress.passes.fuse_mish import FuseMish
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops

X, Y = "float[N,4,5] x", "float[N,4,5] y"
GATE = "s = Softplus(x) t = Tanh(s)"


def make(nodes, *, opset=18, x=X, y=Y):
    return model(f"g ({x}) => ({y}) {{ {nodes} }}", opset=opset, ir_version=10)


@pytest.mark.parametrize("product", ["Mul(x, t)", "Mul(t, x)"])
@pytest.mark.parametrize("kind", ["float", "float16"])
def test_fuses(product, kind):
    before = make(f"{GATE} y = {product}", x=f"{kind}[N,4,5] x", y=f"{kind}[N,4,5] y")
    after, result = apply(FuseMish(), before)
    assert result.rewrites == 1 and ops(after) == ["Mish"]
    assert_equivalent(before, after)


def test_two_in_a_row():
    before = make(f"{GATE} z = Mul(x, t) s2 = Softplus(z) t2 = Tanh(s2) y = Mul(t2, z)")
    after, result = apply(FuseMish(), before)
    assert result.rewrites == 2 and ops(after) == ["Mish", "Mish"]
    assert_equivalent(before, after)


WHOLE = f"{GATE} y = Mul(x, t)"
NEAR_MISSES = {
    "opset": (WHOLE, {"opset": 17}, "needs opset 18, the model has 17"),
    "softplus is an output": (WHOLE, {"y": f"{Y}, float[N,4,5] s"}, "'s', which would go, is a model output"),
    "gate is read elsewhere": (f"{WHOLE} z = Neg(t)", {"y": f"{Y}, float[N,4,5] z"}, "'t', which would go, is read"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_miss_is_left_alone(case):
    nodes, options, reason = NEAR_MISSES[case]
    before = make(nodes, **options)
    after, result = apply(FuseMish(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert len(result.misses) == 1 and reason in result.misses[0].reason
    assert_equivalent(before, after)


def test_double_has_no_kernel():
    result = FuseMish().apply(graph_of(make(WHOLE, x="double[4] x", y="double[4] y")))
    assert result.rewrites == 0 and "Softplus" in result.misses[0].reason


@pytest.mark.parametrize(
    "nodes",
    [
        "s = Softplus(x) t = Sigmoid(s) y = Mul(x, t)",
        "s = Softsign(x) t = Tanh(s) y = Mul(x, t)",
        f"{GATE} z = Abs(x) y = Mul(z, t)",
        f"{GATE} y = Add(x, t)",
    ],
)
def test_another_thing_is_left_alone(nodes):
    before = make(nodes)
    after, result = apply(FuseMish(), before)
    assert result.rewrites == 0 and result.misses == [] and ops(after) == ops(before)


def test_foreign_operator_of_the_same_name_is_left_alone():
    text = f'<ir_version: 9, opset_import: ["" : 18, "ours" : 1]> g ({X}) => ({Y}) {{ {WHOLE} }}'
    graph = graph_of(model(text.replace("Tanh", "ours.Tanh")))
    assert FuseMish().apply(graph).rewrites == 0
