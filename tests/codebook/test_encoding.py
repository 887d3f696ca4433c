"""The stored form of a quantized layer: decoded to the bit by onnxruntime as by NumPy, and left alone by passes."""

import math

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from onnxcompress import optimize
from onnxcompress.codebook.codebook import Choice, QuantizedLayer, index_type
from onnxcompress.codebook.encoding import (
    HINT_KEY,
    add_low_memory_hint,
    decoding_nodes,
    encode,
    find_codebooks,
    overhead_bytes,
)
from onnxcompress.codebook.layers import find_layers
from onnxcompress.codebook.narrow import to_float16, to_int8
from onnxcompress.errors import QuantizationError
from onnxcompress.model_io import load, save, to_proto
from onnxcompress.testing import assert_equivalent, graph_of, inputs_for, model, ops, run

RNG = np.random.default_rng(0)


def rand(*shape, dtype=np.float32):
    return RNG.normal(size=shape).astype(dtype)


def random_form(layer, choice, bias=None):
    """A layer stored as chosen, with numbers that mean nothing."""
    shape = (layer.outputs, layer.length // choice.block)
    indices = RNG.integers(0, choice.codewords, shape).astype(index_type(choice.codewords))
    if choice.codebook_type == "int8":
        codebook = RNG.integers(-127, 128, (choice.codewords, choice.block)).astype(np.int8)
        scale = (rand(choice.block) ** 2 / 100).astype(np.float32)
    else:
        codebook, scale = rand(choice.codewords, choice.block, dtype=np.float16), None
    scales = (rand(layer.outputs) ** 2).astype(np.float16) if choice.scaled else None
    return QuantizedLayer(choice, codebook, scale, indices, scales, bias, 0.0, None)


def assert_decoded(before, after, layer, quantized, feeds=None):
    """onnxruntime's weight is NumPy's to the bit, and so are the outputs once it has folded the nodes at load."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(after)
    exposed.graph.output.append(onnx.ValueInfoProto(name=layer.name))
    plain = with_decoded(before, layer, quantized)
    (expected,) = (numpy_helper.to_array(t) for t in plain.graph.initializer if t.name == layer.name)
    feeds = feeds or inputs_for(before)
    actual = run(exposed, feeds)[-1]
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    np.testing.assert_array_equal(actual, expected)
    for a, b in zip(folded(plain, feeds), folded(after, feeds), strict=True):
        np.testing.assert_array_equal(a, b)


def folded(proto, feeds):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return ort.InferenceSession(proto.SerializeToString(), options).run(None, feeds)


def with_decoded(proto, layer, quantized):
    """The model with the decoded weight written back as plain numbers, where only constants stand for it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    tensor = next(t for t in copy.graph.initializer if t.name == layer.name)
    view = layer.uses[0].view
    tensor.CopyFrom(numpy_helper.from_array(view.from_matrix(quantized.decode()).astype(view_type(tensor)), layer.name))
    return copy


def view_type(tensor):
    return helper.tensor_dtype_to_np_dtype(tensor.data_type)


MODELS = {
    "conv": ("g (float[1,8,9,8] x) => (float[?,?,?,?] y) { y = Conv<group = 2>(x, W, b) }", (12, 4, 3, 3)),
    "conv with nothing to reshape": ("g (float[1,8,9] x) => (float[?,?,?] y) { y = Conv(x, W) }", (12, 8, 6)),
    "conv of one output": ("g (float[1,32,9] x) => (float[?,?,?] y) { y = Conv(x, W) }", (1, 32, 6)),
    "transpose": ("g (float[1,8,9,8] x) => (float[?,?,?,?] y) { y = ConvTranspose(x, W) }", (8, 12, 3, 3)),
    "transpose groups": (
        "g (float[1,8,9,8] x) => (float[?,?,?,?] y) { y = ConvTranspose<group = 2>(x, W) }",
        (8, 12, 3, 3),
    ),
    "gemm": ("g (float[2,48] x) => (float[?,?] y) { y = Gemm<transB = 1>(x, W, c) }", (12, 48)),
    "matmul": ("g (float[2,5,48] x) => (float[?,?,?] y) { y = MatMul(x, W) }", (48, 12)),
    "matmul of one column": ("g (float[2,5,96] x) => (float[?,?,?] y) { y = MatMul(x, W) }", (96, 1)),
    "matmul with a batch axis": ("g (float[2,5,48] x) => (float[?,?,?] y) { y = MatMul(x, W) }", (1, 48, 12)),
    "left": ("g (float[48,5] x) => (float[?,?] y) { y = MatMul(W, x) }", (12, 48)),
    "gather": ("g (int64[2,5] x) => (float[?,?,?] y) { y = Gather(W, x) }", (33, 12)),
}
BIASES = {"b": rand(12), "c": rand(12)}
CHOICES = {
    "float16": Choice(6, 32),
    "int8": Choice(3, 40, "int8"),
    "scaled": Choice(6, 24, scaled=True),
    "two bytes": Choice(2, 300, "int8", scaled=True),
    "four bits": Choice(3, 16),
}


def built(name, opset=17, ir_version=8, dtype=np.float32):
    text, shape = MODELS[name]
    weights = {"W": rand(*shape, dtype=dtype), **{k: v for k, v in BIASES.items() if f", {k})" in text}}
    return model(text, opset=opset, ir_version=ir_version, **weights)


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "gather"])
def test_onnxruntime_decodes_as_numpy_does(name, choice):
    before = built(name)
    graph = graph_of(built(name))
    ((layer,), _) = find_layers(graph)
    quantized = random_form(layer, choice)
    encode(graph, layer, quantized)
    after = to_proto(graph)
    onnx.checker.check_model(after, full_check=True)
    assert_decoded(before, after, layer, quantized)
    (found,) = find_codebooks(graph)
    assert found.weight.name == "W" and found.stored_bytes == quantized.size_bytes() - unpacked(found, quantized)
    assert set(found.nodes) == decoding_nodes(graph) and [node.op for node in found.readers] == [layer.uses[0].node.op]
    assert len(graph.nodes) == len(found.nodes) + len(before.graph.node)


