"""What NumPy computes in onnxruntime's place must be onnxruntime's result, bit for bit."""

import numpy as np
import pytest
from onnx import TensorProto, helper, parser

from onnxcompress.graph import is_constant
from onnxcompress.passes.replace_constant_nodes import ReplaceConstantNodes
from onnxcompress.patterns.constant_evaluation import RULES, evaluate_in_numpy, single_node_model
from onnxcompress.testing import graph_of, model, run

F = np.array([[0.0, -0.0, np.inf], [np.nan, -1.5, 7.25]], np.float32)
G = np.array([[2.0, -0.0, np.inf], [1.0, -0.5, -3]], np.float32)
I = np.array([[7, -7, 2**62], [-1, 0, 5]])  # noqa: E741
J = np.array([[2, 2, 3], [3, 4, -3]])
B = np.array([[True, False, True], [False, False, True]])
C = np.array([[True, True, False], [False, True, False]])
S = np.array(["a", "", "ü"], object)


def one(*values):
    return np.array(values, np.int64)


CASES = [
    *[(op, f"{op}(a)", {"a": F}) for op in ("Abs", "Ceil", "Floor", "Neg", "Sqrt", "Identity")],
    *[(op, f"{op}(a)", {"a": I}) for op in ("Abs", "Neg", "Identity")],
    *[(op, f"{op}(a, b)", {"a": F, "b": G}) for op in ("Add", "Sub", "Mul", "Div", "Equal", "Less", "Greater")],
    *[(op, f"{op}(a, b)", {"a": F, "b": G}) for op in ("LessOrEqual", "GreaterOrEqual")],
    *[(op, f"{op}(a, b)", {"a": I, "b": J}) for op in ("Add", "Sub", "Mul", "Equal", "Less", "Greater", "Mod")],
    *[(op, f"{op}(a, b)", {"a": I, "b": J}) for op in ("Max", "Min", "LessOrEqual", "GreaterOrEqual")],
    *[(op, f"{op}(a, b)", {"a": B, "b": C}) for op in ("And", "Or", "Xor", "Equal")],
    ("Not", "Not(a)", {"a": B}),
    ("Div", "Div(a, b)", {"a": I, "b": J}),
    ("Div", "Div(a, b)", {"a": one(-7, 7, -7, 6, 0, -1), "b": one(2, -2, -2, 3, 5, 9)}),
    ("Mod", "Mod<fmod = 1>(a, b)", {"a": I, "b": J}),
    ("Add", "Add(a, b)", {"a": I, "b": one(1)}),
    ("Mul", "Mul(a, b)", {"a": one(2**62), "b": one(4)}),  # wraps
    ("Where", "Where(a, b, c)", {"a": B, "b": I, "c": J}),
    ("Where", "Where(a, b, c)", {"a": np.array(True), "b": S, "c": S[::-1].copy()}),
    ("Reshape", "Reshape(a, b)", {"a": F, "b": one(3, -1)}),
    ("Reshape", "Reshape(a, b)", {"a": S, "b": one(0, 1)}),
    ("Squeeze", "Squeeze(a)", {"a": F[None, :, None]}),
    ("Squeeze", "Squeeze(a, b)", {"a": F[None, :, None], "b": one(-2)}),
    ("Unsqueeze", "Unsqueeze(a, b)", {"a": F, "b": one(0, -1)}),
    ("Flatten", "Flatten<axis = 2>(a)", {"a": F[None]}),
    ("Flatten", "Flatten<axis = 0>(a)", {"a": F[None]}),
    ("Flatten", "Flatten<axis = -1>(a)", {"a": F[None]}),
    ("Transpose", "Transpose(a)", {"a": F[None]}),
    ("Transpose", "Transpose<perm = [1, 0]>(a)", {"a": B}),
    ("Concat", "Concat<axis = -1>(a, b)", {"a": F, "b": G}),
    ("Concat", "Concat<axis = 0>(a, a)", {"a": S}),
    ("Slice", "Slice(a, b, c)", {"a": F, "b": one(-1), "c": one(2**63 - 1)}),
    ("Slice", "Slice(a, b, c, d, e)", {"a": F, "b": one(2), "c": one(-99), "d": one(-1), "e": one(-1)}),
    ("Slice", "Slice(a, b, c, d, e)", {"a": F, "b": one(9, 0), "c": one(-9, 9), "d": one(1, 0), "e": one(-2, 2)}),
    ("Slice", "Slice(a, b, c, d)", {"a": F, "b": one(2), "c": one(1), "d": one(1)}),
    ("Gather", "Gather<axis = 1>(a, b)", {"a": F, "b": one(2, -3)}),
    ("Gather", "Gather(a, b)", {"a": F, "b": np.array(-1)}),
    ("Gather", "Gather(a, b)", {"a": S, "b": np.array([[0, 2]], np.int32)}),
    ("Expand", "Expand(a, b)", {"a": F, "b": one(2, 1, 1)}),
    ("Expand", "Expand(a, b)", {"a": F[:1], "b": one(4, 3)}),
    ("Tile", "Tile(a, b)", {"a": F, "b": one(1, 2)}),
    ("ConstantOfShape", "ConstantOfShape(a)", {"a": one(2, 0)}),
    ("ConstantOfShape", "ConstantOfShape<value = int64[1] {7}>(a)", {"a": one(2, 2)}),
    ("ConstantOfShape", "ConstantOfShape<value = bool[1] {1}>(a)", {"a": np.zeros(0, np.int64)}),
    ("Shape", "Shape(a)", {"a": F}),
    ("Shape", "Shape<start = -1>(a)", {"a": F}),
    ("Shape", "Shape<end = 1>(a)", {"a": F}),
    ("Size", "Size(a)", {"a": F}),
    ("Cast", "Cast<to = 1>(a)", {"a": I}),
    ("Cast", "Cast<to = 7>(a)", {"a": np.array([1.9, -1.9, 0.0], np.float32)}),
    ("Cast", "Cast<to = 9>(a)", {"a": F}),
    ("Cast", "Cast<to = 6>(a)", {"a": I}),
    ("Cast", "Cast<to = 2>(a)", {"a": I}),
    ("Cast", "Cast<to = 1>(a)", {"a": np.array([0.1, 1e300, 2**-149, 1 + 2**-24])}),
    ("Cast", "Cast<to = 10>(a)", {"a": np.array([0.1, 65519, 65520, 6e-8, np.inf], np.float32)}),
    ("Range", "Range(a, b, c)", {"a": np.array(1), "b": np.array(8), "c": np.array(3)}),
    ("Range", "Range(a, b, c)", {"a": np.array(8), "b": np.array(1), "c": np.array(-3)}),
    ("Range", "Range(a, b, c)", {"a": np.array(8), "b": np.array(1), "c": np.array(3)}),
    ("ReduceProd", "ReduceProd<axes = [0]>(a)", {"a": J}),
    ("ReduceMax", "ReduceMax<axes = [-1], keepdims = 0>(a)", {"a": J}),
    ("ReduceMin", "ReduceMin(a)", {"a": J}),
    ("ReduceSum", "ReduceSum(a, b)", {"a": J, "b": one(1)}),
    ("ReduceSum", "ReduceSum<noop_with_empty_axes = 1>(a)", {"a": J}),
]


