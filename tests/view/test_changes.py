"""The nodes that differ between two models."""

import numpy as np
import onnx
import pytest

from onnxcompress import models, optimize
from onnxcompress.testing import model
from onnxcompress.view.changes import node_changes

W = np.ones((4, 4), np.float32)
TEXT = "g (float[N,4] x) => (float[N,4] y) {{ [first] a = MatMul(x, W)  [second] b = {0}(a)  y = Relu({1}) }}"


def graph(operator="Sigmoid", read="b", weight=W, attributes=""):
    return model(TEXT.format(f"{operator}{attributes}", read), W=weight).graph


def listed(first, second):
    return [(one.status, one.name, one.operator, one.detail) for one in node_changes(first, second)]


def test_a_model_does_not_differ_from_itself():
    proto = onnx.load(models.path("digits"))
    assert node_changes(proto.graph, proto.graph) == []


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (graph(operator="Tanh"), ("changed", "second", "Tanh", "Sigmoid -> Tanh")),
        (graph(weight=2 * W), ("changed", "first", "MatMul", "W has other values")),
        (graph(weight=W.astype(np.float64)), ("changed", "first", "MatMul", "W has other values")),
        (graph(weight=np.ones((4, 6), np.float32)), ("changed", "first", "MatMul", "W [4, 4] -> [4, 6]")),
    ],
)
def test_a_changed_node_says_what(second, expected):
    assert listed(graph(), second) == [expected]


def test_attributes_and_inputs():
    before = model("g (float[N,4] x) => (float[N,4] y) { [one] y = LeakyRelu<alpha = 0.1>(x) }").graph
    after = model("g (float[N,4] x) => (float[N,4] y) { [one] y = LeakyRelu<alpha = 0.2>(x) }").graph
    assert listed(before, after) == [("changed", "one", "LeakyRelu", "attributes alpha")]
    text = "g (float[N,4] x) => (float[N,4] y) {{ [one] y = Gemm(x, W{}) }}"
    before, after = model(text.format(""), W=W).graph, model(text.format(", b"), W=W, b=W[0]).graph
    assert listed(before, after) == [("changed", "one", "Gemm", "2 -> 3 inputs")]


def test_a_weight_that_nodes_decode_now():
    before = model("g (float[N,4] x) => (float[N,4] y) { [one] y = MatMul(x, W) }", W=W).graph
    after = model("g (float[N,4] x) => (float[N,4] y) { W = Cast<to = 1>(V)  [one] y = MatMul(x, W) }", V=W).graph
    assert listed(before, after) == [("new", "", "Cast", ""), ("changed", "one", "MatMul", "W is computed now")]


def test_a_constant_by_node_is_that_of_an_initializer():
    before = model("g (float[N] x) => (float[N] y) { [one] y = Mul(x, s) }", s=np.float32(2)).graph
    after = model("g (float[N] x) => (float[N] y) { s = Constant<value = float {2.0}>()  [one] y = Mul(x, s) }").graph
    assert [one[:3] for one in listed(before, after)] == [("new", "", "Constant")]


def test_nodes_without_names_and_nodes_of_one_name():
    text = "g (float[N] x) => (float[N] y) {{ a = {}(x)  b = Neg(a)  [twin] c = Abs(b)  [twin] y = Relu(c) }}"
    before, after = model(text.format("Sin")).graph, model(text.format("Cos")).graph
    assert listed(before, after) == [("new", "", "Cos", ""), ("gone", "", "Sin", "")]


def test_passes_are_named_on_the_embedded_model(tmp_path):
    optimize(models.path("digits"), tmp_path / "o.onnx", measure_latency=False)
    found = node_changes(onnx.load(models.path("digits")).graph, onnx.load(tmp_path / "o.onnx").graph)
    by_status = {status: [one for one in found if one.status == status] for status in ("changed", "new", "gone")}
    assert {status: len(ones) for status, ones in by_status.items()} == {"changed": 2, "new": 5, "gone": 32}
    assert all("fuse-" in one.detail for one in [*by_status["changed"], *by_status["new"]])
