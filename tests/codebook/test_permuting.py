"""Input channels in another order: found, undone to the bit when the weight is decoded, counted to the byte."""

import dataclasses

import numpy as np
import onnx
import pytest

from onnxcompress import optimize
from onnxcompress.codebook.codebook import Choice, QuantizedLayer, order_shape, order_size_bytes, places_of, size_bytes
from onnxcompress.codebook.encoding import decoding_nodes, empty_order, encode, find_codebooks, overhead_bytes
from onnxcompress.codebook.layer import quantize_layer
from onnxcompress.codebook.layers import find_layers
from onnxcompress.codebook.objective import damped_objective
from onnxcompress.codebook.packing import pack
from onnxcompress.codebook.permuting import columns_of, find_order, is_permutable, permuted
from onnxcompress.codebook.planning import Menu, Planner, finish, hollow
from onnxcompress.codebook.resuming import Checkpoint
from onnxcompress.codebook.shaving import Shaving
from onnxcompress.codebook.target import relative_error
from onnxcompress.errors import QuantizationError
from onnxcompress.model_io import load, save, to_proto
from onnxcompress.testing import graph_of, model, run
from tests.codebook.test_encoding import MODELS, assert_decoded, built, rand, random_form
from tests.codebook.test_layer import correlated, moments

RNG = np.random.default_rng(0)
CHOICES = {"int8": Choice(2, 16, "int8", True, permuted=True), "float16": Choice(2, 40, permuted=True)}
NAMES = [name for name in MODELS if name != "gather"]


def shuffled(layer, quantized):
    """The form with an order that means nothing."""
    places = empty_order(layer, quantized.choice)
    rows = places if places.ndim == 2 else places[None]
    for row in rows:
        row[:] = RNG.permutation(len(row))
    return dataclasses.replace(quantized, order=places)


def form_of(layer, choice):
    """The choice with blocks of two channels."""
    choice = dataclasses.replace(choice, block=2 * layer.kernel)
    return shuffled(layer, random_form(layer, choice))


# -- the order -------------------------------------------------------------------------------------------------------


def log_det(weight, objective, block):
    sizes = np.sqrt(np.einsum("gdd->gd", objective.hessian))
    rows = (objective.target * sizes[:, None, :]).reshape(-1, weight.shape[1])
    blocks = rows.reshape(len(rows), -1, block)
    return np.linalg.slogdet(np.einsum("ojd,oje->de", blocks, blocks))[1]


