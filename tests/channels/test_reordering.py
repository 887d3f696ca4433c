"""Channels in another order: the graph computes what it did, with as many bytes, and its layers quantize better."""

from pathlib import Path

import numpy as np
import pytest

from onnxcompress.channels import reordering
from onnxcompress.channels.reordering import Reorderable, input_variances, reorder, reorder_channels
from onnxcompress.codebook.codebook import Choice
from onnxcompress.codebook.layer import quantize_layer
from onnxcompress.codebook.layers import find_layers
from onnxcompress.codebook.permuting import Reading, find_joint_order, permuted, weighted_products
from onnxcompress.codebook.quantizer import quantize
from onnxcompress.codebook.target import covariance, relative_error
from onnxcompress.model_io import load, save, to_proto
from onnxcompress.runtime import RunOptions, Runtime
from onnxcompress.testing import assert_equivalent, graph_of, model, ops
from tests.codebook.test_permuting import problem

RNG = np.random.default_rng(0)
MODELS = Path(__file__).parents[2] / "models"


def rand(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


# A residual connection, a depthwise convolution, a Concat, and a Flatten that gives each channel four columns.
NET = """g (float[N,3,4,4] x) => (float[?,10] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, A, c)
    r = Relu(a)
    d = Conv<group = 16, pads = [1, 1, 1, 1]>(r, D)
    e = Conv<pads = [1, 1, 1, 1]>(d, E)
    s = Add(r, e)
    f = Conv(s, F)
    k = Concat<axis = 1>(s, f)
    m = Mul(k, S)
    h = Conv<strides = [2, 2]>(m, H)
    t = Relu(h)
    w = Flatten(t)
    y = Gemm<transB = 1>(w, Y)
}"""


def net():
    rng = np.random.default_rng(3)

    def rand(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    weights = {"A": rand(16, 3, 3, 3), "c": rand(16), "D": rand(16, 1, 3, 3), "E": rand(16, 16, 3, 3)}
    weights |= {"F": rand(32, 16, 1, 1), "S": rand(48, 1, 1), "H": rand(24, 48, 1, 1), "Y": rand(10, 96)}
    return model(NET, **weights)


def shuffled(graph):
    """The orders of all groups that are free, drawn at random."""
    found = Reorderable(graph, find_layers(graph)[0])
    sizes = {name: found.channels.by_name[name].size for name in found.readers}
    reorder_channels(found.channels, {name: RNG.permutation(size) for name, size in sizes.items()})
    return found


def test_any_order_computes_the_same():
    before, graph = net(), graph_of(net())
    found = shuffled(graph)
    after = to_proto(graph)
    readers = {name: {layer.name: start for layer, start in of_group} for name, of_group in found.readers.items()}
    assert list(readers.values()) == [{"E": 0, "F": 0, "H": 0}, {"H": 16}]  # of h, no layer reads single channels
    assert ops(after) == ops(before) and after.ByteSize() == before.ByteSize()
    old, new = (
        {t.name: np.frombuffer(t.raw_data, np.float32) for t in p.graph.initializer}
        for p in (to_proto(graph_of(before)), after)
    )
    assert {name for name in old if not np.array_equal(old[name], new[name])} == {"A", "c", "D", "E", "F", "S", "H"}
    assert_equivalent(before, after, rel=3e-6)  # measured 6.6e-7


@pytest.mark.parametrize("name", ["resnet20_digits", "mobilenetv2_mini_digits", "densenet_mini_digits"])
def test_any_order_of_a_model_computes_the_same(name):
    before, graph = load(MODELS / f"{name}.onnx"), load(MODELS / f"{name}.onnx")
    found = shuffled(graph)
    assert len(found.readers) >= 5
    after = to_proto(graph)
    assert after.ByteSize() == to_proto(before).ByteSize()
    assert_equivalent(to_proto(before), after, rel=3e-6)  # measured 5.0e-7 at most


@pytest.mark.parametrize(
    "end",
    [
        "y = Relu(r)",  # an output of the model
        "q = CumSum(r, axis)  y = Conv(q, B)",  # no rule: each channel knows its place
        "q = Softmax<axis = 1>(r)  p = Transpose<perm = [0, 2, 3, 1]>(q)  y = MaxPool<kernel_shape = [1, 2]>(p)",
    ],
)
def test_an_order_that_is_seen_stays(end):
    text = f"g (float[1,3,4,4] x) => (float[?,?,?,?] y) {{ a = Conv(x, A)  r = Relu(a)  {end} }}"
    weights = {"A": rand(16, 3, 1, 1)}
    weights |= {"B": rand(8, 16, 1, 1), "axis": np.array(1, np.int64)} if "B" in end else {}
    graph = graph_of(model(text, **weights))
    assert not Reorderable(graph, find_layers(graph)[0]).readers


def test_shared_and_small_are_left_alone():
    text = """g (float[1,16,4,4] x) => (float[?,?,?,?] y) {
        a = Conv(x, A)  b = Relu(a)  c = Conv(b, B)  d = Relu(c)  y = Conv(d, C)
    }"""
    graph = graph_of(model(text, A=rand(8, 16, 1, 1), B=rand(16, 8, 1, 1), C=rand(4, 16, 1, 1)))
    found = Reorderable(graph, find_layers(graph)[0])
    assert [[layer.name for layer, _ in of_group] for of_group in found.readers.values()] == [["C"]]


def test_groups_of_a_convolution_are_not_mixed():
    text = "g (float[1,3,4,4] x) => (float[?,?,?,?] y) { a = Conv(x, A)  b = Conv<group = 2>(a, B)  y = Conv(b, C) }"
    before = model(text, A=rand(32, 3, 1, 1), B=rand(32, 16, 1, 1), C=rand(4, 32, 1, 1))
    graph = graph_of(before)
    shuffled(graph)
    assert_equivalent(before, to_proto(graph), rel=3e-6)  # measured 2e-7


# -- which order -----------------------------------------------------------------------------------------------------


def log_det(products, order, together):
    blocks = order.reshape(-1, together)
    kernel = products.shape[1]
    tiles = sum(products[block[:, None], :, block, :].transpose(0, 2, 1, 3) for block in blocks)
    return np.linalg.slogdet(tiles.reshape(together * kernel, -1))[1] / (together * kernel)


def test_joint_order_is_better_for_blocks_of_each_length():
    rng = np.random.default_rng(1)
    size = 272  # more than are looked at together
    sizes = np.exp(rng.standard_normal(size) / 2)
    products = weighted_products(rng.standard_normal((64, size)), sizes, 1)
    others = weighted_products(rng.standard_normal((32, 2 * size)), np.repeat(sizes, 2), 2)
    readings = [Reading(products, 8, 0.4), Reading(products, 4, 0.4), Reading(others, 2, 0.2)]
    order = find_joint_order(readings)
    assert sorted(order) == list(range(size))
    for reading in readings:
        best = min(log_det(reading.products, rng.permutation(size), reading.together) for _ in range(20))
        assert log_det(reading.products, order, reading.together) < best
    np.testing.assert_array_equal(find_joint_order(readings), order)


def test_dead_channels_do_no_harm():
    products = weighted_products(np.zeros((8, 32)), np.ones(32), 1)
    assert sorted(find_joint_order([Reading(products, 8, 1.0)])) == list(range(32))


@pytest.fixture(scope="module")
def runtime():
    with Runtime(timeout_s=60) as runtime:
        yield runtime


def test_variances_are_those_of_what_layers_read(runtime):
    graph = graph_of(net())
    layers = find_layers(graph)[0]
    feeds = [{"x": rand(2, 3, 4, 4)}, {"x": rand(2, 3, 4, 4)}]
    found = input_variances(graph, layers, feeds, runtime, RunOptions("off"))
    proto = net()
    for name in ("r", "w"):
        proto.graph.output.add(name=name)
    values = [runtime.run(proto.SerializeToString(), [feed], options=RunOptions("off"))[0] for feed in feeds]
    relu = np.concatenate([np.asarray(one[1], np.float64) for one in values]).transpose(1, 0, 2, 3).reshape(16, -1)
    flat = np.concatenate([np.asarray(one[2], np.float64) for one in values])
    np.testing.assert_allclose(found["D"], relu.var(axis=1), rtol=1e-9)
    np.testing.assert_allclose(found["Y"], flat.var(axis=0), rtol=1e-9)


def test_file_is_checked_and_has_its_bytes(runtime, tmp_path, monkeypatch):
    save(graph_of(net()), tmp_path / "net.onnx")
    feeds, options = [{"x": rand(2, 3, 4, 4)}], RunOptions("off")
    names = {layer.name for layer in find_layers(load(tmp_path / "net.onnx"))[0]}
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    made = reorder(tmp_path / "net.onnx", folders[0], names, feeds, runtime, options=options)
    again = reorder(tmp_path / "net.onnx", folders[1], names, feeds, runtime, options=options)
    assert made.read_bytes() == again.read_bytes() != (tmp_path / "net.onnx").read_bytes()
    assert made.stat().st_size == (tmp_path / "net.onnx").stat().st_size
    assert reorder(tmp_path / "net.onnx", folders[2], {"A", "D", "Y"}, feeds, runtime, options=options) is None
    # A rule that is wrong about a graph changes nothing: what comes out is compared.
    right = reordering._places

    def wrong(channels, orders):
        with monkeypatch.context() as patch:
            patch.setattr(
                reordering, "_places", lambda channels: {k: v for k, v in right(channels).items() if k[0].name != "F"}
            )
            reorder_channels(channels, orders)

    monkeypatch.setattr(reordering, "reorder_channels", wrong)
    assert reorder(tmp_path / "net.onnx", folders[2], names, feeds, runtime, options=options) is None


@pytest.mark.parametrize("block", [4, 8])
def test_layer_gains_on_rows_not_seen(block):
    weight, fit, test = problem()
    variances = np.diagonal(covariance(fit)[0])
    products = weighted_products(weight, np.sqrt(variances / variances.mean() + 0.1), 1)
    order = find_joint_order([Reading(products, 8, 0.5), Reading(products, 4, 0.5)])
    choice = Choice(block, 64, "int8", scaled=True)

    def error(columns):
        stored = weight[:, columns]
        layer = quantize_layer(stored, None, permuted(fit, columns), choice, seed=0)
        return relative_error(stored, None, layer.decode(), layer.bias, permuted(test, columns))

    assert error(order) < 0.99 * error(np.arange(48))  # measured 0.923 and 0.970


def test_a_file_is_the_same_each_time(runtime, tmp_path):
    save(graph_of(net()), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=rand(24, 3, 4, 4))
    wishes = {"data": str(tmp_path / "x.npz"), "size_bytes": 17_500, "runtime": runtime, "only": ["E"], "jobs": 1}
    for name in ("a.onnx", "b.onnx"):
        found = quantize(tmp_path / "m.onnx", tmp_path / name, permute="auto", **wishes)
        assert any("channels between layers stand in an order" in note for note in found.notes)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert not Reorderable(graph_of(model("g (float[2] x) => (float[2] y) { y = Relu(x) }")), []).readers
