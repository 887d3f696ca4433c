"""Operators of the twin that shape, index, resize, recur and quantize, against three judges.

The node tests inside the onnx package give the expected values, onnxruntime gives them for random combinations of
attributes where those are silent, and finite differences in float64 give the gradients.
"""

from __future__ import annotations

import functools
import importlib
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import onnx  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from onnxcompress import testing  # noqa: E402
from onnxcompress.errors import ModelError  # noqa: E402
from onnxcompress.graph import Constant  # noqa: E402
from onnxcompress.model_io import load  # noqa: E402
from onnxcompress.train.ops import indexing, quantization, recurrent, resize, shaping  # noqa: E402
from onnxcompress.train.ops.call import Call  # noqa: E402

MODULES = (shaping, indexing, resize, recurrent, quantization)
TABLE = {name: builder for module in MODULES for name, builder in module.OPERATORS.items()}
HALF = {"float16": 1e-3, "bfloat16": 1e-2}  # half an ulp of the expected value is 4.9e-4 and 3.9e-3


def as_tensor(array):
    array = np.asarray(array)
    if array.dtype.name in HALF:
        array = array.astype(np.float32)
    elif array.dtype.kind not in "biuf":  # int4 and its kin
        array = array.astype(np.int8 if array.dtype.name.startswith("int") else np.uint8)
    return torch.from_numpy(np.array(array))


def build(op, inputs, outputs=1, *, opset=18, fixed=(), float_type=torch.float32, **attributes):
    """The function of a node, and what it is called with; ``fixed`` inputs are constants to its builder."""
    call = Call(
        op,
        "it",
        attributes,
        opset,
        tuple(value is not None for value in inputs),
        (True,) * outputs,
        {position: inputs[position] for position in fixed if inputs[position] is not None},
        float_type,
    )
    return TABLE[op](call)


def sequence(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def execute(proto, feeds, *, constants):
    """Run a model's nodes in order; with ``constants``, inputs that hold integers are known to the builders."""
    graph = load(onnx.ModelProto.FromString(proto.SerializeToString()))
    values = {name: as_tensor(array) for name, array in feeds.items()}
    known = {name for name, value in values.items() if constants and not value.dtype.is_floating_point}
    for node in graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, Constant):
                values[tensor.name] = as_tensor(tensor.values)
                known.add(tensor.name)
        names = [tensor.name for tensor in node.inputs]
        inputs = [values[name] if name else None for name in names]
        function = TABLE[node.op](
            Call(
                node.op,
                node.name,
                node.attrs,
                graph.opset,
                tuple(value is not None for value in inputs),
                tuple(bool(tensor.name) for tensor in node.outputs),
                {position: values[name] for position, name in enumerate(names) if name in known},
            )
        )
        for tensor, value in zip(node.outputs, sequence(function(*inputs)), strict=False):
            values[tensor.name] = value
    return [values[tensor.name] for tensor in graph.outputs]


def assert_close(actual, expected, rel, what=""):
    wanted = np.asarray(expected)
    rel = max(rel, HALF.get(wanted.dtype.name, 0))
    if wanted.dtype.kind not in "b":
        wanted = wanted.astype(np.float64)
    found = actual.detach().numpy()
    assert found.shape == wanted.shape, f"{what}: shape {found.shape}, expected {wanted.shape}"
    if wanted.size == 0:
        return
    if wanted.dtype.kind == "b":
        assert np.array_equal(found, wanted), what
        return
    finite = np.isfinite(wanted)
    assert np.array_equal(found[~finite], wanted[~finite], equal_nan=True), what
    error = np.abs(found - wanted)[finite].max(initial=0.0) / max(np.abs(wanted)[finite].max(initial=0.0), 1e-30)
    assert error <= rel, f"{what}: max|d| / max|y| = {error:.1e}, allowed {rel:.0e}"


# Modules of onnx's node tests; all of them together take many seconds.
CASES = """
    concat constant constantofshape depthtospace expand eyelike onehot rangeop reshape shape size spacetodepth
    split squeeze tile transpose trilu unsqueeze compress gather gatherelements gathernd gridsample nonzero
    quantizelinear dequantizelinear dynamicquantizelinear matmulinteger convinteger qlinearconv qlinearmatmul
    pad reversesequence scatter scatterelements scatternd slice unique resize upsample gru lstm rnn
"""


