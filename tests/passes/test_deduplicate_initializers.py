"""Equal initializers: by bits, across subgraphs, never across the interface."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxcompress.model_io import load, save
from onnxcompress.passes.deduplicate_initializers import DeduplicateInitializers
from onnxcompress.testing import apply, assert_equivalent, model

BIG = np.random.default_rng(0).normal(size=(4, 100)).astype(np.float32)


def names(proto):
    return [tensor.name for tensor in proto.graph.initializer]


@pytest.mark.parametrize("values", [np.float32(2), BIG, np.array([np.nan, -0.0] * 2, np.float32)])
def test_merges(values):
    size = "float[4,100]" if np.ndim(values) == 2 else "float[N,4]"
    before = model(f"g ({size} x) => ({size} y) {{ a = Mul(x, p) y = Add(a, q) }}", p=values, q=values.copy())
    after, result = apply(DeduplicateInitializers(), before)
    assert result.rewrites == 1 and names(after) == ["p"]
    assert_equivalent(before, after)


def test_different_storage_of_equal_values():
    before = model(
        "g (float[2] x) => (float[2] y) <float[2] p = {1, 2}> { a = Mul(x, p) y = Add(a, q) }",
        q=np.array([1, 2], np.float32),
    )
    assert before.graph.initializer[0].float_data and before.graph.initializer[1].raw_data
    after, result = apply(DeduplicateInitializers(), before)
    assert result.rewrites == 1
    assert_equivalent(before, after)


@pytest.mark.parametrize(
    ("p", "q"),
    [
        (np.array([0.0], np.float32), np.array([-0.0], np.float32)),
        (np.array([1.0], np.float32), np.array([[1.0]], np.float32)),
        (np.array([1], np.int64), np.array([1], np.float32)),
        (BIG, BIG + 1),
    ],
)
def test_near_miss_is_left_alone(p, q):
    kind = "int64" if p.dtype == np.int64 else "float"
    interface = f"({kind}[4,100] x, float[4,100] z) => ({kind}[4,100] y, float[4,100] w)"
    before = model(f"g {interface} {{ y = Mul(x, p) w = Div(z, q) }}", p=p, q=q)
    after, result = apply(DeduplicateInitializers(), before)
    assert result.rewrites == 0 and after == before


def test_strings():
    text = """g (string[N] x) => (bool[N] y, bool[N] z)
    <string[1] p = {"a"}, string[1] q = {"a"}, string[1] r = {"b"}> {
        y = Equal(x, p) s = Equal(x, q) t = Equal(x, r) z = And(s, t)
    }"""
    before = model(text, opset=19, ir_version=9)
    after, result = apply(DeduplicateInitializers(), before)
    assert result.rewrites == 1 and names(after) == ["p", "r"]


def with_branches(outer, then, other):
    """An If whose branches multiply by their own or the outer initializers."""
    before = model("g (bool b, float[4,100] x) => (float[4,100] y) { y = Neg(x) }", **outer)
    del before.graph.node[:]
    branches = []
    for name, own, read in (("t", then, next(iter(then or outer))), ("e", other, next(iter(other or outer)))):
        value = helper.make_tensor_value_info(f"{name}_out", 1, None)
        node = helper.make_node("Mul", ["x", read], [f"{name}_out"])
        tensors = [numpy_helper.from_array(v, k) for k, v in own.items()]
        branches.append(helper.make_graph([node], name, [], [value], tensors))
    node = helper.make_node("If", ["b"], ["m"], then_branch=branches[0], else_branch=branches[1])
    before.graph.node.extend([node, helper.make_node("Mul" if outer else "Identity", ["m", *outer], ["y"])])
    return before


@pytest.mark.parametrize(
    ("outer", "then", "other", "rewrites"),
    [
        ({"p": BIG}, {"q": BIG}, {}, 1),  # the outer one stands for the inner one
        ({"p": BIG}, {"q": BIG}, {"r": BIG}, 2),
        ({}, {"q": BIG}, {"r": BIG}, 0),  # neither branch sees the other's
    ],
)
def test_branches(outer, then, other, rewrites):
    before = with_branches(outer, then, other)
    after, result = apply(DeduplicateInitializers(), before)
    assert result.rewrites == rewrites
    feeds = [{"b": np.array(b), "x": BIG} for b in (True, False)]
    assert_equivalent(before, after, feeds=feeds)
    assert after.ByteSize() < before.ByteSize() - 1000 * rewrites + 100


def test_interface_stays():
    """p may be overridden by the caller, and r is a model output."""
    text = "g (float[N,4] x, float[4] p) => (float[N,4] y, float[4] r) { a = Mul(x, p) b = Add(a, q) y = Add(b, r) }"
    values = np.arange(4, dtype=np.float32)
    before = model(text, p=values, q=values, r=values)
    after, result = apply(DeduplicateInitializers(), before)
    assert result.rewrites <= 1 and {"p", "r"} <= set(names(after))
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.normal(size=(2, 4)).astype(np.float32), "p": rng.normal(size=4).astype(np.float32)}]
    assert_equivalent(before, after, feeds=feeds)


def test_external_data(tmp_path):
    before = model("g (float[4,100] x) => (float[4,100] y) { a = Mul(x, p) y = Add(a, q) }", p=BIG, q=BIG)
    onnx.save(
        onnx.ModelProto.FromString(before.SerializeToString()),
        tmp_path / "in.onnx",
        save_as_external_data=True,
        location="in.data",
        size_threshold=0,
    )
    graph = load(tmp_path / "in.onnx")
    assert DeduplicateInitializers().apply(graph).rewrites == 1
    size = save(graph, tmp_path / "out.onnx")
    assert BIG.nbytes < size < 2 * BIG.nbytes + 4096
    assert_equivalent(before, onnx.load(tmp_path / "out.onnx"))