def unpacked(found, quantized):
    """Bytes that 4 bits would have saved, were there enough indices."""
    return 0 if quantized.choice.codewords > 16 or found.packed else quantized.size_bytes() - found.stored_bytes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", ["int8", "float16"])
def test_narrow_forms(name, form):
    before = built(name)
    graph = graph_of(built(name))
    ((layer,), _) = find_layers(graph)
    quantized = (to_int8 if form == "int8" else to_float16)(layer.matrix())
    encode(graph, layer, quantized)
    after = to_proto(graph)
    onnx.checker.check_model(after, full_check=True)
    assert_decoded(before, after, layer, quantized)
    moved = ["Reshape", "Transpose", "Reshape"] if (form, name) == ("int8", "transpose groups") else []
    assert ops(after)[:-1] == (["Cast", "Mul"] if form == "int8" else ["Cast"]) + moved
    assert decoding_nodes(graph) == set(graph.nodes) - {layer.uses[0].node}
    arrays = {t.name: t.nbytes for node in graph.nodes for t in node.inputs if t.name[:2] == "W/"}
    assert sum(arrays.values()) == quantized.size_bytes()


@pytest.mark.parametrize("packs", ["outputs", "blocks", "neither"])
def test_two_indices_in_a_byte(packs):
    outputs, inputs = {"outputs": (24, 63), "blocks": (25, 60), "neither": (25, 63)}[packs]
    before = model("g (float[2,N] x) => (float[?,?] y) { y = Gemm<transB = 1>(x, W) }", W=rand(outputs, inputs))
    graph = load(before)
    layer = find_layers(graph)[0][0]
    quantized = random_form(layer, Choice(1, 16))
    size = to_proto(graph).ByteSize()
    encode(graph, layer, quantized)
    (found,) = find_codebooks(graph)
    assert found.packed == (packs != "neither")
    after = to_proto(graph)
    saved = outputs * inputs // 2 if found.packed else 0
    assert found.indices.nbytes == outputs * inputs - saved
    assert after.ByteSize() < size - 3 * outputs * inputs - saved + 700
    assert_decoded(before, after, layer, quantized, {"x": rand(2, inputs)})