@functools.cache
def node_cases():
    from onnx.backend.test.case import node

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in CASES.split():
            importlib.import_module(f"{node.__name__}.{name}")
    cases = node._NodeTestCases
    return [case for case in cases if {node.op_type for node in case.model.graph.node} <= set(TABLE)]


REFUSED = ("test_unique_",)
# Types that torch has no numbers for: the twin refuses them where it reads them, before an operator is asked. That
# a zero point is INT4 is not told to QuantizeLinear; output_dtype is.
UNKNOWN_TYPES = ("e4m3fn", "e5m2", "float4e2m1", "int2", "test_quantizelinear_int4", "test_quantizelinear_uint4")
# Aligned to size * scale before rounding there; onnxruntime and the twin align to the output's own corners.
OTHERWISE = ("test_resize_downsample_scales_linear_align_corners", "test_resize_downsample_scales_cubic_align_corners")
ROUNDED = {"test_gridsample_bicubic": 2e-5}  # measured 9.7e-6: its expected values are given with four decimals
COUNTS = {shaping: 224, indexing: 132, resize: 80, recurrent: 36, quantization: 56}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_onnx_node_models(module):
    compared = 0
    for case in node_cases():
        if not {node.op_type for node in case.model.graph.node} & set(module.OPERATORS):
            continue
        names = [value.name for value in case.model.graph.input]
        if any(part in case.name for part in UNKNOWN_TYPES):
            continue
        for given, expected in case.data_sets:
            arrays = [numpy_helper.to_array(v) if isinstance(v, TensorProto) else v for v in given]
            for constants in (False, True):
                feeds = dict(zip(names, arrays, strict=True))
                if case.name.startswith(REFUSED):
                    with pytest.raises(ModelError):
                        execute(case.model, feeds, constants=constants)
                    continue
                if case.name in OTHERWISE:
                    case.model.ir_version = 8
                    expected = testing.run(case.model, feeds)
                results = execute(case.model, feeds, constants=constants)
                for result, wanted in zip(results, expected, strict=True):
                    wanted = numpy_helper.to_array(wanted) if isinstance(wanted, TensorProto) else wanted
                    assert_close(result, wanted, ROUNDED.get(case.name, 1e-6), case.name)
                compared += 1
    assert compared >= COUNTS[module]


def against_onnxruntime(op, arrays, *, opset=18, rel=1e-6, outputs=1, fixed=(), rtol_types=(), **attributes):
    """One node, by onnxruntime and by the twin, with its ``fixed`` inputs known to the builder or not."""
    names = [f"i{k}" if array is not None else "" for k, array in enumerate(arrays)]
    made = [f"o{k}" for k in range(outputs)]
    value_infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in zip(names, arrays, strict=True)
        if array is not None and int(name[1:]) not in fixed
    ]
    graph = helper.make_graph(
        [helper.make_node(op, names, made, **attributes)],
        "g",
        value_infos,
        [onnx.ValueInfoProto(name=name) for name in made],
        [numpy_helper.from_array(arrays[k], names[k]) for k in fixed if arrays[k] is not None],
    )
    proto = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", opset)])
    feeds = {name: arrays[int(name[1:])] for name in names if name and int(name[1:]) not in fixed}
    expected = testing.run(proto, feeds)
    tensors = [None if array is None else as_tensor(array) for array in arrays]
    actual = sequence(build(op, tensors, outputs, opset=opset, fixed=fixed, **attributes)(*tensors))
    for found, wanted in zip(actual, expected, strict=True):
        assert_close(found, wanted, rel, f"{op} {attributes} {describe(arrays)}")


def describe(arrays):
    return [None if a is None else a.tolist() if a.ndim < 2 and a.size < 9 else a.shape for a in arrays]


