"""Nodes that run as one call: same numbers, same gradients; what only looks alike runs node by node."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from onnxcompress.testing import graph_of, model, relative_error, run
from onnxcompress.train.fusing import Facts, find_fusions
from onnxcompress.train.torch_graph import TorchGraph

WEIGHTS = {
    "W": np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32),
    "b": np.random.default_rng(1).normal(size=4).astype(np.float32),
    "root2": np.float32(np.sqrt(2)),
    "inverse": np.float32(np.sqrt(0.5)),
    "half": np.float32(0.5),
    "one": np.float32(1),
    "two": np.float32(2),
    "third": np.float32(0.3),
    "eps": np.float32(1e-2),
    "row": np.ones((1, 4), np.float32),
}


def proto_of(body: str, outputs: str = "float[N, 4] y"):
    used = {name: array for name, array in WEIGHTS.items() if any(name in part.split() for part in _words(body))}
    return model(f"g (float[N, 4] x) => ({outputs}) {{ {body} }}", **used)


def _words(body: str) -> list[str]:
    return ["".join(c if c.isalnum() else " " for c in body)]


def steps(twin: TorchGraph) -> int:
    (plan,) = twin._plans.values()
    return len(plan.steps)


LINEAR = "m = MatMul(x, W) y = Add(m, b)"
TRANSPOSED = "t = Transpose<perm = [1, 0]>(W) m = MatMul(x, t) y = Add(b, m)"
GELU = "d = Div(x, root2) e = Erf(d) a = Add(e, one) p = Mul(x, a) y = Mul(p, half)"
GELU_HALF_FIRST = "h = Mul(half, x) d = Mul(x, inverse) e = Erf(d) a = Add(one, e) y = Mul(h, a)"
GELU_HALF_OF_CURVE = "d = Div(x, root2) e = Erf(d) a = Add(e, one) h = Mul(a, half) y = Mul(x, h)"
SILU = "s = Sigmoid(x) y = Mul(x, s)"
NORM = (
    "m = ReduceMean<axes = [-1]>(x) c = Sub(x, m) q = Pow(c, two) v = ReduceMean<axes = [-1]>(q) "
    "a = Add(v, eps) r = Sqrt(a) y = Div(c, r)"
)


@pytest.mark.parametrize(
    ("body", "left"),
    [(LINEAR, 1), (TRANSPOSED, 2), (GELU, 1), (GELU_HALF_FIRST, 1), (GELU_HALF_OF_CURVE, 1), (SILU, 1), (NORM, 1)],
)
def test_one_call(body, left):
    proto = proto_of(body)
    twin = TorchGraph(graph_of(proto))
    assert steps(twin) == left
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = twin({"x": x})["y"].numpy()
    assert relative_error(run(proto, {"x": x.numpy()})[0], found) < 1e-6  # measured 2.4e-7

    double = TorchGraph(graph_of(proto), float_type=torch.float64)
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: double({"x": x})["y"], (x,))


@pytest.mark.parametrize(
    "body",
    [
        "m = MatMul(x, W) y = Add(m, row)",  # not a vector
        "m = MatMul(x, W) y = Add(m, m)",  # no bias
        "m = MatMul(x, W) a = Add(m, b) y = Mul(a, m)",  # the product is read elsewhere
        GELU.replace("half", "third"),
        GELU.replace("root2", "two"),
        GELU.replace("Add(e, one)", "Add(e, two)"),
        "z = Neg(x) " + GELU.replace("Mul(x, a)", "Mul(z, a)"),  # another x outside
        "z = Neg(x) s = Sigmoid(z) y = Mul(x, s)",
        "s = Sigmoid(x) p = Mul(x, s) y = Add(p, s)",  # the gate is read elsewhere
        NORM.replace("c = Sub(x, m)", "c = Sub(m, x)"),
        NORM.replace("v = ReduceMean<axes = [-1]>(q)", "v = ReduceMean<axes = [0]>(q)"),
        NORM.replace("Pow(c, two)", "Pow(x, two)"),
        NORM.replace("Pow(c, two)", "Mul(c, x)"),
    ],
)
def test_near_miss_runs_node_by_node(body):
    proto = proto_of(body)
    graph = graph_of(proto)
    twin = TorchGraph(graph)
    assert steps(twin) == len(graph.nodes)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = twin({"x": x})["y"].numpy()
    assert relative_error(run(proto, {"x": x.numpy()})[0], found) < 1e-6  # measured 2.3e-7


def test_a_tensor_inside_that_is_asked_for_or_edited_is_there():
    twin = TorchGraph(graph_of(proto_of(GELU)))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    found = twin({"x": x}, ["e", "y"])
    assert torch.allclose(found["e"], torch.erf(x / 2**0.5))
    twin.edit("e", torch.zeros_like)
    assert torch.allclose(twin({"x": x})["y"], 0.5 * x)
    twin.unedit("e")
    twin.edit("y", lambda y: y + 1)
    assert torch.allclose(twin({"x": x})["y"], found["y"] + 1)
    fed = {"d": torch.zeros(3, 4), "x": x}
    assert torch.allclose(twin(fed)["y"], 0.5 * x + 1)


def test_no_node_is_in_two_fusions():
    """x * sigmoid(x) where x itself ends a linear."""
    graph = graph_of(proto_of("m = MatMul(x, W) a = Add(m, b) s = Sigmoid(a) y = Mul(a, s)"))
    twin = TorchGraph(graph)
    assert steps(twin) == 2
    found = list(find_fusions(list(graph.nodes), Facts(graph, lambda t: None, lambda t: None, lambda t: True)))
    assert [f.end.op for f in found] == ["Mul"]
