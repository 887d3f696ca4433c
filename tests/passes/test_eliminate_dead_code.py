"""What nothing needs goes; what the interface or another mode of an operator needs stays."""

import numpy as np
import onnx
import pytest

from onnxcompress.model_io import to_proto
from onnxcompress.passes.eliminate_dead_code import EliminateDeadCode
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops, run


def test_chain_and_initializers():
    before = model(
        "g (float[N,4] x) => (float[N,4] y) { a = Neg(x) b = Mul(a, c) d = RandomNormalLike(b) y = Relu(x) }",
        c=np.ones(4, np.float32),
        unread=np.ones(9, np.float32),
    )
    after, result = apply(EliminateDeadCode(), before)
    assert result.rewrites == 4 and ops(after) == ["Relu"] and not after.graph.initializer
    assert_equivalent(before, after)


def test_interface_stays():
    """Neither an unread input nor an unread initializer that is an input may go."""
    before = model(
        "g (float[N] x, float[M] unused, float[2] preset) => (float[N] y, float[2] z) { y = Relu(x) }",
        preset=np.ones(2, np.float32),
        z=np.ones(2, np.float32),
    )
    after, result = apply(EliminateDeadCode(), before)
    assert result.rewrites == 0 and after == before


def test_in_and_around_subgraphs():
    before = model("""g (bool b, float[N] x) => (float[N] y) {
        read_by_dead = Neg(x)
        used = Abs(x)
        dead = If (b) <then_branch = p () => (float[N] k) { k = Relu(read_by_dead) },
                       else_branch = q () => (float[N] l) { l = Relu(x) }>
        y = If (b) <then_branch = r () => (float[N] m) { m = Neg(used) n = Exp(read_by_dead) o = Log(n) },
                    else_branch = s () => (float[N] t) { t = Abs(x) }>
    }""")
    after, result = apply(EliminateDeadCode(), before)
    assert ops(after) == ["Abs", "If"] and result.rewrites == 4
    assert [n.op_type for n in after.graph.node[1].attribute[0].g.node] == ["Neg"]
    for b in (True, False):
        assert_equivalent(before, after, feeds=[{"b": np.array(b), "x": np.array([1, -2], np.float32)}])


def test_loop_body():
    before = model("""g (float[N] x, int64 n, bool c) => (float[N] y) {
        y = Loop(n, c, x) <body = b (int64 i, bool ci, float[N] s) => (bool co, float[N] t) {
            co = Identity(ci) dead = Exp(s) t = Add(s, x)
        }>
    }""")
    after, result = apply(EliminateDeadCode(), before)
    assert result.rewrites == 1
    feeds = [{"x": np.array([1.5], np.float32), "n": np.array(3), "c": np.array(True)}]
    assert_equivalent(before, after, feeds=feeds)


@pytest.mark.parametrize(
    ("call", "left"),
    [
        ("y, i = MaxPool<kernel_shape = [2]>(x)", ["y"]),
        ("y, m, s = LayerNormalization(x, w)", ["y"]),
        ("y, m, s = LayerNormalization(x, w) z = Neg(s)", ["y", "", "s"]),
        ("y, m = Dropout(x)", ["y"]),
        ("a, y, c = LSTM<hidden_size = 2>(x, k, r)", ["", "y"]),
        ("y, h = GRU<hidden_size = 2>(x, k3, r3)", ["y"]),
    ],
)
def test_optional_outputs(call, left):
    weights = {
        "w": np.ones(4, np.float32),
        "k": np.ones((1, 8, 4), np.float32),
        "r": np.ones((1, 8, 2), np.float32),
        "k3": np.ones((1, 6, 4), np.float32),
        "r3": np.ones((1, 6, 2), np.float32),
    }
    weights = {name: value for name, value in weights.items() if f"{name})" in call or f"{name}," in call}
    dims = "a,b,c,d" if call.startswith("y, h") else "a,b,c"
    outputs = f"float[{dims}] y" + (", float[a,b,c] z" if "z =" in call else "")
    before = model(f"g (float[N,3,4] x) => ({outputs}) {{ {call} }}", **weights)
    after, result = apply(EliminateDeadCode(), before)
    assert result.rewrites == 1 and list(after.graph.node[0].output) == left
    assert_equivalent(before, after)
    assert apply(EliminateDeadCode(), after)[1].rewrites == 0


@pytest.mark.parametrize(
    ("call", "opset"),
    [
        # These outputs are required, or say which mode the operator is in.
        ("y, i = TopK(x, k)", 17),
        ("y, b = Split<axis = 1>(x)", 17),
        ("y, m, v, a, b = BatchNormalization(x, s, s, s, s)", 9),
        ("y, m, v = BatchNormalization<training_mode = 1>(x, s, s, s, s)", 15),
    ],
)
def test_other_outputs_stay(call, opset):
    weights = {"k": np.array([2]), "s": np.ones(4, np.float32)}
    weights = {name: value for name, value in weights.items() if f" {name}" in call}
    before = model(f"g (float[2,4] x) => (float[a,b] y) {{ {call} }}", opset=opset, **weights)
    after, result = apply(EliminateDeadCode(), before)
    assert result.rewrites == 0 and after == before


def test_ir3_initializers_are_no_interface():
    """Up to IR 3 every initializer is listed as an input, and none can be overridden."""
    before = model(
        "g (float[N] x, float[1] c) => (float[N] y) { y = Relu(x) }", ir_version=3, opset=8, c=np.ones(1, np.float32)
    )
    graph = graph_of(before)
    assert EliminateDeadCode().apply(graph).rewrites == 1
    after = to_proto(graph)
    onnx.checker.check_model(after)
    assert [value.name for value in after.graph.input] == ["x"] and not after.graph.initializer
    x = np.array([1, -1], np.float32)
    assert np.array_equal(run(before, {"x": x})[0], run(after, {"x": x})[0])


def test_dead_foreign_nodes_go_and_live_ones_stay():
    text = """<ir_version: 8, opset_import: ["" : 17, "ours" : 1]>
    g (float[N] x) => (float[N] y) { dead = ours.A(x) a, b = ours.B(x) y = Relu(a) }"""
    graph = graph_of(model(text))
    assert EliminateDeadCode().apply(graph).rewrites == 1
    assert [node.op for node in graph.nodes] == ["B", "Relu"] and len(graph.nodes[0].outputs) == 2
