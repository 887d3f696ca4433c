"""Ranking by data and least squares on the weights that stay."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcompress.channels.compensation import compensate, rank_by_data, shrinkage
from onnxcompress.channels.groups import find_channels
from onnxcompress.channels.removing import remove_and_zero
from onnxcompress.model_io import to_proto
from onnxcompress.runtime import Runtime
from onnxcompress.testing import graph_of, model, relative_error, run

RNG = np.random.default_rng(11)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def runtime():
    with Runtime(timeout_s=60) as made:
        yield made


def twins(text: str, **shapes: tuple[int, ...]):
    """A model whose channels 4 to 7 of w1 repeat 0 to 3, twice as large."""
    weights = {name: normal(*shape) for name, shape in shapes.items()}
    weights["w1"][4:] = 2 * weights["w1"][:4]
    if "b1" in weights:
        weights["b1"][4:] = 2 * weights["b1"][:4]
    return model(text, **weights)


CONV = twins(
    "g (float[N,3,8,8] x) => (float[N,5,?,?] y) { a = Conv(x, w1, b1) r = Relu(a) y = Conv<pads=[1,1,1,1]>(r, w2) }",
    w1=(8, 3, 3, 3), b1=(8,), w2=(5, 8, 3, 3),
)  # fmt: skip
DENSE = twins(
    "g (float[N,6] x) => (float[N,5] y) { a = Gemm<transB=1>(x, w1, b1) r = Relu(a) y = Gemm<transB=1>(r, w2, b2) }",
    w1=(8, 6), b1=(8,), w2=(5, 8), b2=(5,),
)  # fmt: skip


def samples(proto, count: int = 8) -> list[dict[str, np.ndarray]]:
    dims = [d.dim_value or 16 for d in proto.graph.input[0].type.tensor_type.shape.dim]
    return [{"x": RNG.normal(size=dims).astype(np.float32)} for _ in range(count)]


@pytest.mark.parametrize("proto", [CONV, DENSE], ids=["conv", "gemm"])
def test_channels_that_others_repeat_go_first_and_cost_nothing(proto, runtime):
    channels = find_channels(graph_of(proto))
    (ranking,) = rank_by_data(channels, samples(proto), runtime).values()
    assert len({int(i) % 4 for i in ranking.order[:4]}) == 4  # one of each pair
    # Measured 1.2e-3 and 2.1e-2, and not 0, by the ridge; the channels alone would cost about as much as the others.
    assert ranking.costs[:4].max() < 0.1 * ranking.costs[4:].min()


@pytest.mark.parametrize("proto", [CONV, DENSE], ids=["conv", "gemm"])
def test_what_stays_makes_up_for_what_goes(proto, runtime):
    feeds = samples(proto)
    removed = {"a": [4, 5, 6, 7]}
    channels = find_channels(graph_of(proto))
    (fit,) = [f for f in compensate(channels, removed, feeds, runtime) if "w2" in f.name]
    assert fit.before > 0.1 and fit.after < 5e-5  # measured 8.5e-6: the ridge
    fitted = to_proto(channels.graph)
    fresh = samples(proto, 1)[0]
    expected = run(proto, fresh)[0]
    plain, _ = remove_and_zero(proto, removed)
    pruned, zeroed = remove_and_zero(fitted, removed)
    assert relative_error(expected, run(plain, fresh)[0]) > 0.3
    assert relative_error(expected, run(pruned, fresh)[0]) < 1e-2  # measured 2e-3: the ridge
    assert relative_error(run(zeroed, fresh)[0], run(pruned, fresh)[0]) < 2e-6  # measured 3e-7


def test_a_mean_that_goes_moves_into_the_bias(runtime):
    """A channel that is constant is made up for by a bias, which the Conv did not have."""
    weights = {"w1": normal(8, 3, 1, 1), "b1": normal(8), "w2": normal(5, 8, 1, 1)}
    weights["w1"][2] = 0
    weights["b1"][2] = 3
    proto = model("g (float[N,3,8,8] x) => (float[N,5,?,?] y) { a = Conv(x, w1, b1) y = Conv(a, w2) }", **weights)
    channels = find_channels(graph_of(proto))
    ranking = rank_by_data(channels, samples(proto), runtime)["a"]
    assert ranking.order[0] == 2 or ranking.costs[0] < 1e-4
    compensate(channels, {"a": [2]}, samples(proto), runtime)
    assert len(channels.graph.nodes[1].inputs) == 3
    pruned, _ = remove_and_zero(to_proto(channels.graph), {"a": [2]})
    fresh = samples(proto, 1)[0]
    assert relative_error(run(proto, fresh)[0], run(pruned, fresh)[0]) < 1e-3  # measured 1e-4: the ridge


def test_weights_that_the_samples_say_nothing_about_stay(runtime):
    """A channel that was 0 on every sample may be something else on others."""
    weights = {"w1": normal(8, 3, 1, 1), "b1": normal(8), "w2": normal(5, 8, 1, 1), "b2": normal(5)}
    weights["w1"][0], weights["b1"][0] = 0, -1  # Relu lets nothing through
    proto = model(
        "g (float[N,3,4,4] x) => (float[N,5,4,4] y) { a = Conv(x, w1, b1) r = Relu(a) y = Conv(r, w2, b2) }", **weights
    )
    channels = find_channels(graph_of(proto))
    compensate(channels, {"a": [7]}, samples(proto), runtime)
    (second,) = [node for node in channels.graph.nodes if node.op == "Conv" and node.inputs[0].name == "r"]
    assert np.allclose(second.inputs[1].values[:, 0], weights["w2"][:, 0], rtol=1e-5)  # measured 0
    assert not np.allclose(second.inputs[1].values[:, 1], weights["w2"][:, 1], rtol=1e-3)


def test_errors_of_the_layers_before_are_made_up_for(runtime):
    """The last layer reads no channel that goes, and is fitted to the original on the pruned network's input."""
    text = (
        "g (float[N,3,8,8] x) => (float[N,4,?,?] y) { a = Conv(x, w1) r = Relu(a) b = Conv(r, w2) s = Relu(b)"
        " y = Conv(s, w3) }"
    )
    proto = model(text, w1=normal(8, 3, 3, 3), w2=normal(12, 8, 1, 1), w3=normal(4, 12, 1, 1))
    channels = find_channels(graph_of(proto))
    fits = {f.name: f for f in compensate(channels, {"a": [0, 1]}, samples(proto), runtime)}
    assert set(fits) == {"w2", "w3"} and fits["w3"].after < fits["w3"].before