def test_slice_as_onnxruntime():
    rng = np.random.default_rng(0)
    for _ in range(150):
        rank = int(rng.integers(1, 4))
        x = rng.normal(size=rng.integers(1, 6, rank)).astype(np.float32)
        axes = rng.permutation(rank)[: rng.integers(1, rank + 1)]
        bounds = rng.choice([-(2**63), -7, -3, -1, 0, 1, 2, 5, 2**31, 2**63 - 1], size=(2, len(axes)))
        steps = rng.choice([-3, -1, 1, 2, 2**31], size=len(axes))
        # onnxruntime reads INT64_MAX as "to the end" backwards too; the specification has INT64_MIN for that.
        bounds[1] = np.where((steps < 0) & (bounds[1] == 2**63 - 1), 2**62, bounds[1])
        axes = np.where(rng.random(len(axes)) < 0.5, axes, axes - rank)
        fixed = (1, 2, 3, 4) if rng.random() < 0.7 else ()
        against_onnxruntime("Slice", [x, *bounds, axes, steps], fixed=fixed, rel=0)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_pad_as_onnxruntime(mode):
    rng = np.random.default_rng(1)
    for _ in range(60):
        rank = int(rng.integers(1, 5))
        x = rng.normal(size=rng.integers(3, 6, rank)).astype(np.float32)
        axes = rng.permutation(rank)[: rng.integers(1, rank + 1)] if rank < 4 else np.array([3, 2])
        low = -1 if mode == "constant" else 0
        pads = rng.integers(low, 3, 2 * len(axes))
        value = np.array(0.5, np.float32) if mode == "constant" else None
        fixed = (1, 2, 3) if rng.random() < 0.7 else ()
        against_onnxruntime("Pad", [x, pads, value, axes], opset=19, fixed=fixed, rel=0, mode=mode)


@pytest.mark.parametrize("mode", ["reflect", "edge"])
def test_pad_crops_before_it_pads(mode):
    x = np.arange(24, dtype=np.float32).reshape(1, 1, 4, 6)
    expected = np.pad(x[:, :, 1:, :-2], [(0, 0), (0, 0), (0, 2), (1, 0)], mode)
    pads = [torch.from_numpy(x), torch.tensor([0, 0, -1, 1, 0, 0, 2, -2])]
    assert_close(build("Pad", pads, fixed=(1,), mode=mode)(*pads), expected, 0)


def draw(*shape, seed=0, low=None):
    """A float64 leaf whose elements are all apart by more than the step of the finite differences."""
    count = int(np.prod(shape))
    values = np.random.default_rng(seed).permutation(count) * 0.37 - 0.15 * count + 0.05
    values = values if low is None else np.abs(values) + low
    return torch.tensor(values.reshape(shape), dtype=torch.float64, requires_grad=True)


def index(*values):
    return torch.tensor(values)


