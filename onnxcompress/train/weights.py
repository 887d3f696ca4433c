"""Which numbers of a graph are weights: what training moves, what it must leave alone, and how torch holds them.

A float initializer is trained where it enters an operator as a weight: a kernel, a matrix, a scale or bias of a
normalization, an embedding or codebook, or a vector that is added to or multiplied with a variable. Left alone are
integers, single numbers (the 0.5 of a GELU, an epsilon), running statistics, and what steers an operator (the scales of
Resize, the bounds of Clip, the scale of QuantizeLinear). ``TorchGraph(trainable=...)`` overrides the choice by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from onnx_graphsurgeon.ir.tensor import LazyValues
from torch import Tensor

from onnxcompress.errors import ModelError
from onnxcompress.graph import STANDARD_DOMAINS, Constant, Graph, Node, is_op
from onnxcompress.graph import Tensor as GraphTensor
from onnxcompress.passes.replace_constant_nodes import constant_values
from onnxcompress.train.ops.call import torch_type

# By operator, the input positions that hold weights.
_WEIGHTS = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (0, 1, 2),
    "MatMul": (0, 1),
    "BatchNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "RMSNormalization": (1,),
    "PRelu": (1,),
    "LSTM": (1, 2, 3, 7),
    "GRU": (1, 2, 3),
    "RNN": (1, 2, 3),
    "Gather": (0,),
}
_ANY_INPUT = {"Einsum", "Add", "Sub", "Mul", "Div", "Concat", "Sum"}
# What hands a weight on: the weight is trained where the result is used as one.
_HANDS_ON = {"Identity", "Cast", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand", "Flatten", "Slice", "Split"}


def is_float(dtype: Any) -> bool:
    """Whether an ONNX element type of NumPy is a floating one, the small ones of ml_dtypes included."""
    found = np.dtype(dtype)
    return found.kind == "f" or (found.kind == "V" and "float" in found.name)


def weight_tensors(graph: Graph) -> Iterator[tuple[str, GraphTensor]]:
    """Every tensor whose value the file holds, with a name that is unique in the model.

    Yields:
        Initializers that a node reads, outputs of Constant nodes, and inputs with a default, of the graph and of the
        graphs nested in it. A name that two branches share gets the name of its branch in front from the second on.
    """
    taken: set[str] = set()
    seen: set[GraphTensor] = set()

    def unique(tensor: GraphTensor, where: Graph) -> str:
        name = str(tensor.name)
        while name in taken:
            name = f"{where.name or 'branch'}/{name}"
        taken.add(name)
        return name

    for inner in graph.walk():
        for tensor in inner.inputs:
            if tensor.name in inner.overridable:
                seen.add(tensor)
                yield unique(tensor, inner), tensor
        for node in inner.nodes:
            found = [t for t in node.inputs if isinstance(t, Constant)]
            found += [node.outputs[0]] if is_op(node, "Constant") else []
            for tensor in found:
                if tensor not in seen:
                    seen.add(tensor)
                    yield unique(tensor, inner), tensor
        for tensor in inner.outputs:
            if isinstance(tensor, Constant) and tensor not in seen:
                seen.add(tensor)
                yield unique(tensor, inner), tensor


def enters_as_weight(graph: Graph, tensor: GraphTensor, shape: tuple[int, ...]) -> bool:
    """Whether a float value of this shape is read as a weight by some node, directly or handed on."""
    pending, seen = [tensor], {tensor}
    while pending:
        at = pending.pop()
        for node in at.outputs:
            if node.domain not in STANDARD_DOMAINS:
                continue
            if _reads_as_weight(graph, node, at, int(np.prod(shape))):
                return True
            if node.op in _HANDS_ON and node.inputs[0] is at:
                fresh = [output for output in node.outputs if output not in seen]
                seen.update(fresh)
                pending += fresh
    return False


def _reads_as_weight(graph: Graph, node: Node, tensor: GraphTensor, size: int) -> bool:
    if any(t is tensor and i in _WEIGHTS.get(node.op, ()) for i, t in enumerate(node.inputs)):
        return True
    if node.op not in _ANY_INPUT or size < 2:
        return False
    # Beside a constant it is arithmetic on constants; beside the model's input it prepares the samples.
    return any(t is not tensor and t.inputs and not is_op(t.inputs[0], "Constant") for t in node.inputs)


def held_values(tensor: GraphTensor) -> np.ndarray | None:
    """The value that the file holds for a tensor of ``weight_tensors``; None where it is no dense tensor."""
    if isinstance(tensor, Constant):
        return tensor.values
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or len(node.attrs) != 1:
        return None
    found = constant_values(*next(iter(node.attrs.items())))
    return found.load() if isinstance(found, LazyValues) else found


def to_torch(values: np.ndarray, float_type: torch.dtype, name: str) -> Tensor:
    """A copy of an initializer as a torch tensor; half types and float32 become ``float_type``, 4-bit types 8-bit.

    Raises:
        ModelError: torch has no such type.
    """
    if np.dtype(values.dtype).kind in "OSU":
        raise ModelError(f"initializer {name!r} holds strings, which torch does not compute with")
    kind = torch_type(values.dtype, float_type, f"initializer {name!r}")
    if values.dtype.kind == "V":  # of ml_dtypes
        values = values.astype(np.float32 if is_float(values.dtype) else np.int8 if kind == torch.int8 else np.uint8)
    return torch.from_numpy(np.array(values, order="C")).to(kind)


def to_stored(tensor: Tensor, like: np.ndarray, name: str) -> np.ndarray:
    """The numbers of ``tensor``, rounded to the type of the initializer ``like``.

    Raises:
        ModelError: A number is finite in ``tensor`` and not in the type of the initializer.
    """
    values = tensor.detach().cpu().contiguous().numpy().reshape(like.shape)
    with np.errstate(over="ignore"):
        stored = values.astype(like.dtype)
    if is_float(like.dtype):
        lost = np.isfinite(values) & ~np.isfinite(stored.astype(np.float64))
        if lost.any():
            raise ModelError(
                f"initializer {name!r}: {values[lost].flat[0]:.3g} does not fit {like.dtype}, the type it is stored as"
            )
    return stored
