"""Arithmetic, activations, linear operators, pools, normalizations and reductions of the trainable twin.

Values are those that the onnx package ships for its node tests, and onnxruntime's for random attributes; gradients are
compared with finite differences in float64.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcompress import testing
from onnxcompress.errors import DataError, ModelError
from onnxcompress.testing import graph_of

torch = pytest.importorskip("torch")

from onnxcompress.train.ops import activations, elementwise, linear, normalization, pooling, reduction  # noqa: E402
from onnxcompress.train.ops.call import Call, Mode, torch_type  # noqa: E402

MODULES = (elementwise, activations, linear, pooling, normalization, reduction)
OPERATORS = {name: builder for module in MODULES for name, builder in module.OPERATORS.items()}
UNSUPPORTED = {torch.uint16, torch.uint32, torch.uint64}  # torch computes almost nothing with them
HALF = {TensorProto.FLOAT16, TensorProto.BFLOAT16}


def as_tensor(array, float_type=torch.float32):
    array = np.asarray(array)
    dtype = torch_type(array.dtype, float_type, "input")
    if array.dtype.kind not in "biuf":  # bfloat16, int4 and their kin
        array = array.astype(np.float64)
    return torch.tensor(array).to(dtype)


def as_list(result):
    return list(result) if isinstance(result, (tuple, list)) else [result]


def call_of(node, opset, constants):
    """What a builder is told about a node of a graph; ``constants`` by tensor name."""
    given = tuple(bool(tensor.name) for tensor in node.inputs)
    known = {i: constants[tensor.name] for i, tensor in enumerate(node.inputs) if tensor.name in constants}
    outputs = tuple(bool(tensor.name) for tensor in node.outputs)
    return Call(node.op, node.name, node.attrs, opset, given, outputs, known)


def run_graph(graph, feeds, constants):
    values = {**feeds}
    for node in graph.nodes:
        function = OPERATORS[node.op](call_of(node, graph.opset, constants))
        results = as_list(function(*(values[tensor.name] if tensor.name else None for tensor in node.inputs)))
        values.update((tensor.name, value) for tensor, value in zip(node.outputs, results, strict=False))
    return [values[tensor.name] for tensor in graph.outputs]


def operator(op, arity, *, opset=17, outputs=1, constants=None, float_type=torch.float64, mode=None, **attributes):
    """The function of one node; ``constants`` by input position."""
    given = tuple(arity) if isinstance(arity, (tuple, list)) else (True,) * arity
    read = (True,) * outputs if isinstance(outputs, int) else outputs
    call = Call(op, "node", attributes, opset, given, read, constants or {}, float_type, mode or Mode())
    return OPERATORS[op](call)


# --- the node tests of the onnx package ---------------------------------------------------------------------------

LEFT_OUT = {
    # The mask is another random generator's.
    *(f"test_training_dropout{case}" for case in ("", "_mask", "_default", "_default_mask")),
    # 4-bit integers are held as 8-bit ones: CastLike cannot tell them apart.
    *(f"test_castlike_{kind}_to_{target}" for kind in ("FLOAT", "FLOAT16") for target in ("INT4", "UINT4")),
}
# Its expected values have four digits.
FOUR_DIGITS = {"test_averagepool_2d_ceil_last_window_starts_on_pad"}


@pytest.fixture(scope="module")
def node_cases():
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    return [case for case in cases if all(node.op_type in OPERATORS for node in case.model.graph.node)]


def element_types(proto):
    values = [*proto.graph.input, *proto.graph.output]
    return {value.type.tensor_type.elem_type if value.type.HasField("tensor_type") else 0 for value in values}


def supported(types):
    try:
        return UNSUPPORTED.isdisjoint(torch_type(kind, torch.float32, "") for kind in types)
    except (ModelError, ValueError):
        return False


def assert_close(actual, expected, rtol, what):
    actual = actual.detach().numpy()
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    if expected.dtype.kind in "biuV" and expected.dtype.name != "bfloat16":
        if expected.dtype.kind == "V":  # 4 bits
            expected = expected.astype(actual.dtype)
        assert actual.dtype == expected.dtype, what
        np.testing.assert_array_equal(actual, expected, err_msg=what)
        return
    expected = expected.astype(np.float64)
    finite = np.isfinite(expected)
    scale = np.abs(expected[finite]).max(initial=0.0)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * max(scale, 1e-30), err_msg=what)


@pytest.mark.parametrize("known", [False, True], ids=["inputs", "constants"])
def test_node_models_of_onnx(node_cases, known):
    compared = set()
    for case in node_cases:
        types = element_types(case.model)
        if not supported(types) or case.name in LEFT_OUT:
            continue
        inputs, expected = case.data_sets[0]
        arrays = [numpy_helper.to_array(v) if isinstance(v, TensorProto) else np.asarray(v) for v in inputs]
        names = [value.name for value in case.model.graph.input]
        feeds = {name: as_tensor(array) for name, array in zip(names, arrays, strict=True)}
        constants = {name: feeds[name] for name in names[1:]} if known else {}
        actual = run_graph(graph_of(case.model), feeds, constants)
        rtol = 1e-3 if types & HALF else 1e-6  # measured: 2.9e-4 (half an ulp is 4.9e-4), 4.5e-7
        rtol = 5e-4 if case.name in FOUR_DIGITS else rtol
        for got, want in zip(actual, expected, strict=True):
            array = numpy_helper.to_array(want) if isinstance(want, TensorProto) else np.asarray(want)
            assert_close(got, array, rtol, case.name)
        compared.update(node.op_type for node in case.model.graph.node)
    assert set(OPERATORS) - compared == {"GlobalLpPool"}, "every operator but these has a node test"


# --- onnxruntime, over random attributes -------------------------------------------------------------------------


def against_onnxruntime(op, inputs, *, opset=22, outputs=1, rtol, **attributes):
    """One node of float32 inputs, here and in onnxruntime."""
    names = [f"i{number}" if value is not None else "" for number, value in enumerate(inputs)]
    arrays = {name: value.float().numpy() for name, value in zip(names, inputs, strict=True) if name}
    results = [f"o{number}" for number in range(outputs)]
    node = helper.make_node(op, names, results, **attributes)
    kinds = [TensorProto.FLOAT, TensorProto.INT64 if op == "MaxPool" else TensorProto.FLOAT][:outputs]
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in arrays.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(results, kinds, strict=True)],
    )
    proto = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", opset)])
    expected = testing.run(proto, arrays)
    feeds = {name: torch.tensor(array) for name, array in arrays.items()}
    for actual, wanted in zip(run_graph(graph_of(proto), feeds, {}), expected, strict=True):
        assert_close(actual, wanted, rtol, f"{op} {attributes}")


def random_window(rng, *, kernel_limit=4, ceil=False, gapless=False):
    """Sizes of an input and attributes of a window that fits it."""
    rank = int(rng.integers(1, 4))
    sizes = rng.integers(5, 9, rank) if rank == 3 else rng.integers(7, 14, rank)
    kernel = rng.integers(1, kernel_limit, rank)
    attributes = {"kernel_shape": kernel, "strides": rng.integers(1, 4, rank)}
    if rng.random() < 0.5:
        attributes["dilations"] = rng.integers(1, 3, rank)
    if ceil:
        attributes["ceil_mode"] = int(rng.random() < 0.5)
    padding = rng.choice(["none", "symmetric", "asymmetric", "SAME_UPPER", "SAME_LOWER", "VALID"])
    if padding == "symmetric":
        attributes["pads"] = np.tile(rng.integers(0, kernel), 2)
    elif padding == "asymmetric":
        attributes["pads"] = rng.integers(0, np.tile(kernel, 2))
    elif padding != "none":
        attributes["auto_pad"] = str(padding)
    if "auto_pad" in attributes and padding != "VALID":  # onnxruntime takes no dilations here, nor gaps in a pool
        attributes.pop("dilations", None)
        attributes["strides"] = np.minimum(attributes["strides"], kernel) if gapless else attributes["strides"]
    listed = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in attributes.items()}
    return rank, tuple(int(size) for size in sizes), listed


@pytest.mark.parametrize("seed", range(40))
def test_conv_as_in_onnxruntime(seed):
    rng = np.random.default_rng(seed)
    _, sizes, attributes = random_window(rng)
    group = int(rng.choice([1, 2, 4]))
    x = torch.tensor(rng.normal(size=(2, 4, *sizes)))
    weight = torch.tensor(rng.normal(size=(8, 4 // group, *attributes["kernel_shape"])))
    bias = torch.tensor(rng.normal(size=8)) if rng.random() < 0.5 else None
    if rng.random() < 0.3:
        del attributes["kernel_shape"]
    against_onnxruntime("Conv", [x, weight, bias], group=group, rtol=2e-6, **attributes)  # measured 3.9e-7


@pytest.mark.parametrize("seed", range(40))
def test_conv_transpose_as_in_onnxruntime(seed):
    rng = np.random.default_rng(seed)
    rank, sizes, attributes = random_window(rng)
    group = int(rng.choice([1, 2]))
    form = rng.choice(["plain", "output_padding", "output_shape"])
    strides, kernel = np.array(attributes["strides"]), np.array(attributes["kernel_shape"])
    if form != "plain" and "auto_pad" not in attributes:
        attributes["output_padding"] = rng.integers(0, strides).tolist()
    if form == "output_shape":
        attributes.pop("pads", None)
        reach = (np.array(sizes) - 1) * strides + (kernel - 1) * np.array(attributes.get("dilations", [1] * rank)) + 1
        attributes["output_shape"] = (reach - rng.integers(0, kernel)).tolist()
    x = torch.tensor(rng.normal(size=(2, 4, *sizes)))
    weight = torch.tensor(rng.normal(size=(4, 6 // group, *kernel)))
    bias = torch.tensor(rng.normal(size=6)) if rng.random() < 0.5 else None
    against_onnxruntime("ConvTranspose", [x, weight, bias], group=group, rtol=2e-6, **attributes)  # measured 3.4e-7


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "LpPool"])
def test_pool_as_in_onnxruntime(op, seed):
    rng = np.random.default_rng(seed)
    _, sizes, attributes = random_window(rng, ceil=True, gapless=True)
    x = torch.tensor(rng.normal(size=(2, 3, *sizes)))
    if op == "AveragePool":
        attributes["count_include_pad"] = int(rng.random() < 0.5)
    if op == "LpPool":
        attributes["p"] = int(rng.integers(1, 4))
    indices = op == "MaxPool" and rng.random() < 0.5
    if indices:
        attributes["storage_order"] = int(rng.random() < 0.5)
    against_onnxruntime(op, [x], outputs=2 if indices else 1, rtol=1e-6, **attributes)  # measured 1.1e-7


@pytest.mark.parametrize("op", ["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_global_pool_as_in_onnxruntime(op, rank):
    attributes = {"p": 3} if op == "GlobalLpPool" else {}
    x = values((2, 3, *(3, 4, 5)[:rank]), rank)
    against_onnxruntime(op, [x], opset=21, rtol=1e-6, **attributes)  # measured 1.8e-7


@pytest.mark.parametrize("seed", range(24))
def test_gemm_as_in_onnxruntime(seed):
    rng = np.random.default_rng(seed)
    a, b = torch.tensor(rng.normal(size=(3, 4))), torch.tensor(rng.normal(size=(4, 5)))
    attributes = {"transA": int(rng.integers(2)), "transB": int(rng.integers(2))}
    if rng.random() < 0.6:
        attributes.update(alpha=0.7, beta=1.3)
    shape = [None, (5,), (1, 5), (3, 1), (3, 5), (), (1,)][seed % 7]
    c = None if shape is None else torch.tensor(rng.normal(size=shape))
    inputs = [a.t() if attributes["transA"] else a, b.t() if attributes["transB"] else b, c]
    against_onnxruntime("Gemm", inputs[: 2 if c is None else 3], rtol=1e-6, **attributes)  # measured 1.3e-7


# --- gradients against finite differences -------------------------------------------------------------------------


def values(shape, seed, low=-2.0, high=2.0):
    """Seeded numbers, all apart from each other and from the middle of the range, where many operators have a kink."""
    count = 2 * ((int(np.prod(shape)) + 1) // 2)
    grid = low + (np.arange(count) + 0.5) * (high - low) / count
    return torch.tensor(np.random.default_rng(seed).permutation(grid)[: int(np.prod(shape))].reshape(shape))


def check_gradient(op, inputs, *, constants=None, which=None, **options):
    """gradcheck over the inputs ``which`` (all floating ones by default) and over all floating outputs."""
    function = operator(op, [value is not None for value in inputs], constants=constants, **options)
    if which is None:
        which = [i for i, value in enumerate(inputs) if value is not None and value.is_floating_point()]
    leaves = [inputs[i].clone().requires_grad_() for i in which]

    def run(*changed):
        full = list(inputs)
        for position, value in zip(which, changed, strict=True):
            full[position] = value
        found = tuple(out for out in as_list(function(*full)) if out is not None and out.is_floating_point())
        assert found
        return found

    assert torch.autograd.gradcheck(run, leaves, eps=1e-6, atol=1e-6, rtol=1e-5)


UNARY = {
    "Abs": (-2, 2), "Acos": (-0.9, 0.9), "Acosh": (1.2, 3), "Asin": (-0.9, 0.9), "Asinh": (-2, 2), "Atan": (-2, 2),
    "Atanh": (-0.9, 0.9), "Cos": (-2, 2), "Cosh": (-2, 2), "Erf": (-2, 2), "Exp": (-2, 2), "Identity": (-2, 2),
    "Log": (0.3, 3), "Neg": (-2, 2), "Reciprocal": (0.3, 3), "Sin": (-2, 2), "Sinh": (-2, 2), "Sqrt": (0.3, 3),
    "Tan": (-1.2, 1.2), "Tanh": (-2, 2), "Gelu": (-3, 3), "HardSigmoid": (-4, 4), "HardSwish": (-4.1, 4.1),
    "Mish": (-3, 3), "Relu": (-2, 2), "Selu": (-2, 2), "Sigmoid": (-2, 2), "Softplus": (-3, 3), "Softsign": (-2, 2),
    "Celu": (-2, 2), "Elu": (-2, 2), "LeakyRelu": (-2, 2), "ThresholdedRelu": (-2, 2), "Shrink": (-2.1, 2.1),
    "Ceil": (-2, 2), "Floor": (-2, 2), "Round": (-1.9, 1.7), "Sign": (-2, 2), "Dropout": (-2, 2), "Swish": (-2, 2),
}  # fmt: skip


@pytest.mark.parametrize("op", UNARY)
def test_gradient_of_one_input(op):
    check_gradient(op, [values((3, 4), 0, *UNARY[op])], opset=24)


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("Gelu", {"approximate": "tanh"}),
        ("HardSigmoid", {"alpha": 0.16666667163372, "beta": 0.5}),
        ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}),
        ("Celu", {"alpha": 0.7}),
        ("Elu", {"alpha": 0.7}),
        ("Selu", {"alpha": 0.7, "gamma": 1.3}),
        ("LeakyRelu", {"alpha": 0.2}),
        ("Swish", {"alpha": 1.7}),
        ("ThresholdedRelu", {"alpha": 0.53}),
        ("Shrink", {"lambd": 0.53, "bias": 0.2}),
        ("Shrink", {"lambd": -0.53, "bias": 0.2}),
        ("Cast", {"to": TensorProto.FLOAT}),
        ("Softmax", {}),
        ("Softmax", {"axis": 0}),
        ("LogSoftmax", {"axis": 1}),
        ("Softmax", {"opset": 11}),
        ("LogSoftmax", {"opset": 12, "axis": 0}),
    ],
)
def test_gradient_with_attributes(op, attributes):
    check_gradient(op, [values((2, 3, 2), 1)], **{"opset": 24, **attributes})


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean", "Pow", "Mod"])
@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((2, 1, 3), (4, 1)), ((), (3,))])
def test_gradient_of_two_broadcast_inputs(op, shapes):
    a, b = values(shapes[0], 2, 0.5, 3.0), values(shapes[1], 3, 0.6, 2.9)
    check_gradient(op, [a, b], fmod=1, which=[0] if op == "Mod" else None)


@pytest.mark.parametrize("op", ["Max", "Min", "Sum", "Mean"])
def test_gradient_of_three_inputs(op):
    check_gradient(op, [values((2, 3), 4), values((3,), 5, -1.9, 1.8), values((2, 1), 6, -1.7, 1.9)])


@pytest.mark.parametrize("op", ["Add", "Mul", "Pow"])
def test_broadcast_to_an_axis_before_operator_set_7(op):
    a, b = values((2, 3, 4), 7, 0.5, 2), values((3,), 8, 0.5, 2)
    run = operator(op, 2, opset=6, broadcast=1, axis=1)
    new = operator(op, 2, opset=7)
    assert torch.equal(run(a, b), new(a, b.reshape(3, 1)))
    last = values((4,), 9, 0.5, 2)
    assert torch.equal(operator(op, 2, opset=6, broadcast=1)(a, last), new(a, last))
    check_gradient(op, [a, b], opset=6, broadcast=1, axis=1)


def test_gradient_of_clip_where_and_prelu():
    x = values((3, 4), 10)
    low, high = torch.tensor(-0.9, dtype=torch.float64), torch.tensor(1.1, dtype=torch.float64)
    check_gradient("Clip", [x], opset=6, min=-0.9, max=1.1)
    check_gradient("Clip", [x, low, high])
    check_gradient("Clip", [x, low, high], constants={1: low, 2: high}, which=[0])
    check_gradient("Clip", [x, None, high], constants={2: high}, which=[0])
    check_gradient("Where", [x > 0.5, x, values((4,), 11)])
    for opset, shape in [(6, (3,)), (6, (1,)), (9, (3, 1)), (9, (1, 3, 1)), (9, (4,)), (9, (2, 1, 1)), (9, (1,))]:
        check_gradient("PRelu", [values((2, 3, 4), 12), values(shape, 13, 0.1, 0.5)], opset=opset)
    exponent = torch.tensor(3.0, dtype=torch.float64)
    check_gradient("Pow", [x, exponent], constants={1: exponent}, which=[0])


WINDOWS = [
    ((6,), {"kernel_shape": [3], "strides": [2], "pads": [1, 1]}),
    ((6,), {"kernel_shape": [3], "pads": [0, 2], "dilations": [2]}),
    ((4, 5), {"kernel_shape": [2, 3], "strides": [2, 1], "auto_pad": "SAME_LOWER"}),
    ((4, 5), {"kernel_shape": [3, 2], "strides": [1, 2], "auto_pad": "SAME_UPPER"}),
    ((4, 5), {"kernel_shape": [2, 2], "auto_pad": "VALID"}),
    ((5, 4), {"kernel_shape": [3, 3], "pads": [1, 0, 0, 1], "strides": [2, 2]}),
    ((3, 2, 3), {"kernel_shape": [2, 2, 2], "pads": [0, 1, 0, 0, 1, 0]}),
]


@pytest.mark.parametrize(("sizes", "attributes"), WINDOWS)
def test_gradient_of_convolutions(sizes, attributes):
    group = 2 if len(sizes) < 3 else 1
    kernel = attributes["kernel_shape"]
    x = values((2, 2, *sizes), 16)
    check_gradient("Conv", [x, values((4, 2 // group, *kernel), 17), values((4,), 18)], group=group, **attributes)
    weight = values((2, 4 // group, *kernel), 19)
    check_gradient("ConvTranspose", [x[:1], weight, values((4,), 20)], group=group, **attributes)


def test_gradient_of_convolution_without_kernel_shape_and_of_output_shape():
    x, weight, bias = values((1, 2, 4, 4), 21), values((2, 2, 3, 3), 22), values((2,), 23)
    check_gradient("Conv", [x, weight, bias])
    check_gradient("ConvTranspose", [x, weight, bias], output_shape=[8, 9], strides=[2, 2])
    check_gradient("ConvTranspose", [x, weight, None], output_padding=[1, 0], strides=[2, 2], pads=[1, 1, 1, 1])


@pytest.mark.parametrize(("sizes", "attributes"), WINDOWS)
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "LpPool"])
@pytest.mark.parametrize("ceil", [0, 1])
def test_gradient_of_pools(op, sizes, attributes, ceil):
    x = values((1, 2, *sizes), 24)
    check_gradient(op, [x], ceil_mode=ceil, **attributes)
    if op == "AveragePool":
        check_gradient(op, [x], ceil_mode=ceil, count_include_pad=1, **attributes)
    if op == "MaxPool":
        check_gradient(op, [x], ceil_mode=ceil, outputs=2, **attributes)


@pytest.mark.parametrize("op", ["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"])
def test_gradient_of_global_pools(op):
    for shape in [(2, 3, 4), (2, 2, 3, 2)]:
        check_gradient(op, [values(shape, 25)])


def test_gradient_of_a_root_is_0_at_0():
    x = torch.zeros(1, 1, 4, dtype=torch.float64, requires_grad=True)
    operator("LpPool", 1, kernel_shape=[2])(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_gradient_of_products():
    a, b = values((3, 4), 26), values((4, 2), 27)
    for shape in [(2,), (1,), (1, 2), (3, 1), (3, 2), ()]:
        check_gradient("Gemm", [a, b.t(), values(shape, 28)], transB=1)
        check_gradient("Gemm", [a.t(), b, values(shape, 28)], transA=1, alpha=0.7, beta=1.5)
    check_gradient("Gemm", [a, b], alpha=2.0)
    for shapes in [((2, 3, 4), (4, 2)), ((4,), (4, 2)), ((2, 1, 3, 4), (3, 4, 2)), ((3, 4), (4,))]:
        check_gradient("MatMul", [values(shapes[0], 29), values(shapes[1], 30)])
    check_gradient("Einsum", [values((2, 3, 4), 31), values((2, 4, 2), 32)], equation="b i j, bjk -> bik")
    check_gradient("Einsum", [values((2, 3, 3), 33)], equation="...ii->...i")
    integers = torch.arange(6).reshape(2, 3)
    assert torch.equal(operator("Gemm", 2, transA=1)(integers, integers), integers.t() @ integers)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(4, 3), (3, 3, 2), (2, 3, 2, 2), (2, 3, 1, 2, 2)])
def test_gradient_of_batch_normalization(training, shape):
    parameters = [values((3,), seed, 0.5, 2.0) for seed in (35, 36, 37, 38)]
    which = [0, 1, 2] if training else None
    mode = Mode(batch_statistics=training)
    check_gradient("BatchNormalization", [values(shape, 34), *parameters], mode=mode, which=which)
    if training:
        old = {"opset": 7, "spatial": 0, "mode": mode, "which": which}
        parameters = [values(shape[1:], seed, 0.5, 2.0) for seed in (35, 36, 37, 38)]
        check_gradient("BatchNormalization", [values((4, *shape[1:]), 34), *parameters], **old)
        check_gradient("BatchNormalization", [values((4, *shape[1:]), 34), *parameters], **{**old, "mode": None})


def test_gradient_of_the_training_form_of_batch_normalization():
    inputs = [values((3, 2, 2), 39), *(values((2,), seed, 0.5, 2.0) for seed in (40, 41, 42, 43))]
    check_gradient("BatchNormalization", inputs, training_mode=1, outputs=3)
    check_gradient("BatchNormalization", inputs, training_mode=1, which=[0, 1, 2])


@pytest.mark.parametrize(
    ("op", "shapes", "attributes"),
    [
        ("LayerNormalization", [(2, 3, 4), (4,), (4,)], {}),
        ("LayerNormalization", [(2, 3, 4), (3, 4), (3, 4)], {"axis": 1, "outputs": 3}),
        ("LayerNormalization", [(2, 3, 4), (1,), (3, 1)], {"axis": -2}),
        ("LayerNormalization", [(2, 3, 4), (4,)], {}),
        ("RMSNormalization", [(2, 3, 4), (4,)], {}),
        ("RMSNormalization", [(2, 3, 4), (3, 1)], {"axis": 1}),
        ("InstanceNormalization", [(2, 3, 2, 2), (3,), (3,)], {}),
        ("GroupNormalization", [(2, 4, 3), (4,), (4,)], {"num_groups": 2, "opset": 21}),
        ("GroupNormalization", [(2, 4, 3), (2,), (2,)], {"num_groups": 2, "opset": 18}),
        ("LpNormalization", [(2, 3)], {}),
        ("LpNormalization", [(2, 3)], {"p": 1, "axis": 0}),
        ("MeanVarianceNormalization", [(2, 2, 2, 2)], {}),
        ("MeanVarianceNormalization", [(2, 3)], {"axes": [1]}),
        ("LRN", [(1, 5, 2, 2)], {"size": 3, "alpha": 0.3}),
        ("LRN", [(1, 5, 2)], {"size": 2, "alpha": 0.3, "beta": 0.5, "bias": 2.0}),
    ],
)
def test_gradient_of_normalizations(op, shapes, attributes):
    check_gradient(op, [values(shape, 44 + i) for i, shape in enumerate(shapes)], **attributes)


REDUCTIONS = [name for name in reduction.OPERATORS if name.startswith("Reduce")]


@pytest.mark.parametrize("op", REDUCTIONS)
def test_gradient_of_reductions(op):
    x = values((2, 3, 2), 50, *((0.2, 3.0) if op == "ReduceLogSum" else (-2.0, 2.0)))
    for axes in ([0], [1, -1], None):
        old = {} if axes is None else {"axes": axes}
        check_gradient(op, [x], opset=11, keepdims=0, **old)
        indices = None if axes is None else torch.tensor(axes)
        check_gradient(op, [x, indices], opset=18)
        check_gradient(op, [x, indices], opset=18, constants={} if axes is None else {1: indices}, keepdims=0)
    check_gradient(op, [x.abs()], opset=18, noop_with_empty_axes=1)
    check_gradient(op, [x[0, 0, 0].abs()], opset=18)


@pytest.mark.parametrize("op", REDUCTIONS)
def test_reduction_of_integers_keeps_their_type(op):
    x = torch.tensor([[1, 2], [3, 5]], dtype=torch.int32)
    y = operator(op, 1, opset=18)(x)
    assert y.dtype == torch.int32 and y.shape == (1, 1)
    assert operator(op, 1, opset=18)(x[0, 0]).item() in (0, 1)


@pytest.mark.parametrize("op", ["CumSum", "CumProd"])
@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
def test_gradient_of_cumulative(op, exclusive, reverse):
    axis = torch.tensor(1)
    for constants in ({}, {1: axis}):
        x = values((2, 3, 2), 51)
        check_gradient(op, [x, axis], constants=constants, exclusive=exclusive, reverse=reverse)


def test_gradient_of_top_k():
    x, k = values((3, 5), 52), torch.tensor([2])
    check_gradient("TopK", [x], opset=9, k=2, outputs=2)
    check_gradient("TopK", [x, k], outputs=2)
    check_gradient("TopK", [x, k], outputs=2, constants={1: k}, largest=0, axis=0)


# --- what the node tests do not say -------------------------------------------------------------------------------


def test_clip_bounds_as_attributes_are_those_of_float32():
    x = torch.tensor([-1e30, 0.5, 1e30])
    widest = float(np.finfo(np.float32).max)
    assert torch.equal(operator("Clip", 1, opset=6, min=-widest, max=widest)(x), x)
    assert torch.equal(operator("Clip", 1, opset=6, max=1.0)(x), torch.tensor([-1e30, 0.5, 1.0]))


def test_integer_power_with_a_float_exponent_is_truncated():
    x, exponent = torch.tensor([2, 3]), torch.tensor([0.5, 1.5])
    assert torch.equal(operator("Pow", 2)(x, exponent), torch.tensor([1, 5]))


def test_softmax_over_all_axes_from_one_on_before_operator_set_13():
    x = values((2, 3, 4), 14)
    expected = torch.softmax(x.reshape(2, 12), 1).reshape(2, 3, 4)
    assert torch.equal(operator("Softmax", 1, opset=12)(x), expected)
    assert torch.equal(operator("Softmax", 1, opset=12, axis=3)(x), torch.ones_like(x))
    hard = operator("Hardmax", 1, opset=12)(x)
    assert torch.equal(hard.sum((1, 2)), torch.ones(2)) and torch.equal((hard * x).sum((1, 2)), x.amax((1, 2)))


def test_dropout_draws_a_mask_only_where_the_node_trains():
    x = torch.ones(1000)
    half, yes = torch.tensor(0.5), torch.tensor(True)
    y, mask = operator("Dropout", 3, outputs=2)(x, half, yes)
    assert torch.equal(y, mask * 2.0) and 400 < mask.sum() < 600
    assert operator("Dropout", 3)(x, half, ~yes) is x
    assert operator("Dropout", 1, opset=6, is_test=0)(x) is x


def test_cast_to_half_precision_keeps_the_type_of_the_twin():
    x = values((3,), 15)
    assert operator("Cast", 1, to=TensorProto.FLOAT16)(x) is x
    assert operator("Cast", 1, to=np.dtype(np.float16))(x) is x
    with pytest.raises(ModelError, match="STRING"):
        operator("Cast", 1, to=TensorProto.STRING)


def test_shape_arithmetic_on_the_cpu_meets_activations_elsewhere():
    x, size = torch.ones(2, 3, device="meta"), torch.tensor([4.0])
    for op in ("Add", "Div", "Pow", "Max", "Mean", "Less"):
        assert operator(op, 2)(x, size).device == operator(op, 2)(size, x).device == x.device
    assert operator("Where", 3)(torch.tensor([True]), x, size).device == x.device
    assert operator("Clip", 3)(x, size[0], None).device == x.device


def test_average_pool_trains_after_a_run_in_inference_mode():
    run = operator("AveragePool", 1, kernel_shape=[2], pads=[1, 0])
    x = values((1, 1, 4), 53).requires_grad_()
    with torch.inference_mode():
        run(x)
    run(x).sum().backward()
    assert torch.equal(x.grad[0, 0], torch.tensor([1.5, 1.0, 1.0, 0.5], dtype=torch.float64))


def test_unknown_form_is_refused():
    with pytest.raises(ModelError, match=r"Gelu 'node': approximate = 'sigmoid' cannot be trained through"):
        operator("Gelu", 1, approximate="sigmoid")
    with pytest.raises(ModelError, match="4 spatial axes"):
        operator("Conv", 2, kernel_shape=[1, 1, 1, 1])
    with pytest.raises(ModelError, match="auto_pad with dilations"):
        operator("MaxPool", 1, kernel_shape=[2], dilations=[2], auto_pad="SAME_UPPER")
    with pytest.raises(ModelError, match="without kernel_shape"):
        operator("LpPool", 1)
    with pytest.raises(ModelError, match="2 strides, 1 dilations and 2 pads for 1 axes"):
        operator("MaxPool", 1, kernel_shape=[2], strides=[1, 1])
    with pytest.raises(ModelError, match="auto_pad = 'SAME'"):
        operator("Conv", 2, kernel_shape=[2], auto_pad="SAME")


def batch_norm_inputs(dtype=torch.float64):
    rng = np.random.default_rng(60)
    x = torch.tensor(rng.normal(3.0, 2.0, size=(8, 3, 2, 2)), dtype=dtype)
    return [x, *(torch.tensor(rng.uniform(0.5, 2.0, size=3), dtype=dtype) for _ in range(4))]


@pytest.mark.parametrize("opset", [6, 7, 9, 14, 15])
def test_batch_statistics_move_the_running_ones_as_torch_does(opset):
    x, scale, bias, mean, var = batch_norm_inputs()
    module = torch.nn.BatchNorm2d(3, eps=1e-3, momentum=0.2).double()
    module.load_state_dict({"weight": scale, "bias": bias, "running_mean": mean, "running_var": var}, strict=False)
    mode = Mode()
    run = operator("BatchNormalization", 5, opset=opset, epsilon=1e-3, momentum=0.8, mode=mode)
    before = mean.clone()
    assert torch.equal(run(x, scale, bias, mean, var), module.eval()(x)) and torch.equal(mean, before)
    mode.batch_statistics = True
    torch.testing.assert_close(run(x, scale, bias, mean, var), module.train()(x), rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(mean, module.running_mean, rtol=1e-15, atol=0)
    torch.testing.assert_close(var, module.running_var, rtol=1e-15, atol=0)  # the unbiased variance; measured 1.3e-16


def test_batch_statistics_of_one_value_are_refused():
    run = operator("BatchNormalization", 5, mode=Mode(batch_statistics=True))
    with pytest.raises(DataError, match=r"'node': a batch of shape \[1, 3, 1, 1\] has 1 value per channel"):
        run(torch.ones(1, 3, 1, 1), *torch.ones(4, 3).unbind())
    with pytest.raises(ModelError, match="without training_mode"):
        operator("BatchNormalization", 5, opset=9, outputs=5)
    operator("BatchNormalization", 5, opset=9, outputs=(True, False, False, False, False))


PROCESS = """
import sys
import numpy as np
import torch
import torch.distributed as dist
from onnxcompress.train.ops import OPERATORS, Call, Mode

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
data = {name: torch.tensor(array) for name, array in np.load(f"{folder}/inputs.npz").items()}
rows = slice(0, 3) if rank == 0 else slice(3, 8)
x, scale, bias = (data[name].requires_grad_() for name in ("x", "scale", "bias"))
mean, var = data["mean"], data["var"]
results = {}
for training_mode in (0, 1):
    outputs = (True,) * 3 if training_mode else (True,)
    call = Call("BatchNormalization", "b", {"training_mode": training_mode, "epsilon": 1e-3, "momentum": 0.8}, 15,
                (True,) * 5, outputs, mode=Mode(batch_statistics=True, synchronize=True))
    y = OPERATORS["BatchNormalization"](call)(x[rows], scale, bias, mean, var)
    y, *running = y if training_mode else (y, mean, var)
    found = torch.autograd.grad((y * data["weights"][rows]).sum(), [x, scale, bias])
    results |= {f"{name}{training_mode}": value.detach().numpy().copy() for name, value in
                zip(["y", "mean", "var", "x", "scale", "bias"], [y, *running, *found])}
