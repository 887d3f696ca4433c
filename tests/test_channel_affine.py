"""Reading affine nodes and runs of them: values, the forms that are none, and the reasons."""

import numpy as np
import pytest

from onnxcompress.merging.channel_affine import (
    ChannelAffine,
    compact,
    extend_backward,
    extend_forward,
    read_affine_node,
    why_not_copy,
    why_not_scale,
    why_not_shift,
)
from onnxcompress.testing import graph_of, model

F = np.float32
X = "float[N,3,5,5] x"
Y = "float[N,3,5,5] y"
ROW = np.array([[[2.0]], [[4.0]], [[-8.0]]], F)  # (3, 1, 1)
STATISTICS = {
    "s": np.array([1, 2, 3], F),
    "B": np.array([4, 5, 6], F),
    "m": np.array([1, 0, -1], F),
    "v": np.array([4, 1, 0.25], F),
}


def read(call, *, rank=4, axis=1, opset=17, **weights):
    graph = graph_of(model(f"g ({X}) => ({Y}) {{ y = {call} }}", opset=opset, **weights))
    return read_affine_node(graph, graph.nodes[0], 3, rank, axis)


@pytest.mark.parametrize(
    ("call", "scale", "shift"),
    [
        ("Mul(x, c)", [2, 4, -8], [0, 0, 0]),
        ("Mul(c, x)", [2, 4, -8], [0, 0, 0]),
        ("Div(x, c)", [0.5, 0.25, -0.125], [0, 0, 0]),
        ("Add(c, x)", [1, 1, 1], [2, 4, -8]),
        ("Sub(x, c)", [1, 1, 1], [-2, -4, 8]),
        ("Sub(c, x)", [-1, -1, -1], [2, 4, -8]),
    ],
)
def test_elementwise_forms(call, scale, shift):
    found = read(call, c=ROW)
    assert isinstance(found, ChannelAffine)
    assert found.scale.tolist() == scale and found.shift.tolist() == shift
    assert found.source.name == "x" and found.output.name == "y"


def test_neg_and_scalar():
    assert read("Neg(x)").scale.tolist() == [-1, -1, -1]
    assert read("Mul(x, c)", c=np.array(3, F)).scale.tolist() == [3, 3, 3]
    assert read("Mul(x, c)", rank=None, c=np.array([3], F)).scale.tolist() == [3, 3, 3]


def test_batchnorm():
    found = read("BatchNormalization<epsilon=0.0>(x, s, B, m, v)", **STATISTICS)
    assert found.scale.tolist() == [0.5, 2, 6] and found.shift.tolist() == [3.5, 5, 12]


@pytest.mark.parametrize(
    ("call", "constant"),
    [("Div(c, x)", ROW), ("Mul(x, x)", ROW), ("Pow(x, c)", ROW), ("Max(x, c)", ROW)],
)
def test_other_nodes_are_none(call, constant):
    assert read(call, c=constant) is None


@pytest.mark.parametrize(
    ("call", "constant", "words"),
    [
        ("Mul(x, c)", np.ones((1, 1, 1, 3), F), "channel axis"),
        ("Mul(x, c)", np.ones((1, 3, 1, 1, 1), F), "adds axes"),
        ("Mul(x, c)", np.ones((1, 1, 1, 1, 1), F), "adds axes"),
        ("Mul(x, c)", np.ones((3, 5, 5), F), "one value per channel"),
        ("Mul(x, c)", np.array([np.inf], F), "finite"),
        ("Div(x, c)", np.array([0], F), "divides by zero"),
        ("Add(x, c)", np.array([4097], F), "rounds"),
    ],
)
def test_reasons(call, constant, words):
    text = "g (float[N,3,5,5] x) => (float[a,b,c5,d,e] y)" if constant.ndim == 5 else f"g ({X}) => ({Y})"
    graph = graph_of(model(f"{text} {{ y = {call} }}", c=constant))
    found = read_affine_node(graph, graph.nodes[0], 3, 4)
    assert isinstance(found, str) and words in found


def test_vector_needs_a_rank():
    assert "rank" in read("Mul(x, c)", rank=None, c=ROW)


def test_integers_are_refused():
    graph = graph_of(model("g (int32[N,3] x) => (int32[N,3] y) { y = Mul(x, c) }", c=np.ones(1, np.int32)))
    assert "int32" in read_affine_node(graph, graph.nodes[0], 3, 2)


def test_batchnorm_reasons():
    assert "4 channels" not in read("BatchNormalization(x, s, B, m, v)", **STATISTICS).nodes[0].name
    zero = {**STATISTICS, "v": np.array([4, -1, 0.25], F)}
    assert "var + epsilon" in read("BatchNormalization(x, s, B, m, v)", **zero)
    nan = {**STATISTICS, "s": np.array([1, np.nan, 3], F)}
    assert "finite" in read("BatchNormalization(x, s, B, m, v)", **nan)
    assert "spatial" in read("BatchNormalization<spatial=0>(x, s, B, m, v)", opset=8, **STATISTICS)
    assert read("BatchNormalization(x, s, B, m, v)", axis=3, **STATISTICS) is None