@pytest.mark.parametrize(("block", "kernel"), [(2, 1), (4, 1), (6, 3)])
def test_order_is_better_than_any_at_random(block, kernel):
    rng = np.random.default_rng(1)
    length = 48 * kernel
    weight = (rng.standard_normal((64, length)) @ rng.standard_normal((length, length))).astype(np.float32)
    hessian = np.diag(rng.random(length))[None]

    def reached(channels):
        columns = (channels[:, None] * kernel + np.arange(kernel)).reshape(-1)
        stored = damped_objective(weight[:, columns], hessian[:, columns[:, None], columns], damping=0.1)
        return log_det(weight, stored, block)

    order = find_order(damped_objective(weight, hessian, damping=0.1), block, kernel)
    found = reached(columns_of(order, kernel)[::kernel] // kernel)
    assert found < min(reached(rng.permutation(48)) for _ in range(100))


def test_groups_have_one_order_and_dead_inputs_do_no_harm():
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((32, 24)).astype(np.float32)
    weight[:, 3] = 0
    moments = np.stack([np.diag(rng.random(24)), np.diag(rng.random(24))])
    moments[:, 5] = moments[:, :, 5] = 0
    order = find_order(damped_objective(weight, moments, damping=0.1), 4)
    assert sorted(order) == list(range(24)) and order.dtype == np.uint8
    zeros = find_order(damped_objective(0 * weight, 0 * moments, damping=0.1), 4)
    assert sorted(zeros) == list(range(24))


@pytest.mark.parametrize(
    ("channels", "together", "shape", "size"),
    [
        (256, 4, (256,), 256),
        (1536, 8, (6, 256), 1536),
        (960, 4, (4, 240), 960),
        (960, 16, (4, 240), 960),
        (258, 4, (258,), 516),  # 129 channels hold no whole blocks of 4
        (521, 1, (521,), 1042),
    ],
)
def test_form_of_an_order(channels, together, shape, size):
    found, dtype = order_shape(channels, together)
    assert found == shape and order_size_bytes(channels, together) == size
    assert places_of(np.zeros(shape, dtype)).shape == (channels,)


def test_order_of_runs_moves_channels_within_them():
    weight = np.random.default_rng(3).standard_normal((32, 320)).astype(np.float32)
    order = find_order(damped_objective(weight, np.eye(320)[None], damping=0.1), 4)
    assert order.shape == (2, 160) and order.dtype == np.uint8
    assert sorted(places_of(order)) == list(range(320)) and sorted(order[1]) == list(range(160))


def test_columns_and_places_undo_each_other():
    order = np.stack([RNG.permutation(5), RNG.permutation(5)]).astype(np.uint8)
    columns, weight = columns_of(order, 3), rand(4, 30)
    stored = weight[:, columns].reshape(4, 10, 3)
    np.testing.assert_array_equal(stored[:, places_of(order)].reshape(4, 30), weight)


def test_which_blocks():
    assert is_permutable(64, 1, 4) and is_permutable(72, 9, 18)
    assert not any(is_permutable(72, 9, block) for block in (4, 9, 12, 72)) and not is_permutable(64, 1, 1)


# -- fitting ---------------------------------------------------------------------------------------------------------


def problem(groups=1, kernel=1):
    """Inputs of different sizes, which a shared codebook does not know apart."""
    rng = np.random.default_rng(4)
    length = 48 * kernel
    sizes = np.repeat(np.exp(rng.standard_normal(48)), kernel)
    rows, others = (rng.standard_normal((groups, 3000, length)) * sizes for _ in range(2))
    return rng.standard_normal((128, length)).astype(np.float32), moments(rows), moments(others)


@pytest.mark.parametrize(("groups", "kernel", "block"), [(1, 1, 4), (2, 1, 4), (1, 3, 6)])
def test_permuted_layer_is_better_on_rows_not_seen(groups, kernel, block):
    weight, fit, test = problem(groups, kernel)
    choice = Choice(block, 64, "int8", scaled=True)
    plain = quantize_layer(weight, None, fit, choice, seed=0, kernel=kernel)
    asked = dataclasses.replace(choice, permuted=True)
    found = quantize_layer(weight, None, fit, asked, held_out=test, seed=0, kernel=kernel)
    assert found.choice == asked and found.decode().shape == weight.shape

    def error(layer):
        return relative_error(weight, None, layer.decode(), layer.bias, test)

    assert error(found) < 0.97 * error(plain)  # measured 0.943, 0.959 and 0.890
    assert found.held_out_error == pytest.approx(error(found), rel=1e-9)
    assert found.size_bytes() == size_bytes(weight.shape, asked, has_bias=True, kernel=kernel)
    again = quantize_layer(weight, None, fit, asked, held_out=test, seed=0, kernel=kernel)
    np.testing.assert_array_equal(again.decode(), found.decode())


def test_all_moments_are_permuted():
    rng = np.random.default_rng(5)
    f = correlated(rng, 2000, 48)
    x = 0.8 * f + 0.05 * rng.standard_normal(f.shape)
    missing = x @ rng.standard_normal((1, 48, 32)) / 4
    weight, columns = rng.standard_normal((32, 48)).astype(np.float32), rng.permutation(48)
    whole = permuted(moments(x, f, missing), columns)
    direct = moments(x[:, :, columns], f[:, :, columns], missing)
    stored = weight[:, columns]
    rounded = stored.round(1)
    assert relative_error(stored, None, rounded, None, whole) == pytest.approx(
        relative_error(stored, None, rounded, None, direct), rel=1e-9
    )


def test_without_whole_channels_in_a_block_it_is_refused():
    weight, fit, _ = problem()
    with pytest.raises(QuantizationError, match="blocks of 4 in rows of 48 hold no two whole channels of 3"):
        quantize_layer(weight, None, fit, Choice(4, 64, permuted=True), seed=0, kernel=3)


# -- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", CHOICES)
@pytest.mark.parametrize("name", NAMES)
def test_onnxruntime_decodes_as_numpy_does(name, form):
    before, graph = built(name), graph_of(built(name))
    ((layer,), _) = find_layers(graph)
    assert layer.is_permutable
    stated = overhead_bytes(graph, layer, dataclasses.replace(CHOICES[form], block=2 * layer.kernel))
    size = to_proto(graph).ByteSize()
    quantized = form_of(layer, CHOICES[form])
    encode(graph, layer, quantized)
    after = to_proto(graph)
    onnx.checker.check_model(after, full_check=True)
    assert_decoded(before, after, layer, quantized)
    (found,) = find_codebooks(graph)
    assert found.weight.name == "W" and found.order is not None
    assert found.order.values.size == layer.length // layer.kernel
    header = 14 + 2 * len(layer.uses[0].view.shape)
    assert abs(after.ByteSize() - (size - layer.stored_bytes + found.stored_bytes + stated)) <= 75 + header


@pytest.mark.parametrize("name", ["wide gemm", "wide matmul", "wide conv"])
def test_long_orders_are_of_runs(name):
    texts = {
        "wide gemm": ("g (float[2,960] x) => (float[?,?] y) { y = Gemm<transB = 1>(x, W) }", (12, 960)),
        "wide matmul": ("g (float[2,960] x) => (float[?,?] y) { y = MatMul(x, W) }", (960, 12)),
        "wide conv": ("g (float[1,512,2,2] x) => (float[?,?,?,?] y) { y = Conv(x, W) }", (4, 512, 2, 2)),
    }
    text, shape = texts[name]
    before = model(text, opset=17, ir_version=8, W=rand(*shape))
    graph = graph_of(model(text, opset=17, ir_version=8, W=rand(*shape)))
    ((layer,), _) = find_layers(graph)
    quantized = form_of(layer, CHOICES["float16"])
    assert quantized.order.ndim == 2 and quantized.order.dtype == np.uint8
    encode(graph, layer, quantized)
    after = to_proto(graph)
    onnx.checker.check_model(after, full_check=True)
    assert_decoded(before, after, layer, quantized)
    assert find_codebooks(graph)[0].order.values.shape == quantized.order.shape
    assert not optimize(after, measure_latency=False).passes.rewrites


NET = """g (float[N,16,6,6] x) => (float[?,?] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, W1, b1)
    r = Relu(a)
    c = Conv(r, W2)
    p = GlobalAveragePool(c)
    f = Flatten(p)
    g = MatMul(f, W4)
    y = Gemm<transB = 1>(g, W5, b5)
}"""


def net():
    weights = {"W1": rand(12, 16, 3, 3), "b1": rand(12), "W2": rand(24, 12, 1, 1), "W4": rand(24, 320)}
    return model(NET, opset=17, ir_version=8, **weights, W5=rand(12, 320), b5=rand(12))


def encoded_net(proto=None):
    graph = graph_of(proto or net())
    layers, refusals = find_layers(graph)
    assert not refusals
    for layer in layers:
        encode(graph, layer, form_of(layer, CHOICES["int8"]))
    return graph


def test_passes_leave_it_alone():
    graph = encoded_net()
    encoded, stored = to_proto(graph), len(decoding_nodes(graph))
    first = optimize(encoded, measure_latency=False)
    assert not first.dropped and len(decoding_nodes(load(first.model))) == stored
    assert all(weight.order is not None for weight in find_codebooks(load(first.model)))
    assert optimize(first.model, measure_latency=False).passes.rewrites == 0
    layers, refusals = find_layers(load(first.model))
    assert not layers and [refusal.reason for refusal in refusals] == ["it is a codebook already"] * 4


def test_decoded_together_it_is_the_same():
    graph = encoded_net()
    before, nodes = to_proto(graph), len(graph.nodes)
    feeds = {"x": rand(2, 16, 6, 6)}
    expected = run(before, feeds)
    pack(graph, lambda tensor: False)
    after = to_proto(graph)
    onnx.checker.check_model(after, full_check=True)
    assert len(graph.nodes) < nodes
    for actual, wanted in zip(run(after, feeds), expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)
    stored = len(decoding_nodes(graph))
    first = optimize(after, measure_latency=False)
    assert len(decoding_nodes(load(first.model))) == stored and first.passes.rewrites == 0


# -- planning, and going on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shaving", [Shaving.NONE, Shaving.NAMES, Shaving.PACKED])
def test_size_is_known_to_the_byte(tmp_path, shaving):
    save(graph_of(net()), tmp_path / "net.onnx")
    graph = load(tmp_path / "net.onnx")
    layers, _ = find_layers(graph)
    forms = {layer.name: dataclasses.replace(CHOICES["int8"], block=2 * layer.kernel) for layer in layers}
    planner = Planner(tmp_path / "net.onnx", 1 << 20, layers, [Menu(layer.name, []) for layer in layers])
    expected = planner._exact_size(forms, shaving)
    for layer in layers:
        encode(graph, layer, form_of(layer, CHOICES["int8"]))
    finish(graph, shaving)
    assert save(graph, tmp_path / "small.onnx") == expected


def test_checkpoint_keeps_the_order(tmp_path):
    ((layer,), _) = find_layers(graph_of(built("conv")))
    kept = Checkpoint(tmp_path / "kept", {"what": "a test"})
    quantized = form_of(layer, CHOICES["int8"])
    kept.save_layer("one", quantized)
    found = kept.load_layer("one")
    assert isinstance(found, QuantizedLayer) and found.choice == quantized.choice
    np.testing.assert_array_equal(found.decode(), quantized.decode())


def test_hollow_form_has_its_bytes():
    ((layer,), _) = find_layers(graph_of(built("conv")))
    quantized = form_of(layer, CHOICES["int8"])
    assert hollow(layer, quantized.choice).size_bytes() == quantized.size_bytes()


def test_the_twin_decodes_it_and_tunes_its_codewords(tmp_path):
    torch = pytest.importorskip("torch")
    from onnxcompress.train.codebook_finetune import TuneSettings, tune
    from onnxcompress.train.torch_graph import TorchGraph

    proto = net()
    (tmp_path / "float.onnx").write_bytes(proto.SerializeToString())
    graph = encoded_net(proto)
    feeds = [{"x": rand(4, 16, 6, 6)} for _ in range(3)]
    (expected,) = run(to_proto(graph), feeds[0])
    (found,) = TorchGraph(graph)({"x": torch.from_numpy(feeds[0]["x"])}).values()
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=3e-6 * np.abs(expected).max())  # 2.9e-7
    orders = [one.order.values.copy() for one in find_codebooks(graph)]
    settings = TuneSettings(steps=8, batch=4)
    done = tune(graph, feeds[:2], feeds[2:], reference_model=tmp_path / "float.onnx", settings=settings)
    assert done.after < done.before and done.changed
    tuned = find_codebooks(graph)
    assert {str(one.codebook.name) for one in tuned} <= set(done.changed)
    for one, order in zip(tuned, orders, strict=True):
        np.testing.assert_array_equal(one.order.values, order)
