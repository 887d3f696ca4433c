"""Conv, Gemm and MatMul nodes as the linear operators of ``linear``, and back.

Reading returns a reason instead of an operator where the node's numbers are not known now.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxcompress.cost import OperatorSpec, known_shape
from onnxcompress.graph import Graph, Node, Tensor, constant_value, is_constant, optional_input, static_shape
from onnxcompress.linear import Affine, ConvOp

FLOATS = ("float16", "float32", "float64")


def read_conv(node: Node) -> ConvOp | str:
    """A Conv node as a ConvOp, or the reason why its numbers are not known.

    ``auto_pad`` is resolved to explicit pads; for SAME with a stride that needs the input's size.
    """
    weight = constant_value(node.inputs[1])
    if weight is None:
        return "the weight is not a constant"
    if weight.dtype.name not in FLOATS:
        return f"the weight is {weight.dtype.name}, not floating point"
    bias_tensor = optional_input(node, 2)
    bias = constant_value(bias_tensor)
    if bias_tensor is not None and bias is None:
        return "the bias is not a constant"
    if not np.isfinite(weight).all() or (bias is not None and not np.isfinite(bias).all()):
        return "a weight is not finite"
    axes = weight.ndim - 2
    pads = explicit_pads(node, weight.shape[2:])
    if pads is None:
        return "auto_pad depends on an input size that is not known"
    if any(pad < 0 for pad in pads):
        return "a pad is negative"
    return ConvOp(
        weight=weight,
        bias=bias,
        strides=tuple(node.attrs.get("strides") or [1] * axes),
        dilations=tuple(node.attrs.get("dilations") or [1] * axes),
        pads_begin=tuple(pads[:axes]),
        pads_end=tuple(pads[axes:]),
        group=int(node.attrs.get("group", 1)),
    )


def explicit_pads(node: Node, kernel: Sequence[int]) -> list[int] | None:
    """Begin pads then end pads of a Conv or pool node; None when ``auto_pad`` needs an unknown size."""
    axes = len(kernel)
    mode = node.attrs.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        return list(node.attrs.get("pads") or [0] * (2 * axes))
    if mode == "VALID":
        return [0] * (2 * axes)
    strides = list(node.attrs.get("strides") or [1] * axes)
    dilations = list(node.attrs.get("dilations") or [1] * axes)
    shape = node.inputs[0].shape
    begin, end = [], []
    for i in range(axes):
        reach = dilations[i] * (kernel[i] - 1)
        if strides[i] == 1:
            total = reach
        else:
            size = shape[i + 2] if shape is not None and len(shape) == axes + 2 else None
            if not isinstance(size, (int, np.integer)):
                return None
            total = max((-(-int(size) // strides[i]) - 1) * strides[i] + reach + 1 - int(size), 0)
        small, large = total // 2, total - total // 2
        begin.append(large if mode == "SAME_LOWER" else small)
        end.append(small if mode == "SAME_LOWER" else large)
    return begin + end


def conv_attrs(conv: ConvOp) -> dict[str, Any]:
    """Attributes of the Conv node for ``conv``."""
    return {
        "dilations": list(conv.dilations),
        "group": int(conv.group),
        "kernel_shape": [int(k) for k in conv.kernel],
        "pads": [*map(int, conv.pads_begin), *map(int, conv.pads_end)],
        "strides": list(conv.strides),
    }


def insert_conv(
    graph: Graph, conv: ConvOp, source: Tensor, outputs: Sequence[Tensor] | None, *, before: Node, name: str = ""
) -> Node:
    """Make the Conv node of ``conv`` in front of ``before``, with new initializers for weight and bias."""
    label = name or before.name or "conv"
    inputs: list[Tensor] = [source, graph.new_constant(f"{label}.weight", conv.weight)]
    if conv.bias is not None:
        inputs.append(graph.new_constant(f"{label}.bias", conv.bias))
    return graph.insert("Conv", inputs, outputs, conv_attrs(conv), before=before, name=name)


def conv_spec(conv: ConvOp, source: Tensor) -> OperatorSpec:
    """What ``conv`` on ``source`` costs; unknown sizes of ``source`` are replaced by nominal ones."""
    shape, _ = known_shape(source)
    if shape is None or len(shape) != conv.spatial_rank + 2:
        shape = (1, conv.in_channels, *[32] * conv.spatial_rank)
    return conv_spec_at(conv, (shape[0], *shape[2:]))


def conv_spec_at(conv: ConvOp, batch_and_size: Sequence[int]) -> OperatorSpec:
    """What ``conv`` costs at a batch and spatial size."""
    weights: list[tuple[int, ...]] = [tuple(conv.weight.shape)]
    if conv.bias is not None:
        weights.append(tuple(conv.bias.shape))
    attrs = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(conv_attrs(conv).items()))
    return OperatorSpec(
        "Conv",
        (int(batch_and_size[0]), conv.in_channels, *map(int, batch_and_size[1:])),
        tuple(weights),
        attrs,
        dtype=conv.weight.dtype.name,
    )


def spatial_sizes(source: Tensor, conv: ConvOp) -> list[int | None]:
    """Spatial sizes of a Conv's input as far as they are known."""
    shape = source.shape
    if shape is None or len(shape) != conv.spatial_rank + 2:
        return [None] * conv.spatial_rank
    return [int(dim) if isinstance(dim, (int, np.integer)) else None for dim in shape[2:]]