def test_run_is_one_map_of_all_its_nodes():
    text = f"g ({X}) => ({Y}) {{ a = Mul(x, c) b = Sub(d, a) e = Neg(b) y = BatchNormalization(e, s, B, m, v) }}"
    graph = graph_of(model(text, c=ROW, d=np.array(10, F), **STATISTICS))
    forward = extend_forward(graph, read_affine_node(graph, graph.nodes[0], 3, 4), 4)
    backward = extend_backward(graph, read_affine_node(graph, graph.nodes[-1], 3, 4), 4)
    x = np.array([0.3, -2.0, 5.0])
    sigma = np.sqrt(STATISTICS["v"].astype(float) + 1e-5)
    y = (x * ROW.reshape(-1) - 10 - STATISTICS["m"]) / sigma * STATISTICS["s"] + STATISTICS["B"]
    for run in (forward, backward):
        assert [n.op for n in run.nodes] == ["Mul", "Sub", "Neg", "BatchNormalization"]
        assert run.source.name == "x" and run.output.name == "y"
        np.testing.assert_allclose(run.scale * x + run.shift, y, rtol=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        f"g ({X}) => ({Y}, float[N,3,5,5] a) {{ a = Mul(x, c) y = Add(a, d) }}",
        f"g ({X}) => ({Y}, float[N,3,5,5] z) {{ a = Mul(x, c) y = Add(a, d) z = Relu(a) }}",
        f"g ({X}) => ({Y}) {{ a = Mul(x, c) r = Relu(a) y = Add(r, d) }}",
    ],
)
def test_run_ends_where_something_else_reads(text):
    graph = graph_of(model(text, c=ROW, d=np.array(10, F)))
    first, last = graph.nodes[0], next(node for node in graph.nodes if node.op == "Add")
    assert len(extend_forward(graph, read_affine_node(graph, first, 3, 4), 4).nodes) == 1
    assert len(extend_backward(graph, read_affine_node(graph, last, 3, 4), 4).nodes) == 1


def test_run_ends_where_the_constant_may_broadcast():
    text = "g (float[N,a,5,5] x) => (float[N,3,5,5] y) { a = Mul(x, c) y = Add(a, d) }"
    graph = graph_of(model(text, c=ROW, d=np.array(10, F)))
    run = extend_backward(graph, read_affine_node(graph, graph.nodes[-1], 3, 4), 4)
    assert len(run.nodes) == 1


ERF = "u = Div(x, root) e = Erf(u) o = Add(e, one) p = Mul(x, o) y = Mul(p, half)"
TANH = "e = Tanh(x) o = Add(one, e) p = Mul(o, x) y = Mul(half, p)"
NORM = "d = Sub(x, n) q = Mul(d, d) w = ReduceMean<axes=[-1]>(q) e = Add(w, tiny) r = Sqrt(e) p = Div(d, r)"
KERNEL = {name: np.array(value, F) for name, value in {"root": 1.41421, "one": 1, "half": 0.5, "tiny": 1e-5}.items()}


@pytest.mark.parametrize(
    ("calls", "axis", "words"),
    [
        (ERF, 1, "GELU"),
        (TANH, 3, "GELU"),
        (f"{NORM} y = Mul(p, row)", 3, "LayerNormalization"),
        (f"{NORM} m = Mul(p, row) y = Add(m, row)", 3, "LayerNormalization"),
        (f"{NORM} y = Mul(p, row)", 1, None),
        (ERF.replace("half", "one"), 1, None),
        (ERF.replace("Erf", "Sin"), 1, None),
        (f"{NORM.replace('Sqrt', 'Exp')} y = Mul(p, row)", 3, None),
        (f"{NORM} m = Mul(p, d) y = Add(m, row)", 3, None),
    ],
)
def test_what_the_runtime_has_one_kernel_for_is_left_to_it(calls, axis, words):
    row = np.ones(3, F).reshape(-1, *[1] * (3 - axis))
    text = f"g (float[N,3,3,3] x, float[N,3,3,1] n) => (float[N,3,3,3] y) {{ {calls} }}"
    graph = graph_of(model(text, row=row, **KERNEL))
    found = read_affine_node(graph, graph.nodes[-1], 3, 4, axis)
    assert isinstance(found, ChannelAffine) if words is None else words in found


def test_limits():
    f32, f16 = np.dtype(F), np.dtype(np.float16)
    assert why_not_shift(np.array([-4096.0]), f32) is None and "4097" in why_not_shift(np.array([-4097.0]), f32)
    assert why_not_shift(np.array([32.0]), f16) is None and "33" in why_not_shift(np.array([33.0]), f16)
    assert why_not_scale(np.ones(2), np.array([1e-5, 1]), f32) is None
    assert "1e-05" in why_not_scale(np.ones(2), np.array([1e-5, 1]), f16)
    assert why_not_scale(np.ones(2), np.array([0, 1]), f16) is None
    assert why_not_scale(np.array([1e-37, 1]), np.array([1e-3, 1]), f32) is None
    assert "1e-40" in why_not_scale(np.array([1e-37, 1e-30]), np.array([1e-3, 1]), f32)


def test_copy_of_a_shared_weight_has_a_limit():
    text = "g (float[N,3] x) => (float[N,3] y, float[N,3] z) { y = MatMul(x, W) z = MatMul(x, W) }"
    graph = graph_of(model(text, W=np.ones((3, 3), F)))
    first, second = graph.nodes
    assert why_not_copy(first.inputs[1], [first], 36) is None
    assert "36 bytes, allowed are 35" in why_not_copy(first.inputs[1], [first], 35)
    assert why_not_copy(first.inputs[1], [first, second], 0) is None


def test_compact():
    assert compact(np.array([2.0, 2.0]), (-1, 1), np.dtype(F)).shape == ()
    assert compact(np.array([2.0, 3.0]), (-1, 1), np.dtype(F)).shape == (2, 1)
