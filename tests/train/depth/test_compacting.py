"""Matrices that follow each other in a pruned block become one before training: the same outputs, fewer weights."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

from onnxcompress.graph import Constant
from onnxcompress.model_io import load, to_proto
from onnxcompress.runtime import Runtime
from onnxcompress.shapes import infer_shapes
from onnxcompress.testing import inputs_for, model, relative_error, run
from onnxcompress.train.depth.blocks import find_blocks, without_overlaps
from onnxcompress.train.depth.compacting import compact
from onnxcompress.train.depth.kinds import Flow
from onnxcompress.train.depth.preparation import copy_graph, prepare
from onnxcompress.train.depth.supernet import build_pruned
from onnxcompress.train.export import export_module
from tests.train.depth.test_supernet import NETWORKS, linear_operators, with_random_norms

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A network of a kind with some of its blocks pruned, the numbers as training might leave them."""
    folder = tmp_path_factory.mktemp("compacting")

    def get(name, flows=None, count=None):
        torch.manual_seed(0)
        path = folder / f"{name}.onnx"
        with Runtime() as runtime:
            export_module(NETWORKS[name](), torch.randn(1, 1, 16, 16), path, dynamic_batch=True, runtime=runtime)
            graph = prepare(load(with_random_norms(onnx.load(path))), runtime=runtime)
        blocks = [b for b in without_overlaps(find_blocks(graph)[0]) if b.kind != "residual"][:count]
        made = build_pruned(graph, blocks, [block.name for block in blocks], flows=flows)
        for node in made.nodes:
            if node.op == "BatchNormalization":
                for place, tensor in enumerate(node.inputs[1:]):
                    assert isinstance(tensor, Constant)
                    values = RNG.uniform(0.5, 1.5, tensor.shape) if place in (0, 3) else RNG.normal(size=tensor.shape)
                    tensor.values = values.astype(np.float32)
        return made, blocks

    return get


@pytest.mark.parametrize("name", ["convnext", "deit"])
def test_a_block_without_activation_has_one_matrix(pruned, name):
    graph, blocks = pruned(name)
    before = copy_graph(graph)
    made = compact(graph, blocks)
    assert made == [f"{block.name}.merged" for block in blocks] and len(made) > 1
    assert linear_operators(before) - linear_operators(graph) == len(made)
    assert not any(node.op == "BatchNormalization" for node in graph.nodes), "those of the pruned form go along"
    proto, after = to_proto(before), to_proto(graph)
    onnx.checker.check_model(after)
    assert [*proto.graph.input, *proto.graph.output] == [*after.graph.input, *after.graph.output]
    feeds = inputs_for(proto, sizes={"batch": 3})
    error = max(relative_error(a, b) for a, b in zip(run(proto, feeds), run(after, feeds), strict=True))
    assert error <= 2e-6  # measured 3.6e-7
    assert compact(graph, blocks) == []


def test_blocks_that_are_not_pruned_stay(pruned):
    graph, blocks = pruned("convnext", count=1)
    others = {node.name for node in graph.nodes if str(node.name).startswith("features.1.1")}
    assert compact(graph, blocks) == [f"{blocks[0].name}.merged"]
    assert others and others <= {node.name for node in graph.nodes}


@pytest.mark.parametrize(
    ("name", "flows"),
    [
        ("convnext", {"convnext": Flow("batchnorm", "none")}),
        ("deit", {"ffn": Flow("batchnorm", "none")}),
        ("mobilenetv2", None),
        ("basic", None),
        ("bottleneck", None),
    ],
)
def test_batchnormalization_between_matrices_keeps_them_apart(pruned, name, flows):
    graph, blocks = pruned(name, flows)
    nodes = [node.name for node in graph.nodes]
    assert compact(graph, blocks) == [] and [node.name for node in graph.nodes] == nodes


def weights(*shapes):
    return {f"w{i}": RNG.normal(size=shape).astype(np.float32) for i, shape in enumerate(shapes)}


X, Y = "float[2,4,5,5] x", "float[2,4,N,N] y"
PLAIN = "h = Conv(x, w0)  y = Conv(h, w1)"
CONVS = ((9, 4, 1, 1), (4, 9, 1, 1))


def compacted(text, shapes, x=X, y=Y, output="y"):
    graph = load(model(f"g ({x}) => ({y}) {{ {text} }}", **weights(*shapes)))
    infer_shapes(graph)
    before = to_proto(graph)
    made = compact(graph, [SimpleNamespace(name="b", source="x", output=output)])
    if made:
        after = to_proto(graph)
        for feeds in [inputs_for(before, sizes={"N": 5})]:
            for one, other in zip(run(before, feeds), run(after, feeds), strict=True):
                assert relative_error(one, other) <= 2e-6
    return made, [node.op for node in graph.nodes]


def test_constants_between_matrices_go_along():
    text = "h = Conv(x, w0)  s = Mul(h, w2)  t = Add(w3, s)  y = Conv(t, w1)"
    assert compacted(text, (*CONVS, (9, 1, 1), (1, 9, 1, 1))) == (["b.merged"], ["Conv"])
    gemm = "h = Gemm<transB=1>(x, w0, w1)  s = Div(h, w2)  y = MatMul(s, w3)"
    found = compacted(gemm, ((9, 4), (9,), (9,), (9, 3)), "float[2,4] x", "float[2,3] y")
    assert found == (["b.merged"], ["MatMul", "Add"])


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        (PLAIN, ((2, 4, 1, 1), (4, 2, 1, 1))),  # one matrix would have as many weights
        ("h = Conv<group=2>(x, w0)  y = Conv(h, w1)", ((10, 2, 1, 1), (4, 10, 1, 1))),
        ("h = Conv(x, w0)  y = Conv<strides=[2,2]>(h, w1)", CONVS),
        ("h = Conv(x, w0)  y = Conv<pads=[1,1,1,1]>(h, w1)", CONVS),
        ("h = Conv(x, w0)  y = Conv<pads=[1,1,1,1]>(h, w1)", ((9, 4, 1, 1), (4, 9, 3, 3))),
        ("h = Conv(x, w0)  r = Relu(h)  y = Conv(r, w1)", CONVS),
        ("h = Conv(x, w0)  a = Add(h, w2)  y = Conv(a, w1)", (*CONVS, (5, 5))),  # a value for each position
        ("h = Conv(x, w0)  a = Add(h, h)  y = Conv(a, w1)", CONVS),
        ("h = Conv(x, w0)  a = Div(w2, h)  y = Conv(a, w1)", (*CONVS, (9, 1, 1))),
        ("h = Conv(x, w0)  z = Conv(h, w1)  e = Conv(h, w1)  y = Add(z, e)", CONVS),  # two readers
    ],
)
def test_near_miss_is_left_alone(text, shapes):
    made, ops = compacted(text, shapes)
    assert made == [] and len(ops) == text.count("=") - text.count("<")


def test_what_the_model_gives_stays():
    made, ops = compacted(PLAIN, CONVS, y="float[2,4,5,5] y, float[2,9,5,5] h")
    assert made == [] and ops == ["Conv", "Conv"]


def test_what_stands_behind_the_block_stays():
    text = "h = Conv(x, w0)  m = Conv(h, w1)  y = Conv(m, w2)"
    shapes = ((90, 4, 1, 1), (40, 90, 1, 1), (4, 40, 1, 1))
    assert compacted(text, shapes, output="m") == (["b.merged"], ["Conv", "Conv"])
    assert compacted(text, shapes) == (["b.merged"], ["Conv"])
