"""Identity: dropped wherever no name of an output needs it."""

import pytest

from onnxcompress.passes.eliminate_identity import EliminateIdentity
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("g (float[N] x) => (float[N] y) { a = Identity(x) y = Relu(a) }", ["Relu"]),
        ("g (float[N] x) => (float[N] y) { a = Relu(x) y = Identity(a) }", ["Relu"]),
        ("g (float[N] x) => (float[N] y, float[N] z) { a = Relu(x) y = Identity(a) z = Neg(a) }", ["Relu", "Neg"]),
        ("g (float[N] x) => (float[N] y) { a = Identity(x) b = Identity(a) c = Identity(b) y = Neg(c) }", ["Neg"]),
        ("g (float[1] x) => (float[1] y) <float[1] c = {2}> { a = Identity(c) y = Add(x, a) }", ["Add"]),
        ("g (float[N] x) => (float[N] y) { a = Relu(x) b = Identity(a) y = Add(a, b) }", ["Relu", "Add"]),
    ],
)
def test_drops(text, left):
    before = model(text)
    after, result = apply(EliminateIdentity(), before)
    assert result.rewrites == len(before.graph.node) - len(left) and ops(after) == left
    assert_equivalent(before, after)


def test_a_branch_reads_the_outer_tensor():
    before = model("""g (bool b, float[N] x) => (float[N] y) {
        a = Identity(x)
        y = If (b) <then_branch = t () => (float[N] p) { p = Neg(a) },
                    else_branch = e () => (float[N] q) { c = Identity(a) q = Abs(c) }>
    }""")
    after, result = apply(EliminateIdentity(), before)
    assert result.rewrites == 2 and ops(after) == ["If"]
    assert_equivalent(before, after)


INPUT_IS_OUTPUT = "g (float[N] x) => (float[N] y) { y = Identity(x) }"
CONSTANT_IS_OUTPUT = "g (float[N] x) => (float[1] y, float[N] z) <float[1] c = {2}> { y = Identity(c) z = Relu(x) }"
TWO_OUTPUTS = "g (float[N] x) => (float[N] y, float[N] z) { y = Relu(x) z = Identity(y) }"
BRANCH_RETURNS_OUTER = """g (bool b, float[N] x) => (float[N] y) {
    y = If (b) <then_branch = t () => (float[N] p) { p = Identity(x) },
                else_branch = e () => (float[N] q) { q = Neg(x) }>
}"""


@pytest.mark.parametrize("text", [INPUT_IS_OUTPUT, CONSTANT_IS_OUTPUT, TWO_OUTPUTS, BRANCH_RETURNS_OUTER])
def test_near_miss_is_left_alone(text):
    before = model(text)
    after, result = apply(EliminateIdentity(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and ops(after) == ops(before)
    assert_equivalent(before, after)


def test_foreign_identity_is_left_alone():
    text = """<ir_version: 8, opset_import: ["" : 17, "ours" : 1]>
    g (float[N] x) => (float[N] y) { a = ours.Identity(x) y = Relu(a) }"""
    assert EliminateIdentity().apply(graph_of(model(text))).rewrites == 0
