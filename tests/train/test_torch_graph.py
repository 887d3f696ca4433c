"""The twin: numbers equal onnxruntime's, names are ONNX's, any tensor can be asked for, fed or changed."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

from onnxcompress import models
from onnxcompress.errors import ModelError
from onnxcompress.model_io import load, to_proto
from onnxcompress.testing import graph_of, inputs_for, model, relative_error, run
from onnxcompress.train.torch_graph import TorchGraph

RNG = np.random.default_rng(0)
MLP = """m (float[N, 3] x) => (float[N, 2] y) {
    h = Gemm(x, fc1.weight, fc1.bias)
    r = Relu(h)
    y = MatMul(r, fc2)
}"""
MLP_WEIGHTS = {
    "fc1.weight": RNG.normal(size=(3, 4)).astype(np.float32),
    "fc1.bias": RNG.normal(size=4).astype(np.float32),
    "fc2": RNG.normal(size=(4, 2)).astype(np.float32),
}


def mlp() -> onnx.ModelProto:
    """Names with dots, which ONNX text does not know."""
    text = MLP.replace("fc1.weight", "w").replace("fc1.bias", "b")
    weights = dict(zip(("w", "b", "fc2"), MLP_WEIGHTS.values(), strict=True))
    proto = model(text, **weights)
    for tensor in proto.graph.initializer:
        tensor.name = {"w": "fc1.weight", "b": "fc1.bias"}.get(tensor.name, tensor.name)
    for node in proto.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = {"w": "fc1.weight", "b": "fc1.bias"}.get(name, name)
    return proto


def feeds_of(proto: onnx.ModelProto, **sizes: int) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in inputs_for(proto, sizes=sizes).items()}


def worst(proto: onnx.ModelProto, twin: TorchGraph, feeds: dict[str, torch.Tensor]) -> float:
    expected = run(proto, {name: tensor.numpy() for name, tensor in feeds.items()})
    with torch.no_grad():
        found = twin(feeds)
    return max(relative_error(a, found[o.name].numpy()) for a, o in zip(expected, proto.graph.output, strict=True))


def test_equals_onnxruntime_under_onnx_names():
    proto = mlp()
    twin = TorchGraph(graph_of(proto))
    assert set(dict(twin.named_parameters())) == set(MLP_WEIGHTS)
    assert twin.input_names == ["x"] and twin.output_names == ["y"]
    assert worst(proto, twin, feeds_of(proto, N=5)) < 1e-6  # measured 1.1e-7


def test_the_embedded_model():
    proto = onnx.load(models.path("digits"))
    twin = TorchGraph(load(proto))
    feeds = {"image": torch.from_numpy(RNG.normal(size=(3, 1, 8, 8)).astype(np.float32))}
    assert worst(proto, twin, feeds) < 5e-6  # measured 5e-7
    assert all(p.requires_grad for p in twin.parameters())
    assert {n.mean for n in twin.batch_normalizations} <= set(dict(twin.named_buffers()))


def test_gradients_reach_every_parameter():
    twin = TorchGraph(load(models.path("digits")))
    twin({"image": torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))})[
        "logits"
    ].square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in twin.parameters())


def test_gradients_in_float64():
    twin = TorchGraph(graph_of(mlp()), float_type=torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    parameters = list(twin.parameters())

    def function(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        for name, value in zip(dict(twin.named_parameters()), values, strict=True):
            twin.edit(name, lambda old, value=value: value)
        return twin({"x": x})["y"]

    assert torch.autograd.gradcheck(function, (x, *parameters))


def test_any_tensor_can_be_asked_for_fed_and_edited():
    twin = TorchGraph(graph_of(mlp()))
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    plain = twin({"x": x}, ["y", "r", "fc2"])
    assert torch.equal(
        plain["r"], functional.relu(x @ twin.get_parameter("fc1.weight") + twin.get_parameter("fc1.bias"))
    )
    assert plain["fc2"] is twin.get_parameter("fc2")
    assert torch.equal(twin({"r": plain["r"]})["y"], plain["y"])  # cut: x is not needed
    twin.edit("r", lambda r: 2 * r)
    assert torch.allclose(twin({"x": x})["y"], 2 * plain["y"])
    twin.unedit("r")
    twin.edit("fc2", torch.zeros_like)
    assert not twin({"x": x})["y"].any()
    twin.unedit("fc2")
    assert torch.equal(twin({"x": x})["y"], plain["y"])


def test_an_edited_input_and_an_output_that_is_fed():
    twin = TorchGraph(graph_of(mlp()))
    x, y = torch.ones(1, 3), torch.full((1, 2), 7.0)
    assert torch.equal(twin({"x": x, "y": y}, ["y"])["y"], y)
    before = twin({"x": 3 * x})["y"]
    twin.edit("x", lambda t: 3 * t)
    assert torch.equal(twin({"x": x})["y"], before)


def test_what_is_fed_stays_where_its_node_runs_for_another_output():
    twin = TorchGraph(graph_of(model("g (float[4] x) => (float[2] y) { a, b = Split(x)  y = Sub(a, b) }")))
    x = torch.arange(4.0)
    assert twin({"x": x})["y"].tolist() == [-2, -2]
    assert twin({"x": x, "a": torch.zeros(2)})["y"].tolist() == [-2, -3]


def test_unknown_names_are_errors():
    twin = TorchGraph(graph_of(mlp()))
    with pytest.raises(ModelError, match="no tensor 'z'"):
        twin({"z": torch.ones(1)})
    with pytest.raises(ModelError, match="no tensor 'q'"):
        twin({"x": torch.ones(1, 3)}, ["q"])
    with pytest.raises(ModelError, match="'x' is needed and is not fed"):
        twin({})
    with pytest.raises(ModelError, match="no tensor 'q'"):
        twin.edit("q", torch.relu)


def test_an_operator_that_fails_is_named():
    twin = TorchGraph(graph_of(mlp()))
    with pytest.raises(ModelError, match=r"^Gemm .* fails in the twin: "):
        twin({"x": torch.ones(2, 5)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("g (float[N] x) => (float[N] y) { y = StringNormalizer(x) }", "StringNormalizer"),
        (
            '<ir_version: 8, opset_import: ["": 17, "com.acme": 1]> g (float[N] x) => (float[N] y)'
            " { y = com.acme.Relu(x) }",
            "com.acme::Relu",
        ),
    ],
)
def test_an_unknown_operator_is_named_with_its_node(text, message):
    proto = onnx.parser.parse_model(text) if text.startswith("<") else None
    if proto is None:
        graph = onnx.parser.parse_graph(text)
        proto = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])
    proto.graph.node[0].name = "the_node"
    with pytest.raises(
        ModelError, match=f"operator {message} of {message.split('::')[-1]} 'the_node' has no counterpart"
    ):
        TorchGraph(load(proto))


BATCHNORM = "g (float[N, 3, H] x) => (float[N, 3, H] y) { y = BatchNormalization<momentum = 0.8>(x, s, b, m, v) }"
STATISTICS = {
    "s": np.array([1, 2, 0.5], np.float32),
    "b": np.array([0, 1, -1], np.float32),
    "m": np.array([0.5, 0, 1], np.float32),
    "v": np.array([1, 4, 0.25], np.float32),
}


def test_batch_normalization_in_both_modes():
    proto = model(BATCHNORM, **STATISTICS)
    twin = TorchGraph(graph_of(proto))
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    assert set(dict(twin.named_parameters())) == {"s", "b"} and set(dict(twin.named_buffers())) == {"m", "v"}
    assert worst(proto, twin, {"x": x}) < 1e-6  # measured 1.6e-7
    assert torch.equal(twin.get_buffer("m"), torch.from_numpy(STATISTICS["m"]))

    layer = nn.BatchNorm1d(3, momentum=0.2)
    layer.load_state_dict(
        {"weight": twin.get_parameter("s"), "bias": twin.get_parameter("b"), "running_mean": twin.get_buffer("m"),
         "running_var": twin.get_buffer("v"), "num_batches_tracked": torch.tensor(0)}
    )  # fmt: skip
    twin.train()
    assert torch.allclose(twin({"x": x})["y"], layer.train()(x), atol=1e-6)
    assert torch.allclose(twin.get_buffer("m"), layer.running_mean) and torch.allclose(
        twin.get_buffer("v"), layer.running_var
    )
    assert twin.write_back() == ["m", "v"]

    moved = twin.get_buffer("m").clone()
    twin.freeze_batch_statistics = True
    twin.train()
    twin({"x": x})
    assert torch.equal(twin.get_buffer("m"), moved)


def test_write_back_changes_what_was_trained_and_nothing_else():
    proto = onnx.load(models.path("digits"))
    graph = load(proto)
    twin = TorchGraph(graph)
    assert twin.write_back() == []
    assert to_proto(graph).SerializeToString(deterministic=True) == proto.SerializeToString(deterministic=True)
    name = next(name for name, p in twin.named_parameters() if p.ndim == 4)
    with torch.no_grad():
        twin.get_parameter(name).mul_(1.5)
    feeds = {"image": torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))}
    assert twin.write_back() == [name]
    after = to_proto(graph)
    assert worst(after, twin, feeds) < 5e-6  # measured 4e-7
    other = load(proto)
    assert twin.write_back(other) == [name]
    assert to_proto(other).SerializeToString(deterministic=True) == after.SerializeToString(deterministic=True)


HALF = "g (float16[N, 2] x) => (float16[N, 2] y) { y = MatMul(x, W) }"


def test_half_precision_is_trained_in_single_and_rounded_on_writing():
    weight = np.array([[1, 2], [3, 4]], np.float16)
    graph = graph_of(model(HALF, W=weight))
    twin = TorchGraph(graph)
    assert twin.get_parameter("W").dtype == torch.float32
    with torch.no_grad():
        twin.get_parameter("W").add_(1e-5)
    assert twin.write_back() == []  # less than half a step of float16
    with torch.no_grad():
        twin.get_parameter("W").add_(0.01)
    assert twin.write_back() == ["W"]
    (stored,) = to_proto(graph).graph.initializer
    assert stored.data_type == onnx.TensorProto.FLOAT16
    assert np.array_equal(onnx.numpy_helper.to_array(stored), (weight + np.float32(0.01001)).astype(np.float16))
    with torch.no_grad():
        twin.get_parameter("W").fill_(1e6)
    with pytest.raises(ModelError, match="'W': 1e\\+06 does not fit float16"):
        twin.write_back()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_samples_in_half_precision_are_computed_in_single(dtype):
    twin = TorchGraph(graph_of(model(HALF, W=np.array([[1, 2], [3, 4]], np.float16))))
    found = twin({"x": torch.ones(1, 2, dtype=dtype)})["y"]
    assert found.dtype == torch.float32 and found.tolist() == [[4, 6]]


def test_constants_that_are_no_weights_are_buffers():
    text = """g (float[N, 4] x) => (float[N, 4] y) {
        half = Constant<value_float = 0.5>()
        centred = Sub(x, mean)
        a = MatMul(centred, W)
        b = Mul(a, half)
        c = Clip(b, low)
        y = Mul(c, gamma)
    }"""
    weights = {"mean": np.ones(4, np.float32), "W": np.eye(4, dtype=np.float32), "low": np.float32(-9)}
    twin = TorchGraph(graph_of(model(text, gamma=np.ones(4, np.float32), **weights)))
    assert set(dict(twin.named_parameters())) == {"W", "gamma"}
    assert set(dict(twin.named_buffers())) == {"mean", "low", "half"}
    chosen = TorchGraph(
        graph_of(model(text, gamma=np.ones(4, np.float32), **weights)), trainable=lambda name: name == "mean"
    )
    assert set(dict(chosen.named_parameters())) == {"mean"}


def test_weights_in_constant_nodes_train_and_are_written_back():
    text = """g (float[N, 2] x) => (float[N, 2] y) {
        W = Constant<value = float[2, 2] {1, 2, 3, 4}>()
        y = MatMul(x, W)
    }"""
    graph = graph_of(model(text))
    twin = TorchGraph(graph)
    with torch.no_grad():
        twin.get_parameter("W").mul_(2)
    assert twin.write_back() == ["W"]
    assert run(to_proto(graph), {"x": np.eye(2, dtype=np.float32)})[0].tolist() == [[2, 4], [6, 8]]


CODEBOOK = """g (float[N, 4] x) => (float[N, 4] y) {
    i = Cast<to = 6>(indices)
    c = Cast<to = 1>(codebook)
    g = Gather(c, i)
    r = Reshape(g, shape)
    W = Mul(r, scales)
    y = Gemm<transB = 1>(x, W)
}"""


def test_codewords_and_scales_get_gradients_through_the_decoding():
    weights = {
        "indices": RNG.integers(0, 3, (4, 2)).astype(np.uint8),
        "codebook": RNG.normal(size=(3, 2)).astype(np.float16),
        "shape": np.array([4, 4]),
        "scales": np.ones((4, 1), np.float16).astype(np.float32),
    }
    proto = model(CODEBOOK, **weights)
    twin = TorchGraph(graph_of(proto))
    assert set(dict(twin.named_parameters())) == {"codebook", "scales"}
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    (y,) = twin({"x": x}).values()
    dense = twin({"x": x}, ["W"])["W"].detach().requires_grad_()
    assert torch.allclose(functional.linear(x, dense), y)
    y.square().sum().backward()
    functional.linear(x, dense).square().sum().backward()
    expected = torch.zeros(3, 2).index_add_(
        0, torch.from_numpy(weights["indices"].astype(np.int64).reshape(-1)), dense.grad.reshape(-1, 2)
    )
    assert torch.allclose(twin.get_parameter("codebook").grad, expected, atol=1e-4)


IF = """g (float[N, 2] x, bool c) => (float[N, 2] y) {
    z = Add(x, x)
    y = If (c) <
        then_branch = a () => (float[N, 2] p) { p = MatMul(z, W) },
        else_branch = b () => (float[N, 2] q) { q = Neg(z) }
    >
}"""


def test_an_if_takes_the_branch_at_run_time():
    weight = np.array([[1, 2], [3, 4]], np.float32)
    twin = TorchGraph(graph_of(model(IF, W=weight)))
    x = torch.ones(1, 2)
    assert twin({"x": x, "c": torch.tensor(True)})["y"].tolist() == [[8, 12]]
    assert twin({"x": x, "c": torch.tensor(False)})["y"].tolist() == [[-2, -2]]


def test_an_if_with_a_known_condition_needs_one_branch():
    text = IF.replace(", bool c", "").replace("Neg(z)", "StringNormalizer(z)")
    proto = onnx.helper.make_model(
        onnx.parser.parse_graph(text), ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)]
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "c"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(2, dtype=np.float32), "W"))
    twin = TorchGraph(load(proto))
    assert twin({"x": torch.ones(1, 2)})["y"].tolist() == [[2, 2]]


def test_state_and_copies():
    twin = TorchGraph(graph_of(mlp()))
    other = copy.deepcopy(twin)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    x = torch.ones(1, 3)
    assert twin({"x": x})["y"].any() and not other({"x": x})["y"].any()
    other.load_state_dict(twin.state_dict())
    assert torch.equal(other({"x": x})["y"], twin({"x": x})["y"])
    with pytest.raises(RuntimeError, match=r"nothing\.there"):
        other.load_state_dict({**twin.state_dict(), "nothing.there": torch.ones(1)})
    assert not copy.deepcopy(twin.train()).eval().mode.batch_statistics and twin.mode.batch_statistics


def test_deep_graphs_do_not_exhaust_the_stack():
    lines = "\n".join(f"t{i} = Relu({'x' if i == 0 else f't{i - 1}'})" for i in range(3000))
    twin = TorchGraph(load(model(f"g (float[N] x) => (float[N] y) {{ {lines}\n y = Relu(t2999) }}")))
    assert twin({"x": torch.tensor([-1.0, 2.0])})["y"].tolist() == [0, 2]