def test_uint4_from_opset_21_on():
    before = built("gemm", opset=21, ir_version=10)
    graph = graph_of(built("gemm", opset=21, ir_version=10))
    ((layer,), _) = find_layers(graph)
    quantized = random_form(layer, Choice(3, 16))
    encode(graph, layer, quantized)
    (found,) = find_codebooks(graph)
    assert found.indices.dtype.name == "uint4" and found.stored_bytes == quantized.size_bytes()
    assert_decoded(before, to_proto(graph), layer, quantized)


@pytest.mark.parametrize("opset", [7, 9, 12, 17])
@pytest.mark.parametrize("codewords", [16, 40])
def test_old_opsets(opset, codewords):
    before = built("conv", opset=opset)
    graph = graph_of(built("conv", opset=opset))
    if opset < 9:  # the initializers are inputs as well
        before = with_inputs(before)
        graph = graph_of(with_inputs(built("conv", opset=opset)))
    ((layer,), _) = find_layers(graph)
    quantized = random_form(layer, Choice(1, codewords, "int8", scaled=True))
    encode(graph, layer, quantized)
    after = to_proto(graph)
    onnx.checker.check_model(after)
    feeds = {"x": rand(1, 8, 9, 8)}
    (expected,), (actual,) = run(with_decoded(before, layer, quantized), feeds), run(after, feeds)
    np.testing.assert_array_equal(actual, expected)


def with_inputs(proto):
    """The form of IR 3: initializers are listed as inputs, and nobody can override them."""
    proto.ir_version = 3
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return proto


def test_opset_6_is_refused():
    proto = model("g (float[2,8] x) => (float[?,?] y) { y = MatMul(x, W) }", opset=6, W=rand(8, 12))
    layers, (refusal,) = find_layers(graph_of(with_inputs(proto)))
    assert not layers and refusal.reason == "opset 6 cannot decode a weight, 7 is needed"


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types(dtype):
    kind = {np.float16: "float16", np.float64: "double"}[dtype]
    text = f"g ({kind}[2,48] x) => ({kind}[?,?] y) {{ m = MatMul(x, W) y = Add(m, b) }}"
    weights = {"W": rand(48, 12, dtype=dtype), "b": rand(12, dtype=dtype)}
    before = model(text, **weights)
    for form in (CHOICES["scaled"], "int8", "float16"):
        graph = graph_of(model(text, **weights))
        ((layer,), _) = find_layers(graph)
        if form == "float16":
            quantized = to_float16(layer.matrix())
        else:
            quantized = to_int8(layer.matrix()) if form == "int8" else random_form(layer, form)
        encode(graph, layer, quantized)
        assert_decoded(before, to_proto(graph), layer, quantized)
        assert len(decoding_nodes(graph)) == len(graph.nodes) - 2


def test_weight_behind_moves_and_shared():
    text = """g (int64[2] i, float[5,6] x) => (float[?,?] a, float[?,?] b) {
        h = Cast<to = 1>(W)  a = Gather(h, i)  t = Transpose(h)  b = MatMul(x, t)
    }"""
    weight = rand(20, 6, dtype=np.float16)
    graph = graph_of(model(text, W=weight))
    ((layer,), _) = find_layers(graph)
    quantized = random_form(layer, Choice(3, 8))
    encode(graph, layer, quantized)
    after = to_proto(graph)
    feeds = {"i": np.array([3, 19]), "x": rand(5, 6)}
    a, b = run(after, feeds)
    decoded = quantized.decode()
    np.testing.assert_array_equal(a, decoded[[3, 19]])
    np.testing.assert_allclose(b, feeds["x"] @ decoded.T, rtol=1e-5, atol=1e-5)  # measured 4.8e-7
    assert ops(after) == ["Cast", "Cast", "Gather", "Reshape", "Reshape", "Transpose", "Gather", "MatMul"]
    assert {t.name for t in after.graph.initializer} == {"W/codebook", "W/indices", "20x6"}