# operator, inputs, attributes; integer inputs are known to the builder, and in a second run they are not.
GRADIENTS = [
    ("Concat", [draw(2, 3), draw(2, 1, seed=1)], {"axis": -1}),
    ("DepthToSpace", [draw(1, 4, 2, 1)], {"blocksize": 2}),
    ("DepthToSpace", [draw(1, 4, 2, 1)], {"blocksize": 2, "mode": "CRD"}),
    ("Expand", [draw(3, 1), index(2, 1, 4)], {}),
    ("Flatten", [draw(2, 1, 3)], {"axis": -1}),
    ("OneHot", [index(0, -1, 2), torch.tensor(3), draw(2)], {}),
    ("Range", [draw(1).detach()[0], draw(1)[0].detach() + 2, torch.tensor(0.75, dtype=torch.float64)], {}),
    ("Reshape", [draw(2, 3), index(0, -1, 1)], {}),
    ("SpaceToDepth", [draw(1, 1, 2, 4)], {"blocksize": 2}),
    ("Split", [draw(5, 2), index(3, 0, 2)], {"outputs": 3}),
    ("Split", [draw(5, 2)], {"outputs": 3, "num_outputs": 3}),
    ("Squeeze", [draw(1, 3, 1), index(-1)], {}),
    ("Tile", [draw(2, 2), index(1, 3)], {}),
    ("Transpose", [draw(2, 3, 1)], {"perm": [1, 2, 0]}),
    ("Trilu", [draw(3, 3), torch.tensor(1)], {"upper": 0}),
    ("Unsqueeze", [draw(3, 2), index(-1, 0)], {}),
    ("Compress", [draw(3, 2), torch.tensor([True, False, True])], {"axis": 0}),
    ("Gather", [draw(3, 4), index([0, -1], [2, 0])], {"axis": 1}),
    ("Gather", [draw(3, 4), torch.tensor(-2)], {"axis": 1}),
    ("GatherElements", [draw(3, 2), index([0, -1], [2, 0])], {"axis": 0}),
    ("GatherND", [draw(2, 3, 2), index([[0], [-1]], [[1], [1]])], {"batch_dims": 1}),
    *[
        ("GridSample", [draw(1, 2, 3, 4), draw(1, 2, 2, 2, seed=3)], {"mode": mode, "padding_mode": border})
        for mode in ("linear", "cubic")
        for border in ("zeros", "reflection")
    ],
    *[
        ("Pad", [draw(1, 2, 3, 4), index(0, 0, 1, -1, 0, 0, 0, 2), value], {"mode": mode})
        for mode, value in [("constant", draw(1)), ("reflect", None), ("edge", None), ("wrap", None)]
    ],
    ("Pad", [draw(3), index(1, 2)], {"mode": "reflect"}),
    ("ReverseSequence", [draw(3, 2, 2), index(3, 2)], {}),
    *[
        (
            op,
            [draw(3, 2, 2), draw(1, gates * 2, 2), draw(1, gates * 2, 2), draw(1, gates * 4)],
            {"hidden_size": 2, **more},
        )
        for op, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1))
        for more in (
            {},
            {"direction": "reverse", "linear_before_reset": 1},
            {"clip": 50.0, "direction": "reverse"},
        )
    ],
    (
        "LSTM",
        [
            *[draw(2, 3, 2), draw(2, 8, 2), draw(2, 8, 2), draw(2, 16), index(3, 1)],
            *[draw(2, 2, 2, seed=1), draw(2, 2, 2, seed=2), draw(2, 6)],
        ],
        {"hidden_size": 2, "direction": "bidirectional", "layout": 1, "input_forget": 1, "outputs": 3},
    ),
    *[
        ("ScatterElements", [draw(3, 2), index([0, -1], [2, 0]), draw(2, 2, seed=2)], {"reduction": reduction})
        for reduction in ("none", "add", "mul", "max", "min")
    ],
    *[
        ("ScatterND", [draw(3, 2), index([[0], [-1]]), draw(1, 2, 2, seed=2)], {"reduction": reduction})
        for reduction in ("none", "add", "mul", "max", "min")
    ],
    *[
        ("Resize", [draw(1, 2, 3, 4), None, None, index(1, 2, 5, 3)], {"mode": mode, **more})
        for mode in ("nearest", "linear", "cubic")
        for more in (
            {},
            {"coordinate_transformation_mode": "asymmetric"},
            {"coordinate_transformation_mode": "align_corners"},
            {"antialias": 1, "exclude_outside": 1},
        )
    ],
    ("Resize", [draw(2, 4), None, None, index(3, 2)], {"mode": "linear"}),
    ("DequantizeLinear", [draw(2, 3), draw(3), index(1, 0, 2)], {"axis": 1}),
    ("MatMulInteger", [draw(2, 3), draw(3, 2), torch.tensor(1)], {}),
    ("ConvInteger", [draw(1, 2, 3, 3), draw(2, 2, 2, 2), torch.tensor(1)], {"pads": [1, 0, 0, 1]}),
    ("Slice", [draw(4, 5), index(-1, 1), index(-(2**63), 2**63 - 1), index(0, 1), index(-2, 2)], {}),
]


@pytest.mark.parametrize(("op", "inputs", "attributes"), GRADIENTS, ids=lambda v: v if isinstance(v, str) else "")
def test_gradient_is_that_of_finite_differences(op, inputs, attributes):
    attributes = dict(attributes)
    outputs = attributes.pop("outputs", 1)
    whole = [k for k, value in enumerate(inputs) if value is not None and not value.requires_grad]
    leaves = [value for value in inputs if value is not None and value.requires_grad]
    for fixed in (tuple(whole), ()):
        function = build(op, inputs, outputs, fixed=fixed, float_type=torch.float64, opset=20, **attributes)

        def of_leaves(*values, function=function):
            given = iter(values)
            result = function(
                *[next(given) if value is not None and value.requires_grad else value for value in inputs]
            )
            kept = [value for value in sequence(result) if value is not None and value.dtype == torch.float64]
            assert kept, f"{op} gives {[value.dtype for value in sequence(result)]}"
            return tuple(kept)

        if leaves:
            assert torch.autograd.gradcheck(of_leaves, leaves)
        else:
            of_leaves()