def test_a_weight_that_two_nodes_read_stays_one(runtime):
    text = (
        "g (float[N,3,8,8] x) => (float[N,4,?,?] y) { a = Conv(x, w1) b = Conv(x, w2) c = Conv(a, w3) d = Conv(b, w3)"
        " s = Mul(c, d) y = Conv(s, w4) }"
    )
    shapes = {"w1": (6, 3, 1, 1), "w2": (6, 3, 1, 1), "w3": (8, 6, 1, 1), "w4": (4, 8, 1, 1)}
    proto = model(text, **{name: normal(*shape) for name, shape in shapes.items()})
    channels = find_channels(graph_of(proto))
    names = [group.name for group in channels.groups]
    compensate(channels, {"a": [1, 2]}, samples(proto), runtime)
    nodes = {node.outputs[0].name: node for node in channels.graph.nodes}
    assert nodes["c"].inputs[1] is nodes["d"].inputs[1]
    fitted = to_proto(channels.graph)
    assert [group.name for group in find_channels(graph_of(fitted)).groups] == names
    pruned, zeroed = remove_and_zero(fitted, {"a": [1, 2]})
    fresh = samples(proto, 1)[0]
    assert relative_error(run(zeroed, fresh)[0], run(pruned, fresh)[0]) < 2e-6  # measured 2e-7


def test_a_network_without_samples_keeps_its_weights(runtime):
    channels = find_channels(graph_of(CONV))
    compensate(channels, {}, samples(CONV), runtime)
    assert to_proto(channels.graph).graph.initializer == CONV.graph.initializer


@pytest.mark.parametrize("seed", range(4))
def test_few_samples_do_not_say_that_channels_repeat_each_other(seed, runtime):
    """Of 12 samples any 20 columns of 32 are sums of the others."""
    rng = np.random.default_rng(seed)
    text = (
        "g (float[N,8] x) => (float[N,6] y) { a = Gemm<transB=1>(x, w1, b1) r = Relu(a) y = Gemm<transB=1>(r, w2, b2) }"
    )
    shapes = {"w1": (32, 8), "b1": (32,), "w2": (6, 32), "b2": (6,)}
    proto = model(text, **{name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()})
    feeds = [{"x": rng.normal(size=(12, 8)).astype(np.float32)}]
    channels = find_channels(graph_of(proto))
    (ranking,) = rank_by_data(channels, feeds, runtime).values()
    # Measured 0.15 to 0.33; by the moments as they are 0.0006 to 0.0013.
    assert ranking.costs[:20].sum() > 0.1 * ranking.costs[20:].sum()
    (fit,) = [f for f in compensate(channels, {"a": list(range(12))}, feeds, runtime) if "w2" in f.name]
    assert fit.after > 0.5 * fit.before  # measured 0.78 to 0.91; by the moments as they are 1e-5


def test_shrinkage_is_that_of_scikit_learn():
    covariance = pytest.importorskip("sklearn.covariance")
    rng = np.random.default_rng(3)
    mixed = rng.normal(size=(3, 40)) * np.arange(3, 0, -1)[:, None]
    found, wanted = [], []
    for rows in (20, 60, 2000):
        x = rng.normal(size=(rows, 3)) @ mixed + rng.normal(size=(rows, 40))
        x = (x - x.mean(0)) / x.std(0)
        found.append(float(shrinkage((x.T @ x / rows)[None], rows)[0]))
        wanted.append(covariance.oas(x, assume_centered=True)[1])  # leaves out two terms of 1 / D
    assert found == pytest.approx(wanted, rel=0.05)
    assert found[0] > 10 * found[2] > 0
    scaled = np.diag([1.0, 4.0, 0.0])  # nothing off the diagonal, and a column that is always 0
    assert shrinkage(scaled[None], 5)[0] == 1