def test_recurrence_and_its_bias():
    from tests.codebook.test_layers import recurrent

    proto, weights, x = recurrent("LSTM", 4, direction="bidirectional")
    graph = load(proto)
    w, r = find_layers(graph)[0]
    first, second = random_form(w, Choice(5, 8), bias=rand(32)), to_int8(r.matrix(), bias=rand(32))
    for layer, quantized in ((w, first), (r, second)):
        encode(graph, layer, quantized)
    plain = recurrent("LSTM", 4, direction="bidirectional")[0]
    bias = np.concatenate([first.bias.reshape(2, 16), second.bias.reshape(2, 16)], axis=1)
    new = {"W": first.decode().reshape(2, 16, 5), "R": second.decode().reshape(2, 16, 4), "B": bias, "h": weights["h"]}
    del plain.graph.initializer[:]
    plain.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in new.items())
    assert_equivalent(plain, to_proto(graph), feeds=[{"x": x}])


def test_weight_in_a_body():
    text = """g (bool c, float[5,6] x) => (float[?,?] y) {
        y = If (c) <then_branch = t () => (float[?,?] a) { a = MatMul(x, W) },
                    else_branch = e () => (float[?,?] b) { k = Constant<value_ints = [6, 12]>()  v = Reshape(V, k)
                                                           b = Gemm(x, v) }>
    }"""
    weights = {"W": rand(6, 12), "V": rand(12, 6)}
    graph = graph_of(model(text, **weights))
    layers, _ = find_layers(graph)
    forms = [random_form(layer, Choice(2, 8)) for layer in layers]
    for layer, quantized in zip(layers, forms, strict=True):
        encode(graph, layer, quantized)
    after = to_proto(graph)
    onnx.checker.check_model(after, full_check=True)
    x = rand(5, 6)
    for flag, quantized in zip((True, False), forms, strict=True):
        (y,) = run(after, {"c": np.array(flag), "x": x})
        np.testing.assert_allclose(y, x @ quantized.decode().T, rtol=1e-5, atol=1e-5)  # measured 9.5e-7


# -- biases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shape", "new_node"),
    [
        ("g (float[2,300] x) => (float[?,?] y) { y = Gemm<transB = 1>(x, W) }", (4, 300), 0),
        ("g (float[2,300] x) => (float[?,?] y) { y = Gemm<transB = 1>(x, W, b) }", (4, 300), 0),
        ("g (float[2,300] x) => (float[?,?] y) { m = MatMul(x, W)  y = Add(b, m) }", (300, 4), 0),
        ("g (float[2,300] x) => (float[?,?] y) { y = MatMul(x, W) }", (300, 4), 1),
        (
            "g (float[2,300] x) => (float[?,?] y, float[?,?] z) { y = Gemm<transB = 1>(x, W, b)  z = Add(y, b) }",
            (4, 300),
            0,
        ),
    ],
)
def test_bias_is_written(text, shape, new_node):
    weights = {"W": rand(*shape)} | ({"b": rand(4)} if "b" in text.split("{")[1].replace("transB", "") else {})
    before = model(text, **weights)
    graph = graph_of(model(text, **weights))
    ((layer,), _) = find_layers(graph)
    bias = rand(4)
    encode(graph, layer, to_int8(layer.matrix(), bias))
    after = to_proto(graph)
    onnx.checker.check_model(after, full_check=True)
    assert len(after.graph.node) == len(before.graph.node) + 2 + new_node
    x = rand(2, 300)
    expected = x @ to_int8(layer.matrix()).decode().T + bias
    results = run(after, {"x": x})
    np.testing.assert_allclose(results[0], expected, rtol=1e-5, atol=1e-4)  # measured 7.6e-6
    if len(results) > 1:  # who else reads the old bias reads it still
        np.testing.assert_array_equal(results[1], results[0] + weights["b"])


