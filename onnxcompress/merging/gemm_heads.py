"""What leads from a feature map to a Gemm: means over all positions, and the nodes that flatten.

``flat_head`` finds Flatten, Reshape or Squeeze and the Gemm or MatMul behind, ``replace_head`` puts a Gemm of another
tensor in their place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxcompress.cost import OperatorSpec
from onnxcompress.graph import Graph, Node, Tensor, constant_value, is_constant, is_op, optional_input, static_shape
from onnxcompress.linear import Affine


@dataclass(frozen=True, eq=False)
class Head:
    """A Gemm or MatMul with a constant right operand, and the node that flattens before it, if there is one.

    Attributes:
        flatten: Reads the features; None where they are flat as they are.
        gemm: Reads its output, or the features.
        rows: Features, the rows of the matrix.
        columns: Its columns.
    """

    flatten: Node | None
    gemm: Node
    rows: int
    columns: int

    @property
    def nodes(self) -> list[Node]:
        """Readers first."""
        return [self.gemm] if self.flatten is None else [self.gemm, self.flatten]

    def spec(self, rows: int, batch: int) -> OperatorSpec:
        """What the Gemm costs if it had this many rows; with a bias."""
        dtype = np.dtype(self.gemm.inputs[1].dtype).name
        return OperatorSpec("Gemm", (batch, rows), ((rows, self.columns), (self.columns,)), dtype=dtype)


def flat_head(graph: Graph, tensor: Tensor, features: Sequence[int]) -> Head | str | None:
    """The head that alone reads ``tensor``, by the shapes of its numbers.

    Args:
        graph: The graph of both.
        tensor: Of shape (N, *features).
        features: Channels, then spatial sizes if the tensor has such axes.

    Returns:
        None where there is another thing, a reason where it looks like a head and is none.
    """
    node = graph.only_reader(tensor)
    flatten = None
    if len(features) > 1:
        if node is None or not flattens(node, features):
            return None
        flatten, tensor = node, node.outputs[0]
        node = graph.only_reader(tensor)
    if node is None or not is_op(node, "Gemm", "MatMul") or node.inputs[0] is not tensor:
        return None
    shape = static_shape(node.inputs[1])
    if shape is None or len(shape) != 2 or not is_constant(node.inputs[1]):
        return "the right operand of the Gemm is not a constant matrix"
    rows, columns = shape[::-1] if node.attrs.get("transB", 0) else shape
    if rows != math.prod(features) or node.attrs.get("transA", 0):
        return f"the Gemm takes {rows} columns, not {math.prod(features)}"
    return Head(flatten, node, rows, columns)


def flattens(node: Node, features: Sequence[int]) -> bool:
    """Whether the node makes (N, prod(features)) of (N, *features)."""
    axes = len(features) + 1
    if is_op(node, "Flatten"):
        axis = int(node.attrs.get("axis", 1))
        return axis % axes == 1
    if is_op(node, "Squeeze"):
        squeezed = constant_axes(node, 1)
        ones = all(size == 1 for size in features[1:])
        return ones and squeezed is not None and sorted(a % axes for a in squeezed) == list(range(2, axes))
    if is_op(node, "Reshape"):
        # Two axes, and all the features in the second: then the first has what is left, the batch.
        shape = node.outputs[0].shape
        return shape is not None and len(shape) == 2 and shape[1] == math.prod(features)
    return False


def constant_axes(node: Node, index: int) -> list[int] | None:
    """The axes of a Squeeze or Reduce node, an attribute or a constant input; None where they are absent or unknown."""
    if "axes" in node.attrs:
        return [int(axis) for axis in node.attrs["axes"]]
    values = constant_value(optional_input(node, index))
    return None if values is None or not values.size else [int(axis) for axis in values.reshape(-1)]


def is_global_mean(node: Node, tensor_rank: int) -> bool:
    """Whether the node gives the mean over all positions of (N, C, *spatial), each as an axis of 1 or without them."""
    if is_op(node, "GlobalAveragePool"):
        return True
    if is_op(node, "ReduceMean"):
        axes = constant_axes(node, 1)
        return axes is not None and sorted(axis % tensor_rank for axis in axes) == list(range(2, tensor_rank))
    if is_op(node, "AveragePool"):
        kernel, size = node.attrs.get("kernel_shape"), (node.inputs[0].shape or [])[2:]
        plain = not any(node.attrs.get("pads") or []) and node.attrs.get("auto_pad", "NOTSET") in (
            "NOTSET",
            "",
            "VALID",
        )
        return plain and kernel is not None and list(size) == list(kernel) and node.attrs.get("dilations") is None
    return False


def keeps_axes(node: Node) -> bool:
    """Whether a global mean leaves an axis of size 1 for each that it takes the mean over."""
    return not is_op(node, "ReduceMean") or bool(node.attrs.get("keepdims", 1))


def replace_head(graph: Graph, head: Head, features: Tensor, affine: Affine, *, flat: bool) -> None:
    """Put ``affine`` of ``features`` in the place of a head, flattened first unless they are ``flat``."""
    gemm = head.gemm
    name, output = gemm.name or "gemm", gemm.outputs[0]
    if not flat:
        label = head.flatten.name if head.flatten is not None else f"{name}.flatten"
        features = graph.insert("Flatten", [features], None, {"axis": 1}, before=gemm, name=label).outputs[0]
        features.shape = [None, affine.matrix.shape[0]]
    if affine.bias is None and is_op(gemm, "MatMul"):
        weight = graph.new_constant(f"{name}.weight", affine.matrix)
        graph.insert("MatMul", [features, weight], [output], before=gemm, name=name)
    else:
        # As exporters write a linear layer; before opset 11 a Gemm has its C.
        weight = graph.new_constant(f"{name}.weight", np.ascontiguousarray(affine.matrix.T))
        bias = np.zeros(affine.matrix.shape[1], affine.matrix.dtype) if affine.bias is None else affine.bias
        inputs = [features, weight, graph.new_constant(f"{name}.bias", bias)]
        graph.insert("Gemm", inputs, [output], {"transB": 1}, before=gemm, name=name)
    graph.remove(*head.nodes)
