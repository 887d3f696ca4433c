"""A weight of the graph as a matrix (outputs, D), and back: what quantization sees and what the file holds.

A weight may stand behind nodes that only move or widen constants, ``Transpose(W)`` or ``Cast(W)``; what counts is the
tensor that the operator reads. Of a weight as the operator reads it, a View makes the matrix:

    tensor = matrix.reshape(unfolded).transpose(perm).reshape(shape)

    Conv, Gemm transB=1, MatMul's left operand, Gather, LSTM, GRU   unfolded = shape, no perm
    MatMul's right operand, Gemm transB=0                           (out, in), perm (1, 0)
    ConvTranspose                                                   (group, out, in, k...), perm (0, 2, 1, ...)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxcompress.errors import ModelError
from onnxcompress.graph import Constant, Graph, Node, Tensor, bodies, is_constant, is_op
from onnxcompress.model_io import element_dtype
from onnxcompress.passes.deduplicate_nodes import RANDOM
from onnxcompress.passes.replace_constant_nodes import constant_values
from onnxcompress.patterns.constant_evaluation import evaluate_in_numpy
from onnxcompress.rewrite import remove_if_unread

FLOATS = ("float16", "float32", "float64")
# Nodes through which a weight is followed back to where it is stored.
MOVES = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True)
class View:
    """How a weight tensor is a matrix; see the module's text."""

    outputs: int
    unfolded: tuple[int, ...]
    perm: tuple[int, ...] | None
    shape: tuple[int, ...]

    @property
    def length(self) -> int:
        return math.prod(self.unfolded) // self.outputs

    @property
    def channel_axis(self) -> int:
        """The axis of ``unfolded`` that the input channels stand on."""
        axis, rows = 0, 1
        while rows < self.outputs or self.unfolded[axis] == 1:
            rows *= self.unfolded[axis]
            axis += 1
        return axis

    def to_matrix(self, tensor: np.ndarray) -> np.ndarray:
        """(outputs, D) in the tensor's type."""
        if self.perm is not None:
            permuted = [self.unfolded[axis] for axis in self.perm]
            tensor = tensor.reshape(permuted).transpose(np.argsort(self.perm))
        return tensor.reshape(self.outputs, -1)

    def from_matrix(self, matrix: np.ndarray) -> np.ndarray:
        """The tensor that the operator reads."""
        tensor = matrix.reshape(self.unfolded)
        if self.perm is not None:
            tensor = np.ascontiguousarray(tensor.transpose(self.perm))
        return tensor.reshape(self.shape)


def rows_view(shape: Sequence[int], outputs: int) -> View:
    """The tensor's rows are the matrix's."""
    return View(outputs, tuple(shape), None, tuple(shape))


def columns_view(shape: Sequence[int]) -> View:
    """(..., in, out) with leading axes of size 1: the columns are the matrix's rows."""
    length, outputs = shape[-2:]
    return View(outputs, (outputs, length), (1, 0), tuple(shape))


def conv_transpose_view(shape: Sequence[int], group: int) -> View:
    """(in, out / group, k...): a row holds all that makes one output channel, input channel by input channel."""
    inner, outer, kernel = shape[0] // group, shape[1], tuple(shape[2:])
    axes = len(kernel)
    if group == 1:
        return View(outer, (outer, inner, *kernel), (1, 0, *range(2, 2 + axes)), tuple(shape))
    perm = (0, 2, 1, *range(3, 3 + axes))
    return View(group * outer, (group, outer, inner, *kernel), perm, tuple(shape))


# -- constants behind nodes ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Origin:
    """Where a weight is stored, and the nodes between there and its reader, in order."""

    root: Tensor  # a Constant, or the output of a Constant node
    nodes: tuple[Node, ...]

    @property
    def stored_bytes(self) -> int:
        return _held(self.root).nbytes if isinstance(self.root, Constant) else self.root_values().nbytes

    @property
    def dtype(self) -> np.dtype:
        """Element type that the reader sees."""
        found = np.dtype(_held(self.root).dtype)
        for node in self.nodes:
            found = (element_dtype(int(node.attrs["to"])) or found) if node.op == "Cast" else found
        return found

    def root_values(self) -> np.ndarray:
        return _held(self.root).values

    def values(self) -> np.ndarray:
        """The tensor that the reader sees."""
        array = self.root_values()
        for node in self.nodes:
            graph = node.graph
            assert graph is not None
            rest = [_held(tensor).values for tensor in node.inputs[1:]]
            found = evaluate_in_numpy(graph, node, [array, *rest])
            if found is None:
                raise ModelError(f"{node.op} {node.name!r} on the constant {self.root.name!r} cannot be computed")
            array = found[0]
        return array


def _held(tensor: Tensor) -> Constant:
    """The Constant itself, or the one in a Constant node."""
    if isinstance(tensor, Constant):
        return tensor
    maker: Node = tensor.inputs[0]
    ((kind, value),) = maker.attrs.items()
    values = constant_values(kind, value)
    assert values is not None, "is_stored was not asked"
    return Constant(tensor.name, values)


def is_stored(tensor: Tensor) -> bool:
    """Whether the tensor is an initializer, or a Constant node holds it."""
    if is_constant(tensor):
        return True
    maker: Node | None = tensor.inputs[0] if tensor.inputs else None
    if maker is None or not is_op(maker, "Constant") or len(maker.attrs) != 1:
        return False
    return constant_values(*next(iter(maker.attrs.items()))) is not None


def find_origin(tensor: Tensor) -> Origin | str:
    """Follow a tensor that depends on constants alone to where it is stored, or say why that cannot be done."""
    nodes: list[Node] = []
    while not is_stored(tensor):
        node: Node = tensor.inputs[0]
        if is_op(node, "DequantizeLinear"):
            return "it is quantized already (DequantizeLinear)"
        if not is_op(node, *MOVES) or not all(is_stored(other) for other in node.inputs[1:]):
            return f"it is computed by {node.op} {node.name!r}; optimize the model first"
        target = element_dtype(int(node.attrs["to"])) if node.op == "Cast" else None
        if target is not None and target.name not in FLOATS:
            return f"it is {target.name}, not {' or '.join(FLOATS)}"
        nodes.append(node)
        tensor = node.inputs[0]
    dtype = np.dtype(_held(tensor).dtype)
    if nodes and dtype.kind in "iub":
        return f"it is quantized already (stored as {dtype.name})"
    return Origin(tensor, tuple(reversed(nodes)))


def remove_moves(origin: Origin) -> None:
    """Remove the nodes between a weight and its reader that nothing reads any more."""
    for node in [*reversed(origin.nodes), *origin.root.inputs]:
        if node.graph is not None:
            remove_if_unread(node.graph, [node])


def static_nodes(root: Graph) -> set[Node]:
    """The nodes of a graph and of those nested in it that depend on constants alone and give the same every time."""
    found: set[Node] = set()
    for graph in root.walk():
        for node in graph.nodes:
            given = [tensor for tensor in node.inputs if not tensor.is_empty()]
            if node.op in RANDOM or bodies(node) or not (given or is_op(node, "Constant")):
                continue
            if all(is_constant(t) or (t.inputs and t.inputs[0] in found) for t in given):
                found.add(node)
    return found