# -- matrices --------------------------------------------------------------------------------------------------------


def read_affine(node: Node) -> Affine | str:
    """A Gemm or MatMul node with a constant right operand as y = x @ matrix + bias, or the reason why not.

    ``alpha``, ``beta``, ``transB`` and a broadcast C are folded in. MatMul has no bias.
    """
    matrix = constant_value(node.inputs[1])
    if matrix is None:
        return "the right operand is not a constant"
    if matrix.dtype.name not in FLOATS:
        return f"the right operand is {matrix.dtype.name}, not floating point"
    if matrix.ndim != 2:
        return f"the right operand has {matrix.ndim} axes, not 2"
    if not np.isfinite(matrix).all():
        return "a weight is not finite"
    if node.op == "MatMul":
        return Affine(matrix, None)
    if node.attrs.get("transA", 0):
        return "transA is set"
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    if node.attrs.get("transB", 0):
        matrix = matrix.T
    scaled = matrix if alpha == 1.0 else (matrix.astype(np.float64) * alpha).astype(matrix.dtype)
    bias_tensor = optional_input(node, 2)
    if bias_tensor is None:
        return Affine(scaled, None)
    bias = constant_value(bias_tensor)
    if bias is None:
        return "C is not a constant"
    if bias.size not in (1, matrix.shape[1]) or (bias.ndim == 2 and bias.shape[0] != 1):
        return f"C has shape {list(bias.shape)}, not one value per column"
    row = np.broadcast_to(bias.reshape(-1).astype(np.float64) * beta, (matrix.shape[1],))
    return Affine(scaled, np.ascontiguousarray(row).astype(matrix.dtype))


# -- per-channel constants -------------------------------------------------------------------------------------------


def channel_vector(tensor: Tensor, channels: int, tensor_rank: int | None, axis: int = 1) -> np.ndarray | str:
    """A constant operand of Mul/Add as one value per channel, or the reason why it is not.

    Args:
        tensor: The operand.
        channels: Channels of the other operand.
        tensor_rank: Rank of the other operand; needed unless the constant is a scalar.
        axis: The channel axis of the other operand.

    Returns:
        (channels,) values in the constant's dtype, or a reason.
    """
    if not is_constant(tensor):
        return "an operand is not a constant"
    shape = static_shape(tensor)
    assert shape is not None
    size = int(np.prod(shape, dtype=np.int64))
    if size != 1 and size != channels:
        return f"the constant has shape {list(shape)}, not one value per channel"
    values = constant_value(tensor)
    assert values is not None
    if size == 1:
        if tensor_rank is not None and len(shape) > tensor_rank:
            return "the constant adds axes"
        if tensor_rank is None and len(shape) > 1:
            return "the rank of the other operand is not known"
        return np.broadcast_to(values.reshape(1), (channels,))
    if tensor_rank is None:
        return "the rank of the other operand is not known"
    if len(shape) > tensor_rank:
        return "the constant adds axes"
    aligned = (1,) * (tensor_rank - len(shape)) + shape
    if aligned[axis] != channels:
        return f"the constant of shape {list(shape)} does not lie along the channel axis"
    return values.reshape(-1)


def other_operand(node: Node) -> tuple[Tensor, Tensor] | None:
    """(live, constant) operands of a two-input node with exactly one constant; None otherwise."""
    if len(node.inputs) != 2:
        return None
    a, b = node.inputs
    if is_constant(b) and not is_constant(a):
        return a, b
    if is_constant(a) and not is_constant(b):
        return b, a
    return None