def evaluated(text, given, opset=17):
    """(NumPy's outputs, onnxruntime's) of a call, "a, b = " before it where it has two outputs."""
    line = text if text.startswith("p, q = ") else f"y = {text}"
    proto = model("g (float[1] x) => (float[1] z) { z = Identity(x) }", opset=opset, **given)
    proto.graph.node.extend(parser.parse_graph(f"g () => () {{ {line} }}").node)
    graph = graph_of(proto)
    ReplaceConstantNodes().apply(graph)
    node = graph.nodes[-1]
    assert all(map(is_constant, node.inputs))
    arrays = [tensor.values for tensor in node.inputs]
    feeds = dict(zip((t.name for t in node.inputs), arrays, strict=True))
    return evaluate_in_numpy(graph, node, arrays), run(single_node_model(graph, node, feeds), {})


def same(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    if a.dtype == object:
        assert a.tolist() == b.tolist()
        return
    nan = np.isnan(a) if a.dtype.kind == "f" else np.zeros(a.shape, bool)
    assert np.array_equal(nan, np.isnan(b) if b.dtype.kind == "f" else nan)
    assert a[~nan].tobytes() == b[~nan].tobytes()


@pytest.mark.parametrize(("op", "call", "given"), CASES)
def test_same_bits(op, call, given):
    ours, theirs = evaluated(call, given)
    assert ours is not None
    for a, b in zip(ours, theirs, strict=True):
        same(a, b)


def test_every_rule_has_a_case():
    assert {op for op, _, _ in CASES} == set(RULES) - {"Split"}  # Split is below


@pytest.mark.parametrize(
    ("call", "opset"),
    [
        ("p, q = Split<axis = 1>(a, b)", 17),
        ("p, q = Split<axis = 1, split = [1, 2]>(a)", 11),
        ("p, q = Split<axis = -1, num_outputs = 2>(a)", 18),
    ],
)
def test_split(call, opset):
    given = {"a": F, "b": one(1, 2)} if "b)" in call else {"a": F}
    ours, theirs = evaluated(call, given, opset)
    assert len(ours) == 2
    for a, b in zip(ours, theirs, strict=True):
        same(a, b)


@pytest.mark.parametrize(
    ("call", "given"),
    [
        ("Squeeze<axes = [1]>(a)", {"a": F[:, None]}),
        ("Unsqueeze<axes = [0, 3]>(a)", {"a": F}),
        ("ReduceSum<axes = [0]>(a)", {"a": J}),
        ("Slice<starts = [1], ends = [9], axes = [-1]>(a)", {"a": F}),
    ],
)
def test_forms_of_old_opsets(call, given):
    ours, theirs = evaluated(call, given, 9)
    same(ours[0], theirs[0])


@pytest.mark.parametrize(
    ("call", "given"),
    [
        ("Div(a, b)", {"a": I, "b": one(0)}),
        ("Div(a, b)", {"a": one(-(2**63)), "b": one(-1)}),
        ("Where(a, b, c)", {"a": B, "b": F, "c": G}),
        ("Cast<to = 7>(a)", {"a": F}),  # NaN and infinity have no integer
        ("Cast<to = 3>(a)", {"a": np.array([300.0], np.float32)}),
        ("Cast<to = 10>(a)", {"a": np.array([0.1])}),
        ("Cast<to = 8>(a)", {"a": F}),
        ("Exp(a)", {"a": F}),
        ("Max(a, b)", {"a": F, "b": G}),
        ("ReduceSum(a)", {"a": F}),
        ("Gather(a, b)", {"a": F, "b": one(2)}),
        ("Add(a, b)", {"a": F.astype(np.float16), "b": G.astype(np.float16)}),
    ],
)
def test_numpy_is_not_asked(call, given):
    proto = model("g (float[1] x) => (float[1] z) { z = Identity(x) }", **given)
    proto.graph.node.extend(parser.parse_graph(f"g () => () {{ y = {call} }}").node)
    graph = graph_of(proto)
    node = graph.nodes[-1]
    assert evaluate_in_numpy(graph, node, [tensor.values for tensor in node.inputs]) is None


def test_four_bit_numbers_are_left_to_onnxruntime():
    proto = model("g (float[1] x) => (float[1] z) { z = Identity(x) }", opset=21, ir_version=10)
    proto.graph.initializer.append(TensorProto(name="a", data_type=TensorProto.UINT4, dims=[3], raw_data=b"\x21\x03"))
    proto.graph.node.append(helper.make_node("Cast", ["a"], ["y"], to=TensorProto.INT32))
    graph = graph_of(proto)
    node = graph.nodes[-1]
    arrays = [tensor.values for tensor in node.inputs]
    assert evaluate_in_numpy(graph, node, arrays) is None
    (found,) = run(single_node_model(graph, node, {"a": arrays[0]}), {})
    assert found.tolist() == [1, 2, 3]