def test_bias_of_zeros_is_not_added():
    graph = graph_of(built("conv with nothing to reshape"))
    ((layer,), _) = find_layers(graph)
    encode(graph, layer, to_int8(layer.matrix(), np.zeros(12, np.float32)))
    assert len(layer.uses[0].node.inputs) == 2


def test_bias_without_a_place_is_refused():
    graph = graph_of(built("matmul"))
    ((layer,), _) = find_layers(graph)
    with pytest.raises(QuantizationError, match="no place for a bias"):
        encode(graph, layer, to_int8(layer.matrix(), rand(12)))


# -- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv", "transpose groups", "matmul", "gather"])
@pytest.mark.parametrize("form", [*CHOICES, "narrow int8", "narrow float16"])
def test_size_on_disk_is_payload_and_stated_overhead(name, form, tmp_path):
    graph = graph_of(built(name))
    old = save(graph, tmp_path / "old.onnx")
    ((layer,), _) = find_layers(graph)
    choice = CHOICES.get(form) or form.removeprefix("narrow ")
    stated = overhead_bytes(graph, layer, choice)
    narrow = {"int8": to_int8, "float16": to_float16}
    quantized = random_form(layer, choice) if isinstance(choice, Choice) else narrow[choice](layer.matrix())
    encode(graph, layer, quantized)
    new = save(graph, tmp_path / "new.onnx")
    payload = quantized.size_bytes()
    if isinstance(choice, Choice):
        payload = find_codebooks(graph)[0].stored_bytes
    header = 14 + 2 * len(layer.uses[0].view.shape)  # of the weight that is gone
    assert abs(new - (old - layer.stored_bytes + payload + stated)) <= 60 + header


def test_long_names_stand_in_the_file_twice_and_shapes_once():
    long = "a/weight/whose/name/is/as/long/as/exporters/like/them"
    text = """g (float[1,8,9,8] x) => (float[?,?,?,?] y) {
        a = Conv<pads = [1, 1, 1, 1]>(x, W)  y = Conv<pads = [1, 1, 1, 1]>(a, V)
    }"""
    proto = model(text, W=rand(8, 8, 3, 3), V=rand(8, 8, 3, 3))
    for tensor, node, name in zip(proto.graph.initializer, proto.graph.node, (long, f"{long}_2"), strict=True):
        tensor.name = node.input[1] = name
    graph = graph_of(proto)
    for layer in find_layers(graph)[0]:
        encode(graph, layer, random_form(layer, Choice(9, 12, scaled=True)))
    after = to_proto(graph)
    onnx.checker.check_model(after, full_check=True)
    names = [t.name for t in after.graph.initializer]
    assert sorted(names) == sorted(
        [*(f"{w}/{part}" for w in ("w", "w_1") for part in ("codebook", "indices", "scales")), "8x8x3x3"]
    )
    assert after.SerializeToString().count(f"{long}_2".encode()) == 2
    assert {weight.weight.name for weight in find_codebooks(graph)} == {long, f"{long}_2"}


def test_hint_is_kept_once(tmp_path):
    graph = graph_of(built("conv"))
    for _ in range(2):
        add_low_memory_hint(graph)
    save(graph, tmp_path / "m.onnx")
    kept = [entry for entry in onnx.load(tmp_path / "m.onnx").metadata_props if entry.key == HINT_KEY]
    assert len(kept) == 1 and "constant_folding_max_output_size" in kept[0].value


# -- passes ----------------------------------------------------------------------------------------------------------

NET = """g (float[N,8,12,12] x) => (float[?,?] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, W1, b1)
    n = BatchNormalization(a, s, t, m, v)
    r = Relu(n)
    c = Conv(r, W2)
    d = ConvTranspose(c, W3)
    p = GlobalAveragePool(d)
    f = Flatten(p)
    g = MatMul(f, W4)
    h = Add(g, b4)
    k = Gemm(h, W5, b5)
    y = Softmax(k)
}"""


