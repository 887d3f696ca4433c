"""Gemm and MatMul nodes with a scale and a shift per channel worked in, before or behind.

Unlike ``linear_nodes.read_affine`` this keeps what it can of alpha * A @ B + beta * C: alpha, transposition, a C that
is not one row, and operands that are not constants as long as a scalar on alpha and beta says the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxcompress.graph import (
    Graph,
    Node,
    Tensor,
    constant_value,
    is_constant,
    is_op,
    numpy_dtype,
    optional_input,
    rank,
    static_shape,
)
from onnxcompress.linear.conv import cast
from onnxcompress.linear.nodes import FLOATS, other_operand
from onnxcompress.merging.channel_affine import why_not_copy, why_not_scale


@dataclass(frozen=True, eq=False)
class GemmChange:
    """New numbers of a Gemm; None for an operand that stays as it is."""

    matrix: np.ndarray | None
    bias: np.ndarray | None
    alpha: float
    beta: float


def gemm_columns(node: Node) -> int | None:
    """Columns of what a Gemm makes, when they are known."""
    for tensor, axis in ((node.inputs[1], 0 if node.attrs.get("transB", 0) else 1), (node.outputs[0], 1)):
        shape = tensor.shape
        if shape is not None and len(shape) == 2 and isinstance(shape[axis], (int, np.integer)):
            return int(shape[axis])
    return None


def constant_matrix(tensor: Tensor, axes: int | None = 2) -> np.ndarray | str:
    """A floating-point constant with ``axes`` axes (None: two or more), or the reason why it is none."""
    if not is_constant(tensor):
        return "the matrix is not a constant"
    shape = static_shape(tensor)
    if np.dtype(tensor.dtype).name not in FLOATS:
        return f"the matrix is {np.dtype(tensor.dtype).name}, not floating point"
    if shape is None or len(shape) < 2 or (axes is not None and len(shape) != axes):
        return f"the matrix has shape {None if shape is None else list(shape)}"
    values = constant_value(tensor)
    assert values is not None
    return values


def scale_gemm_output(node: Node, scale: np.ndarray, shift: np.ndarray, limit_bytes: int) -> GemmChange | str:
    """``scale * Gemm + shift`` per column as one Gemm, or the reason why not.

    Args:
        node: A Gemm.
        scale: (N,) float64; (1,) for a scalar when the columns are not known.
        shift: Likewise.
        limit_bytes: Largest copy that may be made of a shared matrix.
    """
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    factor = float(scale[0]) if (scale == scale[0]).all() else None
    matrix = None
    if factor is not None and not is_constant(node.inputs[1]):
        alpha *= factor
        if not _attribute_holds(alpha, node):
            return f"alpha = {alpha} is rounded to float32"
    elif factor != 1.0:
        axis = 0 if node.attrs.get("transB", 0) else 1
        made = scaled_matrix(node, node.inputs[1], scale, axis, limit_bytes)
        if isinstance(made, str):
            return made
        matrix = made
    c = optional_input(node, 2)
    if c is not None and not is_constant(c):
        if factor is None or shift.any():
            return "C is not a constant"
        if not _attribute_holds(beta * factor, node):
            return f"beta = {beta * factor} is rounded to float32"
        return GemmChange(matrix, None, alpha, beta * factor)
    bias = gemm_bias(node, scale, shift)
    return bias if isinstance(bias, str) else GemmChange(matrix, bias, alpha, beta if bias is None else 1.0)


def _attribute_holds(value: float, node: Node) -> bool:
    """Whether a float32 attribute says ``value`` as precisely as the element type of the node does."""
    return float(np.float32(value)) == value or numpy_dtype(node.outputs[0]) in (np.float32, np.float16)


def scale_gemm_input(node: Node, scale: np.ndarray, shift: np.ndarray, limit_bytes: int) -> GemmChange | str:
    """``Gemm(scale * A + shift)``, per column of A, as one Gemm of A, or the reason why not.

    Args:
        node: A Gemm with a constant B.
        scale: (K,) float64.
        shift: (K,) float64.
        limit_bytes: Largest copy that may be made of a shared matrix.
    """
    if node.attrs.get("transA", 0):
        return "transA is set"
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    original = constant_matrix(node.inputs[1])
    if isinstance(original, str):
        return original
    axis = 1 if node.attrs.get("transB", 0) else 0
    if original.shape[axis] != len(scale):
        return f"the matrix takes {original.shape[axis]} values, there are {len(scale)}"
    made = scaled_matrix(node, node.inputs[1], scale, axis, limit_bytes) if (scale != 1).any() else None
    if isinstance(made, str):
        return made
    bias = None
    if shift.any():
        c = optional_input(node, 2)
        if c is not None and not is_constant(c):
            return "C is not a constant"
        moved = alpha * np.tensordot(original.astype(np.float64), shift, axes=(axis, 0))
        found = gemm_bias(node, np.ones(1), moved)
        if isinstance(found, str):
            return found
        bias = found
    return GemmChange(made, bias, alpha, beta if bias is None else 1.0)


def scaled_matrix(node: Node, tensor: Tensor, scale: np.ndarray, axis: int, limit_bytes: int) -> np.ndarray | str:
    """A constant matrix that ``node`` reads, times ``scale`` along ``axis``, or the reason why not."""
    reason = why_not_copy(tensor, [node], limit_bytes)
    values = constant_matrix(tensor, None)
    if reason is not None or isinstance(values, str):
        return reason or str(values)
    axis %= values.ndim
    others = tuple(i for i in range(values.ndim) if i != axis)
    reason = why_not_scale(np.abs(values).max(axis=others, initial=0), scale, values.dtype)
    if reason is not None:
        return reason
    try:
        return cast(values.astype(np.float64) * np.expand_dims(scale, others), values.dtype)
    except OverflowError as error:
        return str(error)


def gemm_bias(node: Node, scale: np.ndarray, shift: np.ndarray) -> np.ndarray | str | None:
    """``scale * beta * C + shift`` for a constant or missing C; None when nothing is needed, or a reason."""
    c = optional_input(node, 2)
    values = constant_value(c)
    dtype = numpy_dtype(node.inputs[1]) if values is None else values.dtype
    if dtype is None or dtype.name not in FLOATS:
        return f"the element type is {dtype}, not floating point"
    try:
        if values is None:
            return cast(shift, dtype) if shift.any() else None
        if not shift.any() and (scale == 1).all():
            return None
        beta = float(node.attrs.get("beta", 1.0))
        pair = [row[:1].reshape(()) if (row == row[0]).all() else row for row in (scale, shift)]
        total = values.astype(np.float64) * beta * pair[0] + pair[1]
        if total.size > max(values.size, len(scale), len(shift)):
            return f"C of shape {list(values.shape)} would grow to {list(total.shape)}"
        return cast(total, dtype)
    except OverflowError as error:
        return str(error)


def apply_change(graph: Graph, node: Node, change: GemmChange) -> None:
    """Give a Gemm its new numbers."""
    label = node.name or "gemm"
    inputs = list(node.inputs)
    if change.matrix is not None:
        inputs[1] = graph.new_constant(f"{label}.weight", change.matrix)
    if change.bias is not None:
        inputs[2:] = [graph.new_constant(f"{label}.bias", change.bias)]
    node.inputs = inputs
    for name, value in (("alpha", change.alpha), ("beta", change.beta)):
        if value != node.attrs.get(name, 1.0):
            node.attrs[name] = value
    graph.touch(node)


# -- MatMul ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MatMulChange:
    """New numbers of a MatMul: its matrix (None: it stays), and what is added to its output.

    ``add`` is the node behind it that takes ``constant`` for its own; without one, ``constant`` is a new bias.
    """

    matrix: np.ndarray | None
    constant: np.ndarray | None
    add: Node | None

    def needs_add(self, node: Node) -> bool:
        """Whether a new Add has to be made; a MatMul of two matrices becomes a Gemm instead."""
        return self.constant is not None and self.add is None and rank(node.inputs[0]) != 2


def scale_matmul_input(
    graph: Graph, node: Node, scale: np.ndarray, shift: np.ndarray, limit_bytes: int
) -> MatMulChange | str:
    """``MatMul(scale * x + shift, W)``, per column of x, with W constant, or the reason why not.

    Args:
        graph: The graph of the node.
        node: A MatMul with a constant right operand.
        scale: (K,) float64.
        shift: (K,) float64.
        limit_bytes: Largest copy that may be made of a shared matrix.
    """
    original = constant_matrix(node.inputs[1], 2 if shift.any() else None)
    if isinstance(original, str):
        return original
    matrix = scaled_matrix(node, node.inputs[1], scale, -2, limit_bytes) if (scale != 1).any() else None
    if isinstance(matrix, str):
        return matrix
    if not shift.any():
        return MatMulChange(matrix, None, None)
    moved = shift @ original.astype(np.float64)
    add = graph.only_reader(node.outputs[0])
    try:
        if add is not None and is_op(add, "Add", "Sub"):
            operands = other_operand(add)
            own = constant_value(operands[1]) if operands is not None else None
            if own is not None:
                total = own.astype(np.float64) + (moved if add.op == "Add" else -moved)
                if total.size <= max(own.size, moved.size):
                    return MatMulChange(matrix, cast(total, own.dtype), add)
        return MatMulChange(matrix, cast(moved, original.dtype), None)
    except OverflowError as error:
        return str(error)


def change_matmul(graph: Graph, node: Node, change: MatMulChange) -> None:
    """Give a MatMul its new matrix, and the constant to the node behind it, to a Gemm, or to a new Add."""
    label = node.name or "matmul"
    matrix = node.inputs[1] if change.matrix is None else graph.new_constant(f"{label}.weight", change.matrix)
    inputs = [node.inputs[0], matrix]
    node.inputs = inputs
    graph.touch(node)
    if change.constant is None:
        return
    constant = graph.new_constant(f"{label}.bias", change.constant)
    output = node.outputs[0]
    if change.add is not None:
        change.add.inputs = [constant if is_constant(tensor) else tensor for tensor in change.add.inputs]
        graph.touch(change.add)
    elif change.needs_add(node):
        node.outputs = [graph.new_variable(f"{label}_output", output)]
        graph.insert("Add", [node.outputs[0], constant], [output], before=node, name=f"{label}_bias")
    else:
        graph.insert("Gemm", [*inputs, constant], [output], before=node, name=node.name)
        graph.remove(node)
