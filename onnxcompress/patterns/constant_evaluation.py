"""What a node gives for known inputs: in NumPy where that is onnxruntime's result bit for bit, and as a model to run.

NumPy has the operators that only move elements, integer and boolean arithmetic, and the floating-point operations that
IEEE 754 defines to the last bit. For everything else ``single_node_model`` makes a model for onnxruntime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, helper, numpy_helper

from onnxcompress.graph import Constant, Graph, Node
from onnxcompress.model_io import element_dtype

Arrays = Sequence["np.ndarray | None"]
Rule = Callable[[Graph, Node, Arrays], "Sequence[np.ndarray] | None"]


def evaluate_in_numpy(graph: Graph, node: Node, inputs: Arrays) -> list[np.ndarray] | None:
    """The outputs of a node, or None when NumPy is not trusted with it.

    Args:
        graph: The graph of the node, for its opset.
        node: A node of the standard domain.
        inputs: One array per input, None for one that is omitted.
    """
    rule = RULES.get(node.op)
    if rule is None or any(x is not None and not is_plain(x.dtype) for x in inputs):
        return None
    with np.errstate(all="ignore"):
        found = rule(graph, node, inputs)
    return None if found is None else [np.asarray(array) for array in found]


def is_plain(dtype: np.dtype) -> bool:
    """Whether NumPy itself has the type; the small types of ml_dtypes are left to onnxruntime."""
    return dtype.isbuiltin == 1


# -- operators that move elements ------------------------------------------------------------------------------------


def _ints(graph: Graph, node: Node, inputs: Arrays, name: str, index: int) -> list[int] | None:
    """An attribute of old opsets that became an input; None when it is not given."""
    if name in node.attrs:
        return [int(value) for value in node.attrs[name]]
    given = inputs[index] if index < len(inputs) else None
    return None if given is None else [int(value) for value in given.reshape(-1)]


def _reshape(graph: Graph, node: Node, inputs: Arrays) -> Sequence[np.ndarray] | None:
    data, target = inputs[0], inputs[1] if len(inputs) > 1 else None
    if data is None or target is None:
        return None
    shape = [int(size) for size in target]
    if not node.attrs.get("allowzero", 0):
        shape = [data.shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    return [data.reshape(shape)]


def _squeeze(graph: Graph, node: Node, inputs: Arrays) -> Sequence[np.ndarray] | None:
    data, axes = inputs[0], _ints(graph, node, inputs, "axes", 1)
    if data is None:
        return None
    return [np.squeeze(data, axis=None if not axes else tuple(axes))]


def _unsqueeze(graph: Graph, node: Node, inputs: Arrays) -> Sequence[np.ndarray] | None:
    data, axes = inputs[0], _ints(graph, node, inputs, "axes", 1)
    return None if data is None or axes is None else [np.expand_dims(data, tuple(axes))]


def _flatten(graph: Graph, node: Node, inputs: Arrays) -> Sequence[np.ndarray] | None:
    data = inputs[0]
    assert data is not None
    rows = int(np.prod(data.shape[: node.attrs.get("axis", 1)], dtype=np.int64))
    return [data.reshape(rows, data.size // rows)] if rows else None


def _transpose(graph: Graph, node: Node, inputs: Arrays) -> Sequence[np.ndarray] | None:
    data = inputs[0]
    assert data is not None
    return [np.ascontiguousarray(np.transpose(data, node.attrs.get("perm")))]


def _concat(graph: Graph, node: Node, inputs: Arrays) -> Sequence[np.ndarray] | None:
    parts = [part for part in inputs if part is not None]
    return [np.concatenate(parts, axis=node.attrs["axis"])]


def _slice(graph: Graph, node: Node, inputs: Arrays) -> Sequence[np.ndarray] | None:
    data = inputs[0]
    names = ("starts", "ends", "axes", "steps")
    starts, ends, axes, steps = (_ints(graph, node, inputs, name, i + 1) for i, name in enumerate(names))
    if data is None or starts is None or ends is None:
        return None
    cuts = [slice(None)] * data.ndim
    for i, axis in enumerate(axes if axes is not None else range(len(starts))):
        start, end, step = starts[i], ends[i], 1 if steps is None else steps[i]
        # An end before the first element, which a backward slice reaches with -1 - size, is None in Python.
        before_first = step < 0 and end < -data.shape[axis]
        cuts[axis] = slice(start, None if before_first else end, step)
    return [np.ascontiguousarray(data[tuple(cuts)])]


def _gather(graph: Graph, node: Node, inputs: Arrays) -> Sequence[np.ndarray] | None:
    data, indices = inputs[0], inputs[1]
    axis = node.attrs.get("axis", 0)
    if data is None or indices is None or not data.ndim:
        return None
    size = data.shape[axis]
    if indices.size and not (-size <= indices.min() and indices.max() < size):
        return None  # onnxruntime refuses to run it
    return [np.take(data, indices, axis=axis)]


def _expand(graph: Graph, node: Node, inputs: Arrays) -> Sequence[np.ndarray] | None:
    data, target = inputs[0], inputs[1]
    if data is None or target is None:
        return None
    shape = np.broadcast_shapes(data.shape, tuple(int(size) for size in target))
    return [np.ascontiguousarray(np.broadcast_to(data, shape))]


def _tile(graph: Graph, node: Node, inputs: Arrays) -> Sequence[np.ndarray] | None:
    data, counts = inputs[0], inputs[1]
    return None if data is None or counts is None else [np.tile(data, tuple(int(count) for count in counts))]


def _constant_of_shape(graph: Graph, node: Node, inputs: Arrays) -> Sequence[np.ndarray] | None:
    target = inputs[0]
    value = node.attrs["value"].values.reshape(()) if "value" in node.attrs else np.float32(0)
    if target is None or not is_plain(value.dtype):
        return None
    return [np.full(tuple(int(size) for size in target), value)]


def _split(graph: Graph, node: Node, inputs: Arrays) -> Sequence[np.ndarray] | None:
    data, lengths = inputs[0], _ints(graph, node, inputs, "split", 1)
    if data is None:
        return None
    axis, count = node.attrs.get("axis", 0), len(node.outputs)
    if lengths is None:
        step = -(-data.shape[axis] // count)  # the last piece is the smaller one
        lengths = [step] * (count - 1) + [data.shape[axis] - step * (count - 1)]
    return [np.ascontiguousarray(part) for part in np.split(data, np.cumsum(lengths)[:-1], axis=axis)]


def _where(graph: Graph, node: Node, inputs: Arrays) -> Sequence[np.ndarray] | None:
    condition, a, b = inputs
    if condition is None or a is None or b is None or a.dtype.kind == "f":
        return None  # onnxruntime's turns -0.0 into 0.0
    return [np.where(condition, a, b)]


def _shape(graph: Graph, node: Node, inputs: Arrays) -> Sequence[np.ndarray] | None:
    data = inputs[0]
    assert data is not None
    return [np.array(data.shape[node.attrs.get("start", 0) : node.attrs.get("end", data.ndim)], np.int64)]


# -- arithmetic ------------------------------------------------------------------------------------------------------

EXACT_KINDS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64")


def _arithmetic(function: Callable[..., Any], *, floats: bool = True, bools: bool = False) -> Rule:
    """An elementwise operator on operands of one type."""

    def apply(graph: Graph, node: Node, inputs: Arrays) -> Sequence[np.ndarray] | None:
        operands = [x for x in inputs if x is not None]
        kinds = {x.dtype for x in operands}
        if len(kinds) != 1 or len(operands) != len(inputs):
            return None
        (dtype,) = kinds
        if not (bools and dtype == np.bool_) and dtype.name not in EXACT_KINDS:
            return None
        if dtype.kind == "f" and not floats:
            return None
        result = function(*operands)
        return None if result is None else [result]

    return apply


def _div(a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    if a.dtype.kind == "f":
        return np.asarray(a / b)
    if np.any(b == 0) or (a.dtype.kind == "i" and np.any(b == -1)):
        return None  # -2^63 / -1 overflows
    # Integer division truncates toward zero; NumPy's rounds down.
    quotient = np.asarray(a // b)
    return np.asarray(quotient + ((a % b != 0) & ((a < 0) != (b < 0)))).astype(a.dtype)


def _mod(graph: Graph, node: Node, inputs: Arrays) -> Sequence[np.ndarray] | None:
    a, b = inputs
    if a is None or b is None or a.dtype != b.dtype or a.dtype.kind not in "iu" or np.any(b == 0):
        return None
    return [np.fmod(a, b) if node.attrs.get("fmod", 0) else np.mod(a, b)]


def _cast(graph: Graph, node: Node, inputs: Arrays) -> Sequence[np.ndarray] | None:
    data, dtype = inputs[0], element_dtype(int(node.attrs["to"]))
    if data is None or dtype is None or not is_plain(dtype) or object in (data.dtype, dtype):
        return None
    if data.dtype.kind == "f" and dtype.kind in "iu":
        # Outside the range the result is whatever the machine gives.
        limits = np.iinfo(dtype)
        if not np.all(np.isfinite(data) & (data > float(limits.min)) & (data < float(limits.max))):
            return None
    if dtype == np.float16 and data.dtype.name not in ("float16", "float32", "bool"):
        return None  # onnxruntime goes by way of float32, which may round twice
    return [data.astype(dtype)]


def _reduce(function: Callable[..., Any]) -> Rule:
    def apply(graph: Graph, node: Node, inputs: Arrays) -> Sequence[np.ndarray] | None:
        data, axes = inputs[0], _ints(graph, node, inputs, "axes", 1)
        if data is None or data.dtype.name not in ("int32", "int64") or not data.size:
            return None
        if not axes and node.attrs.get("noop_with_empty_axes", 0):
            return [data]
        kept = bool(node.attrs.get("keepdims", 1))
        return [np.asarray(function(data, axis=tuple(axes) if axes else None, keepdims=kept)).astype(data.dtype)]

    return apply


def _range(graph: Graph, node: Node, inputs: Arrays) -> Sequence[np.ndarray] | None:
    start, limit, step = inputs
    if start is None or limit is None or step is None or start.dtype.kind not in "iu" or not step.item():
        return None
    return [np.arange(start.item(), limit.item(), step.item(), dtype=start.dtype)]


def _many(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def apply(*operands: np.ndarray) -> Any:
        result: Any = operands[0]
        for operand in operands[1:]:
            result = function(result, operand)
        return result

    return apply


RULES: dict[str, Rule] = {
    "Abs": _arithmetic(np.abs),
    "Add": _arithmetic(np.add),
    "And": _arithmetic(np.logical_and, bools=True),
    "Cast": _cast,
    "Ceil": _arithmetic(np.ceil),
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Div": _arithmetic(_div),
    "Equal": _arithmetic(np.equal, bools=True),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": _arithmetic(np.floor),
    "Gather": _gather,
    "Greater": _arithmetic(np.greater),
    "GreaterOrEqual": _arithmetic(np.greater_equal),
    "Identity": lambda graph, node, inputs: None if inputs[0] is None else [inputs[0]],
    "Less": _arithmetic(np.less),
    "LessOrEqual": _arithmetic(np.less_equal),
    "Max": _arithmetic(_many(np.maximum), floats=False),
    "Min": _arithmetic(_many(np.minimum), floats=False),
    "Mod": _mod,
    "Mul": _arithmetic(np.multiply),
    "Neg": _arithmetic(np.negative),
    "Not": _arithmetic(np.logical_not, bools=True),
    "Or": _arithmetic(np.logical_or, bools=True),
    "Range": _range,
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": lambda graph, node, inputs: None if inputs[0] is None else [np.array(inputs[0].size, np.int64)],
    "Slice": _slice,
    "Split": _split,
    "Sqrt": _arithmetic(np.sqrt),
    "Squeeze": _squeeze,
    "Sub": _arithmetic(np.subtract),
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
    "Xor": _arithmetic(np.logical_xor, bools=True),
}


# -- for onnxruntime -------------------------------------------------------------------------------------------------


def single_node_model(graph: Graph, node: Node, inputs: Mapping[str, np.ndarray]) -> ModelProto:
    """A model without inputs that computes the outputs of ``node``; onnxruntime infers their types."""
    outputs = [onnx.ValueInfoProto(name=tensor.name) for tensor in node.outputs if not tensor.is_empty()]
    root = graph
    while root.outer is not None:
        root = root.outer
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in inputs.items()]
    body = helper.make_graph([node_proto(node)], "node", [], outputs, initializers)
    imports = [onnx.OperatorSetIdProto(domain=entry.domain, version=entry.version) for entry in root.import_domains]
    return helper.make_model(body, ir_version=max(int(root.ir_version or 0), 4), opset_imports=imports)


def node_proto(node: Node) -> NodeProto:
    """The node as a NodeProto."""
    proto = NodeProto(op_type=node.op, name=node.name, domain=node.domain or "")
    proto.input.extend(tensor.name for tensor in node.inputs)
    proto.output.extend(tensor.name for tensor in node.outputs)
    for name, value in node.attrs.items():
        if isinstance(value, AttributeProto):
            proto.attribute.append(value)
        elif isinstance(value, Constant):
            proto.attribute.append(helper.make_attribute(name, numpy_helper.from_array(np.asarray(value.values))))
        elif value != []:
            proto.attribute.append(helper.make_attribute(name, value))
    return proto