RESIZE_MODES = ["nearest", "linear", "cubic", "linear antialias", "cubic antialias"]


def resize_case(rng, mode):
    """Inputs and attributes of a Resize that onnxruntime has, in a form drawn by chance."""
    mode, _, antialias = mode.partition(" ")
    x = rng.normal(size=[1, 2, *rng.integers(2, 9, 2)]).astype(np.float32)
    attributes = {
        "mode": mode,
        "coordinate_transformation_mode": str(
            rng.choice(["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric"])
            if antialias or rng.random() < 0.8
            else "tf_crop_and_resize"
        ),
    }
    if antialias:
        attributes["antialias"] = 1
    if mode == "nearest":
        attributes["nearest_mode"] = str(rng.choice(["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]))
    if mode == "cubic":
        attributes |= {"cubic_coeff_a": float(rng.choice([-0.75, -0.5])), "exclude_outside": int(rng.integers(2))}
    roi = None
    if attributes["coordinate_transformation_mode"] == "tf_crop_and_resize":
        attributes["extrapolation_value"] = 0.5
        roi = np.array([0, 0, *rng.choice([0.0, 0.2, -0.1], 2), 1, 1, *rng.choice([1.0, 0.7, 1.2], 2)], np.float32)
    if rng.random() < 0.5:
        sizes = np.array([1, 2, *rng.integers(1, 14, 2)])
        return [x, roi, None, sizes], attributes
    scales = np.array([1, 1, *rng.choice([0.5, 0.6, 0.75, 1, 1.5, 2, 2.3, 3], 2)], np.float32)
    return [x, roi, scales], attributes


# Which of two elements equally near is taken hangs on the compiler's order of operations: 1.5 % of sizes differ.
TIES_MOVE = ("half_pixel_symmetric", "tf_crop_and_resize")


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_resize_as_onnxruntime(mode):
    rng = np.random.default_rng(2)
    for _ in range(60):
        inputs, attributes = resize_case(rng, mode)
        if mode == "nearest" and attributes["coordinate_transformation_mode"] in TIES_MOVE:
            continue
        fixed = (1, 2, 3) if rng.random() < 0.7 else ()
        fixed = tuple(k for k in fixed if k < len(inputs))
        rel = 0 if mode == "nearest" else 1e-5  # measured 3e-6
        against_onnxruntime("Resize", inputs, opset=19, fixed=fixed, rel=rel, **attributes)


@pytest.mark.parametrize(("op", "opset"), [("Upsample", 7), ("Upsample", 9), ("Resize", 10)])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_older_resize_as_onnxruntime(op, opset, mode):
    x = np.random.default_rng(3).normal(size=(1, 2, 5, 7)).astype(np.float32)
    for height, width in [(1, 2), (2, 3), (1.7, 2.3), (0.6, 0.45)]:
        scales = np.array([1, 1, height, width], np.float32)
        if op == "Upsample" and height < 1:
            continue
        if opset == 7:
            against_onnxruntime(op, [x], opset=opset, rel=1e-5, mode=mode, scales=scales.tolist())
        else:
            against_onnxruntime(op, [x, scales], opset=opset, rel=1e-5, fixed=(1,), mode=mode)


def recurrent_case(rng, op):
    """Inputs and attributes of a recurrent node in a form drawn by chance; half of them torch has a kernel for."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    direction = str(rng.choice(["forward", "reverse", "bidirectional"]))
    ways = 2 if direction == "bidirectional" else 1
    steps, batch, size, hidden = rng.integers(1, 5, 4)

    def some(*shape):
        return rng.normal(size=shape).astype(np.float32)

    plain = rng.random() < 0.5
    lengths = None if plain or rng.random() < 0.5 else rng.integers(1, steps + 1, batch).astype(np.int32)
    inputs = [some(steps, batch, size), some(ways, gates * hidden, size), some(ways, gates * hidden, hidden)]
    inputs += [some(ways, 2 * gates * hidden) if rng.random() < 0.7 else None, lengths]
    given = rng.random() < 0.5
    inputs += [some(ways, batch, hidden) if given else None for _ in range(2 if op == "LSTM" else 1)]
    attributes = {"hidden_size": int(hidden), "direction": direction}
    if op == "GRU":
        attributes["linear_before_reset"] = int(plain or rng.integers(2))
    if op == "RNN":
        attributes["activations"] = [str(rng.choice(["Tanh", "Relu"]))] * ways
    if not plain:
        if op == "LSTM" and rng.random() < 0.5:
            inputs.append(some(ways, 3 * hidden))
        if rng.random() < 0.4:
            attributes["clip"] = 0.8
        if rng.random() < 0.5:
            count = {"LSTM": 3, "GRU": 2, "RNN": 1}[op]
            pool = ["HardSigmoid", "Relu", "Softsign", "Sigmoid", "Tanh", "Elu"]
            attributes["activations"] = [str(rng.choice(pool)) for _ in range(count * ways)]
    return inputs, attributes


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_recurrence_as_onnxruntime(op):
    rng = np.random.default_rng(4)
    for _ in range(60):
        inputs, attributes = recurrent_case(rng, op)
        outputs = 3 if op == "LSTM" else 2
        against_onnxruntime(op, inputs, opset=14, rel=1e-5, outputs=outputs, fixed=(1, 2), **attributes)


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_fused_kernel_and_loop_agree(op):
    """A clip that nothing reaches takes the loop; layout 1 is layout 0 with the axes exchanged."""
    rng = np.random.default_rng(5)
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    shapes = [(5, 3, 4), (2, gates * 6, 4), (2, gates * 6, 6), (2, gates * 12)]
    inputs = [torch.from_numpy(rng.normal(size=shape)) for shape in shapes]
    attributes = {"hidden_size": 6, "direction": "bidirectional", "linear_before_reset": 1}
    outputs = 3 if op == "LSTM" else 2
    one = build(op, inputs, outputs, **attributes)(*inputs)
    two = build(op, inputs, outputs, clip=1e3, **attributes)(*inputs)
    three = build(op, inputs, outputs, layout=1, **attributes)(inputs[0].transpose(0, 1), *inputs[1:])
    axes = [(2, 0, 1, 3), (1, 0, 2), (1, 0, 2)]
    for a, b, c, order in zip(one, two, three, axes, strict=False):
        assert_close(a, b.numpy(), 4e-15)  # measured 4e-16
        assert_close(a.permute(order).contiguous(), c.numpy(), 0)


def test_quantize_and_dequantize_pass_the_gradient_inside_the_range():
    """Against torch's own fake quantization, whose scale is learned in the same way."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(6, 5, 4, generator=generator) * 3).requires_grad_()
    scale = (torch.rand(5, generator=generator) * 0.02 + 0.005).requires_grad_()
    zero = torch.tensor([0, 3, -7, 20, -128], dtype=torch.int8)
    weight = torch.randn(x.shape, generator=generator)
    quantize = build("QuantizeLinear", [x, scale, zero], fixed=(2,), axis=1)
    dequantize = build("DequantizeLinear", [x, scale, zero], fixed=(2,), axis=1)
    y = dequantize(quantize(x, scale, zero), scale, zero)
    gradients = torch.autograd.grad((y * weight).sum(), [x, scale])
    judge = torch._fake_quantize_learnable_per_channel_affine(x, scale, zero.float(), 1, -128, 127, 1.0)
    expected = torch.autograd.grad((judge * weight).sum(), [x, scale])
    assert torch.equal(y, judge)
    assert 0.2 < (gradients[0] == 0).float().mean() < 0.9, "some elements are outside the range, some inside"
    assert_close(gradients[0], expected[0].numpy(), 1e-6)
    assert_close(gradients[1], expected[1].numpy(), 1e-6)


@pytest.mark.parametrize(("low", "high", "dtype"), [(-128, 127, torch.int8), (0, 255, torch.uint8)])
def test_rounding_is_half_to_even_and_saturates(low, high, dtype):
    x = torch.tensor([-1e6, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 1e6], dtype=torch.float64)
    inputs = [x, torch.tensor(1.0, dtype=torch.float64), torch.tensor(0, dtype=dtype)]
    expected = np.clip([-1e6, -2, -2, 0, 0, 2, 2, 1e6], low, high)
    assert_close(build("QuantizeLinear", inputs)(*inputs), expected, 0)


def test_block_quantization_trains_its_scales():
    q = torch.tensor([[1, -2, 3, 4, 5]], dtype=torch.int8)
    scale = torch.tensor([[0.5, 0.25, 2.0]], requires_grad=True)
    y = build("DequantizeLinear", [q, scale], opset=21, axis=1, block_size=2)(q, scale)
    assert y.tolist() == [[0.5, -1.0, 0.75, 1.0, 10.0]]
    (gradient,) = torch.autograd.grad(y.sum(), scale)
    assert gradient.tolist() == [[-1.0, 7.0, 5.0]]


def test_dynamic_quantization_passes_the_gradient_to_the_data():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    w = torch.randint(-128, 127, (6, 3), dtype=torch.int8)
    q, scale, zero = build("DynamicQuantizeLinear", [x], 3)(x)
    product = build("MatMulInteger", [q, w, zero], float_type=torch.float64)(q, w, zero) * scale
    (gradient,) = torch.autograd.grad(product.sum(), x)
    assert_close(gradient, np.tile(w.double().sum(1).numpy(), (4, 1)), 5e-16)  # measured 5e-17


def test_a_type_without_range_is_refused():
    x, scale, zero = torch.ones(2), torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)
    with pytest.raises(ModelError, match="quantization to int32"):
        build("QuantizeLinear", [x, scale, zero], fixed=(2,))
    with pytest.raises(ModelError, match="FLOAT8E4M3FN"):
        build("QuantizeLinear", [x, scale], opset=21, output_dtype=TensorProto.FLOAT8E4M3FN)


OLD_FORMS = [
    ("Slice", 9, 1, {"starts": [1, -3], "ends": [2**63 - 1, -1], "axes": [0, 2]}),
    ("Slice", 9, 1, {"starts": [1], "ends": [3]}),
    ("Pad", 10, 1, {"pads": [0, 1, 0, 2, 0, -1], "value": 0.5}),
    ("Pad", 2, 1, {"pads": [0, 0, 1, 0, 0, 2], "mode": "reflect"}),
    ("Split", 11, 2, {"axis": 1, "split": [1, 3]}),
    ("Split", 11, 2, {"axis": -2}),
    ("Squeeze", 11, 1, {"axes": [-2]}),
    ("Unsqueeze", 11, 1, {"axes": [1, 3]}),
    ("Flatten", 9, 1, {"axis": 2}),
]


@pytest.mark.parametrize(("op", "opset", "outputs", "attributes"), OLD_FORMS)
def test_attributes_that_became_inputs(op, opset, outputs, attributes):
    x = np.random.default_rng(6).normal(size=(3, 1, 5) if op == "Squeeze" else (3, 4, 5)).astype(np.float32)
    against_onnxruntime(op, [x], opset=opset, outputs=outputs, rel=0, **attributes)


REFUSALS = [
    ("Scatter", {"reduction": "mean"}, "reduction 'mean'"),
    ("ScatterND", {"reduction": "mean"}, "reduction 'mean'"),
    ("Pad", {"mode": "mirror"}, "mode 'mirror'"),
    ("GridSample", {"mode": "lanczos"}, "mode 'lanczos'"),
    ("Resize", {"mode": "lanczos"}, "mode 'lanczos'"),
    ("Resize", {"coordinate_transformation_mode": "corner"}, "coordinate_transformation_mode 'corner'"),
    ("LSTM", {"direction": "sideways"}, "direction 'sideways'"),
    ("GRU", {"activations": ["Sigmoid", "Swish"]}, "activations"),
    ("Constant", {"value_string": "text"}, "value_string"),
]


@pytest.mark.parametrize(("op", "attributes", "named"), REFUSALS)
def test_what_is_not_computed_is_refused_by_name(op, attributes, named):
    with pytest.raises(ModelError, match=named):
        build(op, [torch.ones(1, 1, 2, 2)], **attributes)
