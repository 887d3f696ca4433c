"""Which weights a codebook can hold, and as what matrix."""

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxcompress.codebook.layers import find_layers
from onnxcompress.codebook.rows import Rows
from onnxcompress.model_io import load
from onnxcompress.testing import graph_of, model, run

RNG = np.random.default_rng(0)


def rand(*shape, dtype=np.float32):
    return RNG.normal(size=shape).astype(dtype)


def layers_of(text, opset=17, **weights):
    return find_layers(graph_of(model(text, opset=opset, **weights)))


def only_layer(text, opset=17, **weights):
    layers, refusals = layers_of(text, opset=opset, **weights)
    assert len(layers) == 1 and not refusals, (layers, refusals)
    return layers[0]


OPERATORS = {
    "conv": ("g (float[2,6,9,8] x) => (float[?,?,?,?] y) { y = Conv(x, W, b) }", (4, 6, 3, 2), 4),
    "strided": (
        "g (float[2,6,9,8] x) => (float[?,?,?,?] y) "
        "{ y = Conv<strides = [2, 1], pads = [1, 0, 2, 1], dilations = [1, 2], group = 2>(x, W, b) }",
        (4, 3, 3, 2),
        4,
    ),
    "conv1d": ("g (float[2,6,9] x) => (float[?,?,?] y) { y = Conv<pads = [2, 0]>(x, W, b) }", (4, 6, 3), 4),
    "conv3d": ("g (float[2,2,5,4,6] x) => (float[?,?,?,?,?] y) { y = Conv(x, W, b) }", (4, 2, 3, 2, 2), 4),
    "same": (
        'g (float[2,6,9,8] x) => (float[?,?,?,?] y) { y = Conv<auto_pad = "SAME_LOWER", strides = [2, 3]>(x, W, b) }',
        (4, 6, 4, 2),
        4,
    ),
    "depthwise": ("g (float[2,6,9,8] x) => (float[?,?,?,?] y) { y = Conv<group = 6>(x, W, b) }", (6, 1, 3, 3), 6),
    "transpose": (
        "g (float[2,6,5,4] x) => (float[?,?,?,?] y) "
        "{ y = ConvTranspose<strides = [2, 3], pads = [1, 0, 0, 2], output_padding = [1, 2]>(x, W, b) }",
        (6, 4, 3, 2),
        4,
    ),
    "transpose groups": (
        "g (float[2,6,5,4] x) => (float[?,?,?,?] y) { y = ConvTranspose<group = 2, dilations = [2, 1]>(x, W, b) }",
        (6, 2, 3, 2),
        4,
    ),
    "transpose cut": (
        "g (float[2,6,5] x) => (float[?,?,?] y) { y = ConvTranspose<pads = [2, 1]>(x, W, b) }",
        (6, 4, 2),
        4,
    ),
    "transpose same": (
        'g (float[2,6,5] x) => (float[?,?,?] y) { y = ConvTranspose<auto_pad = "SAME_UPPER", strides = [2]>(x, W, b) }',
        (6, 4, 3),
        4,
    ),
    "transpose shape": (
        "g (float[2,6,5] x) => (float[?,?,?] y) { y = ConvTranspose<output_shape = [12], strides = [3]>(x, W, b) }",
        (6, 4, 3),
        4,
    ),
    "gemm": ("g (float[5,6] x) => (float[?,?] y) { y = Gemm(x, W, b) }", (6, 4), 4),
    "gemm transposed": ("g (float[6,5] x) => (float[?,?] y) { y = Gemm<transA = 1, transB = 1>(x, W, b) }", (4, 6), 4),
    "matmul": ("g (float[2,5,6] x) => (float[?,?,?] y) { m = MatMul(x, W)  y = Add(b, m) }", (6, 4), 4),
    "matmul of one row": ("g (float[6] x) => (float[?] y) { m = MatMul(x, W)  y = Add(b, m) }", (6, 4), 4),
    "matmul with a batch axis": (
        "g (float[5,6] x) => (float[?,?,?] y) { m = MatMul(x, W)  y = Add(b, m) }",
        (1, 6, 4),
        4,
    ),
}