def net():
    weights = {
        "W1": rand(12, 8, 3, 3),
        "b1": rand(12),
        "s": rand(12),
        "t": rand(12),
        "m": rand(12),
        "v": rand(12) ** 2,
        "W2": rand(12, 12, 1, 1),
        "W3": rand(12, 6, 2, 2),
        "W4": rand(6, 12),
        "b4": rand(12),
        "W5": rand(12, 6),
        "b5": rand(6),
    }
    return model(NET, **weights)


@pytest.mark.parametrize("forms", ["codebooks", "int8", "float16", "small codebooks"])
def test_optimize_leaves_decoding_alone(forms):
    graph = graph_of(net())
    layers, _ = find_layers(graph)
    for i, layer in enumerate(layers):
        choice = (
            list(CHOICES.values())[i] if forms == "codebooks" else Choice(2, 4, "int8" if i % 2 else "float16", i > 2)
        )
        narrow = {"int8": to_int8, "float16": to_float16}.get(forms)
        quantized = narrow(layer.matrix()) if narrow else random_form(layer, choice)
        encode(graph, layer, quantized)
    encoded = to_proto(graph)
    stored = len(decoding_nodes(graph))
    first = optimize(encoded, measure_latency=False)
    assert not first.dropped
    assert len(decoding_nodes(load(first.model))) == stored
    if "codebooks" in forms:
        assert len(find_codebooks(load(first.model))) == len(layers) == 5
    second = optimize(first.model, measure_latency=False)
    assert second.passes.rewrites == 0
    assert math.isclose(first.model.ByteSize(), encoded.ByteSize(), rel_tol=0.2)
    layers, refusals = find_layers(load(first.model))
    if forms == "float16":  # may still become a codebook
        assert len(layers) == 5 and not refusals
    else:
        assert not layers and len(refusals) == 5
        assert all(("codebook" if "codebook" in forms else "int8") in refusal.reason for refusal in refusals)


# -- tables ----------------------------------------------------------------------------------------------------------

ONE_READER = "g (int64[2,3] i) => (float[2,3,12] y) { y = Gather(W, i) }"
TWO_READERS = "g (int64[2,3] i, int64[K] j) => (float[2,3,12] y, float[K,12] z) { y = Gather(W, i)  z = Gather(W, j) }"


@pytest.mark.parametrize("text", [ONE_READER, TWO_READERS])
@pytest.mark.parametrize("choice", [Choice(3, 16), Choice(4, 16), Choice(3, 40, "int8", scaled=True), Choice(2, 300)])
def test_of_a_table_only_rows_are_decoded(text, choice):
    graph = graph_of(model(text, W=rand(1500, 12)))
    ((layer,), _) = find_layers(graph)
    quantized = random_form(layer, choice)
    encode(graph, layer, quantized)
    after = to_proto(graph)
    onnx.checker.check_model(after, full_check=True)
    feeds = {"i": np.array([[1, -1, 3], [0, 2, 1499]]), "j": np.array([5, -7])}
    feeds = {name: ids for name, ids in feeds.items() if name in [value.name for value in after.graph.input]}
    for actual, ids in zip(run(after, feeds), feeds.values(), strict=True):
        np.testing.assert_array_equal(actual, quantized.decode()[ids])
    found = find_codebooks(graph)
    assert [weight.weight.name for weight in found] == [value.name for value in after.graph.output]
    layers, refusals = find_layers(load(after))
    assert not layers and all(refusal.reason == "it is a codebook already" for refusal in refusals)
    assert not optimize(after, measure_latency=False).passes.rewrites


def test_a_table_is_not_decoded_at_load(tmp_path):
    graph = graph_of(model(ONE_READER, W=rand(1500, 12)))
    ((layer,), _) = find_layers(graph)
    encode(graph, layer, random_form(layer, Choice(3, 40)))
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    ort.InferenceSession(to_proto(graph).SerializeToString(), options)
    sizes = [math.prod(tensor.dims) for tensor in onnx.load(tmp_path / "loaded.onnx").graph.initializer]
    assert max(sizes) == 1500 * 4
