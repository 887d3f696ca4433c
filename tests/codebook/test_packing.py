"""Weights and vectors decoded together: the same numbers as one by one, fewer bytes, and left alone by passes."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnxcompress import optimize
from onnxcompress.codebook.codebook import Choice, QuantizedLayer, index_type
from onnxcompress.codebook.encoding import encode
from onnxcompress.codebook.layers import find_layers
from onnxcompress.codebook.levels import LEVELS, fit_levels
from onnxcompress.codebook.shaving import Shaving, shave
from onnxcompress.model_io import load, to_proto
from onnxcompress.patterns.decoded_weights import decoding_nodes, unpacked_weights
from onnxcompress.testing import model, run

RNG = np.random.default_rng(0)
TEXT = """g (float[N,8,9,9] x) => (float[N,10] y) {
    a = Conv<pads = [1, 1, 1, 1], kernel_shape = [3, 3]>(x, W1, b1)
    c = Conv<pads = [1, 1, 1, 1], group = 24, kernel_shape = [3, 3]>(a, K1, c1)
    d = Conv<pads = [1, 1, 1, 1], group = 24, kernel_shape = [3, 3]>(c, K2, c2)
    r = Relu(d)
    e = Conv(r, W2, b2)
    p = GlobalAveragePool(e)
    f = Flatten(p)
    m = MatMul(f, W3)
    n = Add(m, b3)
    y = Gemm<transB = 1>(n, W4, b4)
}"""
SHAPES = {"W1": (24, 8, 3, 3), "K1": (24, 1, 3, 3), "K2": (24, 1, 3, 3), "W2": (64, 24, 1, 1), "W3": (64, 32)}
SHAPES |= {"W4": (10, 32), "b1": (24,), "c1": (24,), "c2": (24,), "b2": (64,), "b3": (32,), "b4": (10,)}


def rand(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def network(opset=17):
    return model(TEXT, opset=opset, **{name: rand(*shape) for name, shape in SHAPES.items()})


CHOICES = {
    "own": {"W1": Choice(9, 16), "K1": Choice(9, 40), "W2": Choice(4, 256, "int8", True), "W3": Choice(8, 16)},
    "shared": {
        **dict.fromkeys(("K1", "K2"), Choice(9, 64, "int8", True, True)),
        **dict.fromkeys(("W1", "W2", "W3"), Choice(8, 256, "int8", True, True)),
        "W4": Choice(2, 16, "int8", True, True),
    },
    "odd": {"W4": Choice(32, 16), "K1": Choice(9, 16), "W2": Choice(8, 300)},
}
CODEBOOKS = {}


def stored(layer, choice):
    """A layer stored as chosen, with numbers that mean nothing; a shared codebook is the same each time."""

    def fresh():
        if choice.codebook_type == "int8":
            values = RNG.integers(-127, 128, (choice.codewords, choice.block)).astype(np.int8)
            return values, (rand(choice.block) ** 2 / 100 + 1e-3).astype(np.float32)
        return rand(choice.codewords, choice.block).astype(np.float16), None

    codebook, factors = CODEBOOKS.setdefault((choice, layer.depthwise), fresh()) if choice.shared else fresh()
    shape = layer.outputs, layer.length // choice.block
    indices = RNG.integers(0, choice.codewords, shape).astype(index_type(choice.codewords))
    scales = (rand(layer.outputs) ** 2 + 0.1).astype(np.float16) if choice.scaled else None
    return QuantizedLayer(choice, codebook, factors, indices, scales, rand(layer.outputs), 0.0, None)


def quantized(forms, opset=17, amount=Shaving.NONE, state=0):
    global RNG  # the same numbers for every amount
    RNG = np.random.default_rng(state)
    CODEBOOKS.clear()
    graph = load(network(opset))
    for layer in find_layers(graph)[0]:
        if layer.name in CHOICES[forms]:
            encode(graph, layer, stored(layer, CHOICES[forms][layer.name]))
    shave(graph, amount)
    return to_proto(graph)


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("forms", CHOICES)
def test_the_same_weights_in_fewer_bytes(forms, opset):
    apart, plain = (quantized(forms, opset, amount) for amount in (Shaving.NONE, Shaving.NAMES))
    packed = quantized(forms, opset, Shaving.PACKED)
    onnx.checker.check_model(packed, full_check=True)
    assert packed.ByteSize() < plain.ByteSize() < apart.ByteSize()
    feeds = {"x": rand(2, 8, 9, 9)}
    (expected,), (actual,) = run(apart, feeds), run(packed, feeds)
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert error < 2e-3  # biases and factors in float16: measured 2.1e-4
    named = [node.name for node in packed.graph.node if node.name]
    assert named == [node.name for node in apart.graph.node if node.name]


def test_uint4_indices_stay_uint4():
    proto = network(21)
    proto.ir_version = 10
    graph = load(proto)
    for layer in find_layers(graph)[0]:
        if layer.name in ("W1", "W2"):
            encode(graph, layer, stored(layer, Choice(8, 16)))
    shave(graph, Shaving.PACKED)
    packed = to_proto(graph)
    kinds = {t.data_type for t in packed.graph.initializer if t.name.startswith("indices")}
    assert kinds == {onnx.TensorProto.UINT4}
    assert run(packed, {"x": rand(1, 8, 9, 9)})[0].shape == (1, 10)


def test_one_codebook_for_many_layers():
    packed = quantized("shared", amount=Shaving.PACKED)
    names = [t.name for t in packed.graph.initializer]
    assert sorted(n for n in names if n.startswith("codebook")) == sorted(
        f"{kind}_{name}" for kind in ("codebook", "codebook_scale") for name in ("9x64_kernels", "8x256", "2x16")
    )
    assert [n for n in names if n.startswith("indices")] == ["indices", "indices_1"]  # of one byte, and of four bits


@pytest.mark.parametrize("forms", CHOICES)
def test_onnxruntime_folds_it_at_load(forms, tmp_path):
    packed = quantized(forms, amount=Shaving.PACKED)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    ort.InferenceSession(packed.SerializeToString(), options)
    left = {node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node}
    assert not left & {"Cast", "Split", "Div", "Concat"}


@pytest.mark.parametrize("amount", [Shaving.PLAIN, Shaving.NAMES, Shaving.PACKED])
@pytest.mark.parametrize("forms", CHOICES)
def test_a_second_optimize_changes_nothing(forms, amount):
    first = optimize(quantized(forms, amount=amount), measure_latency=False)
    assert not first.dropped
    small = quantized(forms, amount=amount)
    assert first.model.ByteSize() <= small.ByteSize() + 64
    again = optimize(first.model, measure_latency=False)
    assert again.passes.rewrites == 0
    if amount == Shaving.PACKED or forms != "shared":  # the codewords of layers that share them are widened once
        assert len(decoding_nodes(load(first.model))) == len(decoding_nodes(load(small)))
    if amount == Shaving.PACKED:
        layers, refusals = find_layers(load(first.model))
        assert len(layers) == 6 - len(CHOICES[forms])
        assert len(refusals) == len(CHOICES[forms]) and all("codebook" in one.reason for one in refusals)


def test_biases_behind_a_cast_stay_small():
    proto = model("g (float[N,64] x) => (float[N,64] y) { w = Cast<to = 1>(b)  y = Gemm(x, W, w) }",
                  W=rand(64, 64), b=rand(64).astype(np.float16))  # fmt: skip
    done = optimize(proto, measure_latency=False)
    assert [node.op_type for node in done.model.graph.node] == ["Cast", "Gemm"]


def test_what_is_no_bias_is_folded():
    proto = model("g (float[N,64] x) => (float[N,64] y) { w = Cast<to = 1>(b)  v = Exp(w)  y = Gemm(x, W, v) }",
                  W=rand(64, 64), b=rand(64).astype(np.float16))  # fmt: skip
    done = optimize(proto, measure_latency=False)
    assert [node.op_type for node in done.model.graph.node] == ["Gemm"]


def test_unpacked_weights_are_what_operators_read():
    graph = load(quantized("shared", amount=Shaving.PACKED))
    assert len(unpacked_weights(graph)) == len(SHAPES) - 1
    assert "b4" in {t.name for t in to_proto(graph).graph.initializer}  # of ten numbers each counts


# -- levels ----------------------------------------------------------------------------------------------------------


def test_levels_serve_small_vectors_too():
    vectors = [size * rand(300) for size in (1e-3, 1.0, 30.0)]
    levels, numbers = fit_levels(vectors)
    assert levels.shape == (LEVELS,) and levels.dtype == np.float16 and numbers.dtype == np.uint8
    assert np.all(np.diff(levels.astype(np.float32)) >= 0)
    decoded = np.split(levels.astype(np.float32)[numbers], 3)
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(decoded, vectors, strict=True)]
    assert max(errors) < 0.03  # measured 0.0144; rounding to 256 even steps would leave nothing of the first


def test_few_numbers_are_exact():
    levels, numbers = fit_levels([np.array([1.0, -2.0, 0.5, 1.0], np.float32), np.zeros(3, np.float32)])
    np.testing.assert_array_equal(levels.astype(np.float32)[numbers], [1, -2, 0.5, 1, 0, 0, 0])
    levels, numbers = fit_levels([np.full(5, 0.25, np.float32)])
    assert (levels[numbers] == 0.25).all()