@pytest.mark.parametrize(("text", "shape", "outputs"), OPERATORS.values(), ids=OPERATORS)
def test_rows_times_matrix_is_what_the_operator_computes(text, shape, outputs):
    weight, bias = rand(*shape), rand(outputs)
    layer = only_layer(text, W=weight, b=bias)
    use = layer.uses[0]
    proto = model(text, W=weight, b=bias)
    x = rand(*[d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim])
    (expected,) = run(proto, {"x": x})
    rows = Rows(use.rows, [x])
    assert (rows.length, layer.outputs, layer.name) == (layer.length, outputs, "W")
    taken = rows.take(np.arange(rows.count))  # (groups, rows, D)
    matrix = layer.matrix().reshape(layer.groups, outputs // layer.groups, layer.length)
    made = np.einsum("gnd,god->ngo", taken, matrix).reshape(rows.count, outputs) + layer.bias()
    if expected.ndim > 2 and use.kind.startswith("Conv"):
        expected = np.moveaxis(expected, 1, -1)
    assert rows.count * outputs == expected.size
    np.testing.assert_allclose(made.reshape(expected.shape), expected, atol=2e-5)  # measured 3.8e-6
    np.testing.assert_array_equal(use.view.from_matrix(layer.matrix()), weight)
    assert layer.macs > 0


def test_left_operand():
    text = "g (float[2,6,5] x) => (float[?,?,?] y) { y = MatMul(W, x) }"
    weight, x = rand(4, 6), rand(2, 6, 5)
    layer = only_layer(text, W=weight)
    rows = Rows(layer.uses[0].rows, [x])
    made = rows.take(np.arange(rows.count))[0] @ layer.matrix().T
    np.testing.assert_allclose(made.reshape(2, 5, 4), np.swapaxes(weight @ x, 1, 2), atol=1e-5)  # measured 4.8e-7
    assert not layer.has_bias


def recurrent(op, gates, **attrs):
    """A recurrence of two directions with all hidden states as output, and its weights."""
    directions = {"bidirectional": 2}.get(attrs.get("direction"), 1)
    x = [3, 2, 5] if not attrs.get("layout") else [2, 3, 5]
    inputs = [helper.make_tensor_value_info("x", 1, x)]
    outputs = [helper.make_tensor_value_info("y", 1, None)]
    weights = {
        "W": rand(directions, gates * 4, 5),
        "R": rand(directions, gates * 4, 4),
        "B": rand(directions, gates * 8),
        "h": rand(*((directions, 2, 4) if not attrs.get("layout") else (2, directions, 4))),
    }
    node = helper.make_node(op, ["x", "W", "R", "B", "", "h"], ["y"], name="cell", hidden_size=4, **attrs)
    init = [helper.make_tensor(k, 1, v.shape, v.tobytes(), raw=True) for k, v in weights.items()]
    proto = helper.make_model(
        helper.make_graph([node], "g", inputs, outputs, init), ir_version=8, opset_imports=[helper.make_opsetid("", 17)]
    )
    return proto, weights, rand(*x)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_recurrence_without_gates(direction):
    """Without gates a step is tanh(W x + R h + b): the rows of W and R must give the output of that step."""
    proto, weights, x = recurrent("RNN", 1, direction=direction, activations=["Tanh"] * (1 + (direction[0] == "b")))
    layers, refusals = find_layers(load(proto))
    assert not refusals and [layer.kind for layer in layers] == ["RNN W", "RNN R"]
    w, r = layers
    (y,) = run(proto, {"x": x})  # (steps, directions, batch, hidden)
    directions = y.shape[1]
    drive = Rows(w.uses[0].rows, [x]).take(np.arange(6))[0] @ w.matrix().T + w.bias()
    states = Rows(r.uses[0].rows, [y, weights["h"]]).take(np.arange(6))
    back = np.einsum("gnd,god->ngo", states, r.matrix().reshape(directions, 4, 4)).reshape(6, -1) + r.bias()
    made = np.tanh(drive + back).reshape(3, 2, directions, 4)
    np.testing.assert_allclose(made.transpose(0, 2, 1, 3), y, atol=1e-5)  # measured 4.2e-7
    assert (r.groups, w.groups) == (directions, 1)


def test_layout_of_hidden_states():
    steps_first, batch_first = rand(3, 1, 2, 4), None
    batch_first = steps_first.transpose(2, 0, 1, 3)
    h = rand(1, 2, 4)
    proto, *_ = recurrent("LSTM", 4)
    source = find_layers(load(proto))[0][1].uses[0].rows
    other = type(source)(**{**source.__dict__, "layout": 1})
    np.testing.assert_array_equal(
        Rows(source, [steps_first, h]).take(np.arange(6)),
        Rows(other, [batch_first, h.transpose(1, 0, 2)]).take(np.arange(6)),
    )


def test_lstm_and_its_bias_halves():
    proto, weights, _ = recurrent("LSTM", 4, direction="bidirectional")
    w, r = find_layers(load(proto))[0]
    assert (w.outputs, w.length, r.outputs, r.length) == (32, 5, 32, 4)
    np.testing.assert_array_equal(w.bias(), weights["B"][:, :16].ravel())
    np.testing.assert_array_equal(r.bias(), weights["B"][:, 16:].ravel())
    bias = r.uses[0].bias
    whole = bias.with_part(np.arange(32, dtype=np.float32))
    np.testing.assert_array_equal(whole[:, 16:].ravel(), np.arange(32))
    np.testing.assert_array_equal(whole[:, :16], weights["B"][:, :16])


def test_embedding():
    layer = only_layer("g (int64[2,3] x) => (float[?,?,?] y) { y = Gather(E, x) }", E=rand(20, 6))
    assert (layer.kind, layer.outputs, layer.length, layer.has_bias) == ("Gather", 20, 6, False)


def test_weight_behind_moves():
    text = """g (float[5,6] x) => (float[?,?] y) {
        h = Cast<to = 1>(W)  t = Transpose<perm = [1, 0]>(h)  s = Constant<value_ints = [6, 4]>()  r = Reshape(t, s)
        y = MatMul(x, r)
    }"""
    weight = rand(4, 6, dtype=np.float16)
    layer = only_layer(text, W=weight)
    np.testing.assert_array_equal(layer.matrix(), weight.astype(np.float32))
    assert (layer.name, layer.stored_bytes) == ("W", 48)


def test_weight_in_a_constant_node():
    text = """g (float[1,6] x) => (float[?,?] y) {
        W = Constant<value = float[6,2] {1,2,3,4,5,6,7,8,9,10,11,12}>()  y = MatMul(x, W)
    }"""
    np.testing.assert_array_equal(only_layer(text).matrix(), np.arange(1, 13, dtype=np.float32).reshape(6, 2).T)


def test_shared_weight_is_one_layer():
    tied = """g (int64[2] i, float[5,6] x) => (float[?,?] a, float[?,?] b) {
        a = Gather(W, i)  t = Transpose(W)  b = MatMul(x, t)
    }"""
    layer = only_layer(tied, W=rand(9, 6))
    assert [use.kind for use in layer.uses] == ["Gather", "MatMul"] and not layer.has_bias
    twice = "g (float[5,6] x) => (float[?,?] y) { a = Gemm<transB = 1>(x, W, b)  y = Gemm<transB = 1>(a, W, c) }"
    layer = only_layer(twice, W=rand(6, 6), b=rand(6), c=rand(6))
    assert len(layer.uses) == 2 and layer.bias() is None


ONE = "g (float[5,6] x) => (float[?,?] y) { y = MatMul(x, W) }"
REFUSED = {
    "nan": (ONE, {"W": np.full((6, 4), np.nan, np.float32)}, "24 of 24 weights are NaN"),
    "output": (
        "g (float[5,6] x) => (float[?,?] y, float[6,4] W) { y = MatMul(x, W) }",
        {"W": rand(6, 4)},
        "graph output",
    ),
    "computed": (
        "g (float[5,6] x) => (float[?,?] y) { c = Add(W, W)  y = MatMul(x, c) }",
        {"W": rand(6, 4)},
        "computed by Add",
    ),
    "other reader": (
        "g (float[6,6] x) => (float[?,?] y) { m = MatMul(x, W)  y = Mul(m, W) }",
        {"W": rand(6, 6)},
        "Mul '' reads it too",
    ),
    "two ways": (
        "g (float[6,6] x) => (float[?,?] y) { m = MatMul(x, W)  y = Gemm<transB = 1>(m, W) }",
        {"W": rand(6, 6)},
        "different matrices",
    ),
    "int8": (
        "g (float[5,6] x) => (float[?,?] y) { W = DequantizeLinear(q, s)  y = MatMul(x, W) }",
        {"q": np.ones((6, 4), np.int8), "s": np.float32(0.1)},
        "quantized already (DequantizeLinear)",
    ),
    "int8 cast": (
        "g (float[5,6] x) => (float[?,?] y) { W = Cast<to = 1>(q)  y = MatMul(x, W) }",
        {"q": np.ones((6, 4), np.int8)},
        "stored as int8",
    ),
    "integers": (
        "g (uint8[5,6] x) => (int32[?,?] y) { y = MatMulInteger(x, W) }",
        {"W": np.ones((6, 4), np.uint8)},
        "quantized already (MatMulInteger)",
    ),
    "batch of matrices": (
        "g (float[2,5,6] x) => (float[?,?,?] y) { y = MatMul(x, W) }",
        {"W": rand(2, 6, 4)},
        "one matrix",
    ),
    "left of Gemm": ("g (float[6,5] x) => (float[?,?] y) { y = Gemm(W, x) }", {"W": rand(4, 6)}, "left operand"),
    "other axis": (
        "g (int64[2] x) => (float[?,?] y) { y = Gather<axis = 1>(W, x) }",
        {"W": rand(6, 4)},
        "rows of a table",
    ),
    "negative pad": (
        "g (float[1,4,9] x) => (float[?,?,?] y) { y = Conv<pads = [-1, 0]>(x, W) }",
        {"W": rand(4, 4, 3)},
        "negative pad",
    ),
}


@pytest.mark.parametrize(("text", "weights", "reason"), REFUSED.values(), ids=REFUSED)
def test_refusals(text, weights, reason):
    layers, refusals = layers_of(text, **weights)
    assert not layers and len(refusals) == 1 and reason in refusals[0].reason, refusals


def test_overridable_weight_is_refused():
    proto = model("g (float[5,6] x, float[6,4] W) => (float[?,?] y) { y = MatMul(x, W) }", W=rand(6, 4))
    layers, refusals = find_layers(load(proto))
    assert not layers and "override" in refusals[0].reason


@pytest.mark.parametrize(
    "text",
    [
        "g (float[5,6] x, float[6,4] w) => (float[?,?] y) { y = MatMul(x, w) }",
        "g (int64[5] x) => (int64[?] y) { y = Gather(W, x) }",
        "g (float[5] x) => (float[?,?] y) { c = MatMul(W, V)  y = Add(x, c) }",
    ],
)
def test_not_a_layer(text):
    weights = {"W": np.arange(9), "V": rand(9, 5)} if "int64" in text else {"W": rand(5, 9), "V": rand(9, 5)}
    assert layers_of(text, **weights) == ([], [])


def test_biases():
    no_bias = only_layer("g (float[5,6] x) => (float[?,?] y) { y = Gemm(x, W) }", W=rand(6, 4))
    assert no_bias.has_bias and no_bias.bias() is None
    old = only_layer("g (float[5,6] x) => (float[?,?] y) { y = Gemm(x, W, b) }", opset=9, W=rand(6, 4), b=rand(1, 4))
    assert old.bias().shape == (4,)
    scaled = only_layer(
        "g (float[5,6] x) => (float[?,?] y) { y = Gemm<alpha = 2.0>(x, W, b) }", W=rand(6, 4), b=rand(4)
    )
    assert not scaled.has_bias
    small = only_layer("g (float[5,6] x) => (float[?,?] y) { y = MatMul(x, W) }", W=rand(6, 4))
    assert not small.has_bias
    large = only_layer("g (float[5,256] x) => (float[?,?] y) { y = MatMul(x, W) }", W=rand(256, 4))
    assert large.has_bias and large.uses[0].bias.new_add
    column = only_layer(
        "g (float[4,6] x) => (float[?,?] y) { m = MatMul(x, W)  y = Add(m, b) }", W=rand(6, 4), b=rand(4, 1)
    )
    assert not column.has_bias


def test_body_of_an_if():
    text = """g (bool c, float[5,6] x) => (float[?,?] y) {
        y = If (c) <then_branch = t () => (float[?,?] a) { a = MatMul(x, W) },
                    else_branch = e () => (float[?,?] b) { b = Gemm(x, V) }>
    }"""
    layers, refusals = layers_of(text, W=rand(6, 4), V=rand(6, 4))
    assert not refusals and [layer.in_body for layer in layers] == [True, True]


def test_types():
    layer = only_layer("g (float16[5,6] x) => (float16[?,?] y) { y = MatMul(x, W) }", W=rand(6, 4, dtype=np.float16))
    assert layer.matrix().dtype == np.float32
    proto = model(
        "g (float[5,6] x) => (bfloat16[?,?] y) { h = Cast<to = 16>(x)  w = Cast<to = 16>(W)  y = MatMul(h, w) }",
        W=rand(6, 4),
    )
    _, refusals = find_layers(load(proto))
    assert "bfloat16" in refusals[0].reason
    assert TensorProto.BFLOAT16 == 16
