"""Constant nodes to initializers: every kind of value, subgraphs, and what must stay a node."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.graph import Constant
from onnxcompress.model_io import StoredValues, to_proto
from onnxcompress.passes.replace_constant_nodes import ReplaceConstantNodes
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops


@pytest.mark.parametrize(
    ("attribute", "dtype", "values"),
    [
        ("value = float[2] {1, 2}", np.float32, [1, 2]),
        ("value = double {0.1}", np.float64, 0.1),
        ("value = bool[2] {1, 0}", np.bool_, [True, False]),
        ("value_float = 0.1", np.float32, np.float32(0.1)),
        ("value_floats = [0.1, 2.0]", np.float32, np.array([0.1, 2], np.float32)),
        ("value_int = 7", np.int64, 7),
        ("value_ints = [7, -1]", np.int64, [7, -1]),
        ('value_string = "ab"', object, "ab"),
        ('value_strings = ["ab", "c"]', object, ["ab", "c"]),
    ],
)
def test_values_and_types(attribute, dtype, values):
    kind = {"float32": "float", "float64": "double", "bool": "bool", "int64": "int64", "object": "string"}
    shape = ",".join(map(str, np.shape(values)))
    y = f"{kind[np.dtype(dtype).name]}[{shape}] y" if shape else f"{kind[np.dtype(dtype).name]} y"
    before = model(f"g (float[1] x) => ({y}) {{ c = Constant<{attribute}>() y = Identity(c) }}")
    after, result = apply(ReplaceConstantNodes(), before)
    assert result.rewrites == 1 and ops(after) == ["Identity"]
    (initializer,) = after.graph.initializer
    assert initializer.name == "c"
    found = numpy_helper.to_array(initializer)
    assert found.dtype == dtype and found.shape == np.shape(values)
    assert_equivalent(before, after)


def test_large_values_are_not_read():
    before = model("g (float[1] x) => (float[1] y) { y = Add(x, x) }")
    weight = np.random.default_rng(0).normal(size=(1, 4096)).astype(np.float32)
    node = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(weight, "name_inside"))
    before.graph.node.insert(0, node)
    before.graph.node.append(helper.make_node("MatMul", ["x", "c"], ["z"]))
    before.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [4096]))
    graph = graph_of(before)
    assert ReplaceConstantNodes().apply(graph).rewrites == 1
    (constant,) = [t for n in graph.nodes for t in n.inputs if isinstance(t, Constant)]
    assert isinstance(constant.stored, StoredValues) and constant.stored.tensor is before.graph.node[0].attribute[0].t
    after = to_proto(graph)
    assert after.graph.initializer[0].name == "c"
    assert after.graph.initializer[0].raw_data == weight.tobytes()
    assert_equivalent(before, after)


def test_four_bit_values_keep_their_type():
    before = model("g (float[1] x) => (float[1] y) { y = Identity(x) }", opset=21, ir_version=10)
    packed = TensorProto(data_type=TensorProto.UINT4, dims=[3], raw_data=b"\x21\x03")
    before.graph.node.append(helper.make_node("Constant", [], ["c"], value=packed))
    before.graph.node.append(helper.make_node("Cast", ["c"], ["z"], to=TensorProto.INT32))
    before.graph.output.append(helper.make_tensor_value_info("z", TensorProto.INT32, [3]))
    after, result = apply(ReplaceConstantNodes(), before)
    assert result.rewrites == 1
    assert after.graph.initializer[0].data_type == TensorProto.UINT4
    assert after.graph.initializer[0].raw_data == b"\x21\x03"
    assert_equivalent(before, after)


def test_subgraph_constants_live_in_the_subgraph_and_outer_ones_are_seen_inside():
    text = """g (bool b, float[2] x) => (float[2] y) {
        c = Constant<value = float[2] {1, 2}>()
        y = If (b) <
            then_branch = t () => (float[2] p) { d = Constant<value = float[2] {3, 4}>() q = Add(x, d) p = Mul(q, c) },
            else_branch = e () => (float[2] r) { d = Constant<value = float[2] {5, 6}>() r = Mul(d, c) }
        >
    }"""
    before = model(text)
    after, result = apply(ReplaceConstantNodes(), before)
    assert result.rewrites == 3 and ops(after) == ["If"]
    assert [t.name for t in after.graph.initializer] == ["c"]
    for attr in after.graph.node[0].attribute:
        assert [t.name for t in attr.g.initializer] == ["d"]
        assert "Constant" not in [n.op_type for n in attr.g.node]
    for b in (True, False):
        assert_equivalent(before, after, feeds=[{"b": np.array(b), "x": np.array([1.5, -2], np.float32)}])


def test_unread_constant_vanishes():
    before = model("g (float[1] x) => (float[1] y) { c = Constant<value_int = 1>() y = Identity(x) }")
    after, result = apply(ReplaceConstantNodes(), before)
    assert result.rewrites == 1 and ops(after) == ["Identity"] and not after.graph.initializer


def test_before_ir4_the_initializer_is_listed_as_input():
    before = model(
        "g (float[1] x) => (float[1] y) { c = Constant<value = float[1] {2}>() y = Add(x, c) }", opset=8, ir_version=3
    )
    after, result = apply(ReplaceConstantNodes(), before)
    assert result.rewrites == 1 and [v.name for v in after.graph.input] == ["x", "c"]
    onnx.checker.check_model(after, full_check=True)


MODEL_OUTPUT = (
    "g (float[1] x) => (float[1] y, float[1] c) { c = Constant<value = float[1] {2}>() y = Add(x, c) }",
    "graph output",
)
BRANCH_OUTPUT = (
    """g (bool b, float[1] x) => (float[1] y) { y = If (b) <
        then_branch = t () => (float[1] p) { p = Constant<value = float[1] {2}>() },
        else_branch = e () => (float[1] r) { r = Relu(x) }
    > }""",
    "graph output",
)


@pytest.mark.parametrize(("text", "reason"), [MODEL_OUTPUT, BRANCH_OUTPUT])
def test_near_miss_is_left_alone(text, reason):
    before = model(text)
    after, result = apply(ReplaceConstantNodes(), before)
    assert result.rewrites == 0 and [reason in miss.reason for miss in result.misses] == [True]
    assert ops(after) == ops(before)
    assert_equivalent(before, after)


def test_sparse_value_stays():
    before = model("g (float[4] x) => (float[4] y) { y = Add(x, x) }")
    values = helper.make_tensor("v", TensorProto.FLOAT, [1], [3.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [2])
    sparse = helper.make_sparse_tensor(values, indices, [4])
    before.graph.node.append(helper.make_node("Constant", [], ["c"], sparse_value=sparse))
    before.graph.node.append(helper.make_node("Add", ["x", "c"], ["z"]))
    before.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [4]))
    after, result = apply(ReplaceConstantNodes(), before)
    assert result.rewrites == 0 and "sparse_value" in result.misses[0].reason
    assert_equivalent(before, after)


def test_subgraph_constant_before_ir4_stays():
    text = """g (bool b, float[1] x) => (float[1] y) { y = If (b) <
        then_branch = t () => (float[1] p) { d = Constant<value = float[1] {2}>() p = Add(x, d) },
        else_branch = e () => (float[1] r) { r = Relu(x) }
    > }"""
    before = model(text, opset=8, ir_version=3)
    after, result = apply(ReplaceConstantNodes(), before)
    assert result.rewrites == 0 and "IR version 4" in result.misses[0].reason
    assert_equivalent(before, after, feeds=[{"b": np.array(True), "x": np.array([1], np.float32)}])