np.savez(f"{folder}/{rank}.npz", **results)
dist.destroy_process_group()
"""


def test_synchronized_statistics_are_those_of_one_process_with_the_whole_batch(tmp_path):
    names = ["x", "scale", "bias", "mean", "var"]
    inputs = dict(zip(names, batch_norm_inputs(), strict=True))
    weights = torch.tensor(np.random.default_rng(61).normal(size=(8, 3, 2, 2)))
    np.savez(tmp_path / "inputs.npz", weights=weights, **inputs)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", PROCESS]
    children = [subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=root) for rank in (0, 1)]
    assert [child.wait(timeout=60) for child in children] == [0, 0]
    first, second = (np.load(tmp_path / f"{rank}.npz") for rank in (0, 1))
    leaves = [inputs[name].requires_grad_() for name in ("x", "scale", "bias")]
    for form in (0, 1):
        attributes = {"training_mode": form, "epsilon": 1e-3, "momentum": 0.8, "opset": 15, "outputs": 3 if form else 1}
        run = operator("BatchNormalization", 5, mode=Mode(batch_statistics=True), **attributes)
        y = run(*inputs.values())
        y, *running = y if form else (y, inputs["mean"], inputs["var"])
        close = functools.partial(np.testing.assert_allclose, rtol=1e-14, atol=1e-14)  # measured 3.8e-16 of the largest
        close(np.concatenate([first[f"y{form}"], second[f"y{form}"]]), y.detach())
        for name, wanted in zip(("mean", "var"), running, strict=True):
            close(first[f"{name}{form}"], wanted.detach())
            close(second[f"{name}{form}"], wanted.detach())
        for name, wanted in zip(names, torch.autograd.grad((y * weights).sum(), leaves), strict=False):
            close(first[f"{name}{form}"] + second[f"{name}{form}"], wanted)


def test_equal_values_rank_by_their_index():
    x = torch.tensor([[1, 3, 3, 2, 3]])
    assert operator("TopK", 2, outputs=2)(x, torch.tensor([3]))[1].tolist() == [[1, 2, 4]]
    assert operator("ArgMax", 1, axis=1)(x).tolist() == [[1]]
    assert operator("ArgMax", 1, axis=1, select_last_index=1, keepdims=0)(x).tolist() == [4]
