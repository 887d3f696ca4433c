"""If with a known condition: names, nesting, and outputs that no inner node makes."""

import numpy as np
import pytest
from onnx import helper

from onnxcompress.passes.inline_constant_if import InlineConstantIf
from onnxcompress.testing import apply, assert_equivalent, model, ops, run

YES, NO = "<bool c = {1}>", "<bool c = {0}>"
THEN = "then_branch = t () => (float[a] p) { k = Relu(x) p = Add(k, x) }"
INNER_THEN = "then_branch = it () => (float[a] m) { m = Abs(w) }"
INNER_ELSE = "else_branch = ie () => (float[b2] n) { n = Neg(w) }"
ELSE = "else_branch = e () => (float[b] q) { k = Neg(x) q = Mul(k, k) }"


@pytest.mark.parametrize(("constant", "left"), [(YES, ["Relu", "Add"]), (NO, ["Neg", "Mul"])])
def test_inlines(constant, left):
    before = model(f"g (float[N] x) => (float[N] y) {constant} {{ y = If (c) <{THEN}, {ELSE}> }}")
    after, result = apply(InlineConstantIf(), before)
    assert result.rewrites == 1 and ops(after) == left
    assert_equivalent(before, after)


def test_equal_names_in_two_branches():
    """Both Ifs name their inner tensors alike; so does the outer graph's other branch."""
    branches = f"<{THEN}, {ELSE}>"
    body = f"r = If (c) {branches} s = If (d) {branches} u = If (b) {branches} v = Add(r, s) y = Add(u, v)"
    before = model(f"g (float[N] x, bool b) => (float[N] y) <bool c = {{1}}, bool d = {{0}}> {{ {body} }}")
    after, result = apply(InlineConstantIf(), before)
    assert result.rewrites == 2 and sorted(ops(after)) == ["Add", "Add", "Add", "If", "Mul", "Neg", "Relu"]
    assert_equivalent(before, after)


def test_nested():
    inner = f"If (d) <{INNER_THEN}, {INNER_ELSE}>"
    branch = f"then_branch = t () => (float[a] p) {{ w = Relu(x) h = {inner} p = Add(w, h) }}"
    before = model(
        f"g (float[N] x) => (float[N] y) <bool c = {{1}}, bool d = {{0}}> {{ y = If (c) <{branch}, {ELSE}> }}"
    )
    after, result = apply(InlineConstantIf(), before)
    assert result.rewrites == 2 and ops(after) == ["Relu", "Neg", "Add"]
    assert_equivalent(before, after)


def test_a_live_if_inside_keeps_its_scope():
    inner = f"If (b) <{INNER_THEN}, {INNER_ELSE}>"
    branch = f"then_branch = t () => (float[a] p) {{ w = Relu(x) h = {inner} p = Add(w, h) }}"
    before = model(f"g (float[N] x, bool b) => (float[N] y) <bool c = {{1}}> {{ y = If (c) <{branch}, {ELSE}> }}")
    after, result = apply(InlineConstantIf(), before)
    assert result.rewrites == 1 and ops(after) == ["Relu", "If", "Add"]
    for b in (True, False):
        assert_equivalent(before, after, feeds=[{"b": np.array(b), "x": np.array([1, -2], np.float32)}])


@pytest.mark.parametrize(
    ("branch", "left"),
    [
        ("t () => (float[a] p, float[a2] p2) { p = Relu(x) p2 = Identity(p) }", ["Relu", "Identity"]),
        ("t () => (float[a] p, float[1] k) <float[1] k = {3}> { p = Add(x, k) }", ["Add", "Identity"]),
        (
            "t () => (float[a] p, float[1] k) { k = Constant<value = float[1] {3}>() p = Add(x, k) }",
            ["Constant", "Add"],
        ),
    ],
)
def test_outputs(branch, left):
    other = "else_branch = e () => (float[b] q, float[b2] q2) { q = Neg(x) q2 = Abs(x) }"
    body = f"y, r = If (c) <then_branch = {branch}, {other}> z = Neg(r)"
    before = model(f"g (float[N] x) => (float[N] y, float[M] z) {YES} {{ {body} }}")
    after, result = apply(InlineConstantIf(), before)
    assert result.rewrites == 1 and ops(after) == [*left, "Neg"]
    assert_equivalent(before, after)


def test_one_inner_tensor_for_two_outputs():
    before = model(f"g (float[N] x) => (float[N] y, float[N] z) {YES} {{ y = Relu(x) z = Neg(x) }}")

    def branch(name, op, result, repeat):
        value = helper.make_tensor_value_info(result, 1, None)
        nodes = [helper.make_node(op, ["x"], [result])]
        if not repeat:
            nodes.append(helper.make_node("Abs", ["x"], [f"{result}2"]))
        second = value if repeat else helper.make_tensor_value_info(f"{result}2", 1, None)
        return helper.make_graph(nodes, name, [], [value, second])

    del before.graph.node[:]
    branches = {"then_branch": branch("t", "Exp", "p", True), "else_branch": branch("e", "Neg", "q", False)}
    node = helper.make_node("If", ["c"], ["y", "z"], **branches)
    before.graph.node.append(node)
    after, result = apply(InlineConstantIf(), before)
    assert result.rewrites == 1 and ops(after) == ["Exp", "Identity", "Identity"]
    x = np.array([1, -2], np.float32)
    for found in run(after, {"x": x}):
        assert np.array_equal(found, run(model("g (float[N] x) => (float[N] y) { y = Exp(x) }"), {"x": x})[0])


def test_initializers_move_out():
    """The outer graph has a ``w`` of its own."""
    branch = "then_branch = t () => (float[a] p) <float[1] w2 = {3}> { p = Add(x, w2) }"
    constants = "<bool c = {1}, float[1] w = {5}>"
    before = model(f"g (float[N] x) => (float[N] y) {constants} {{ r = If (c) <{branch}, {ELSE}> y = Mul(r, w) }}")
    after, result = apply(InlineConstantIf(), before)
    assert result.rewrites == 1 and ops(after) == ["Add", "Mul"]
    assert sorted(t.name for t in after.graph.initializer) == ["w", "w2"]
    assert_equivalent(before, after)


def test_unread_output_is_not_made():
    branch = "then_branch = t () => (float[a] p, float[1] k) <float[1] k = {3}> { p = Add(x, k) }"
    other = "else_branch = e () => (float[b] q, float[b2] q2) { q = Neg(x) q2 = Abs(x) }"
    before = model(f"g (float[N] x) => (float[N] y) {YES} {{ y, r = If (c) <{branch}, {other}> }}")
    after, result = apply(InlineConstantIf(), before)
    assert result.rewrites == 1 and ops(after) == ["Add"]
    assert_equivalent(before, after)


def test_condition_that_is_not_known_is_left_alone():
    before = model(f"g (float[N] x, bool c) => (float[N] y) {{ y = If (c) <{THEN}, {ELSE}> }}")
    after, result = apply(InlineConstantIf(), before)
    assert result.rewrites == 0 and after == before


def test_condition_that_the_caller_may_override_is_left_alone():
    before = model(f"g (float[N] x, bool c) => (float[N] y) {{ y = If (c) <{THEN}, {ELSE}> }}", c=np.array(True))
    after, result = apply(InlineConstantIf(), before)
    assert result.rewrites == 0 and after == before
