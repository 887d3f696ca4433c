"""Where the bias of a layer is, or where one can go.

Conv, ConvTranspose, Gemm   an input of the node, added where there was none
MatMul                      the Add behind it; a new Add where the weight is large enough to hide its time
LSTM, GRU, RNN              W and R have each their half of the B input
Gather                      nowhere
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxcompress.codebook.views import Origin, find_origin, is_stored
from onnxcompress.graph import Graph, Node, Tensor, is_op, optional_input, rank, static_shape

# An Add behind a MatMul of 128 rows takes 2 to 6 % of its time at this many numbers per row, 6 to 13 % at a quarter.
MIN_LENGTH_FOR_ADD = 256


@dataclass(frozen=True, eq=False)
class Bias:
    """Where a layer's bias is, or goes.

    Attributes:
        node: The node that reads it; for a MatMul the Add behind it, or the MatMul itself where there is no Add.
        slot: Its input; the next free one where there is no bias yet.
        shape: Shape of the whole tensor in the file.
        part: The layer's own part of the last axis, for recurrences; None for all of it.
        origin: Where it is stored; None where there is no bias yet.
        new_add: It needs an Add behind the node.
    """

    node: Node
    slot: int
    shape: tuple[int, ...]
    part: slice | None = None
    origin: Origin | None = None
    new_add: bool = False

    def values(self) -> np.ndarray | None:
        """(outputs,) float32."""
        if self.origin is None:
            return None
        whole = np.broadcast_to(self.origin.values().astype(np.float32), self.shape)
        return (whole if self.part is None else whole[..., self.part]).reshape(-1)

    def with_part(self, vector: np.ndarray, whole: np.ndarray | None = None) -> np.ndarray:
        """The whole tensor, float32, with the layer's part set to ``vector``.

        Args:
            vector: (outputs,) values.
            whole: The tensor as it is now; as stored, or zeros, by default.
        """
        if whole is None:
            whole = np.zeros(self.shape, np.float32) if self.origin is None else self.origin.values()
        made = np.array(np.broadcast_to(whole.astype(np.float32), self.shape))
        part = made if self.part is None else made[..., self.part]
        part[...] = vector.reshape(part.shape)
        return made


def own_bias(node: Node, outputs: int) -> Bias | None:
    """The bias at input 2 of a Conv, ConvTranspose or Gemm."""
    tensor = optional_input(node, 2)
    if tensor is None:
        return Bias(node, 2, (outputs,))
    origin = _stored_origin(tensor)
    if origin is None:
        return None
    shape = origin.values().shape
    if shape in ((outputs,), (1, outputs), (1,), ()):
        return Bias(node, 2, (outputs,) if len(shape) < 2 else shape, origin=origin)
    return None


def _stored_origin(tensor: Tensor) -> Origin | None:
    if not is_stored(tensor):
        return None
    origin = find_origin(tensor)
    return origin if isinstance(origin, Origin) and origin.root_values().dtype.kind == "f" else None


def added_bias(graph: Graph, node: Node, outputs: int, length: int) -> Bias | None:
    """The constant row that the one reader of a MatMul adds, or the place for one."""
    after = graph.only_reader(node.outputs[0])
    if after is not None and is_op(after, "Add"):
        slot = 1 if after.inputs[0] is node.outputs[0] else 0
        origin = _stored_origin(after.inputs[slot])
        if origin is not None:
            shape = origin.values().shape
            axes = rank(node.outputs[0])
            row = shape == (outputs,) or (shape[-1:] == (outputs,) and all(size == 1 for size in shape[:-1]))
            if row and (len(shape) == 1 or (axes is not None and len(shape) <= axes)):
                return Bias(after, slot, shape, origin=origin)
    if length < MIN_LENGTH_FOR_ADD:
        return None
    return Bias(node, 2, (outputs,), new_add=True)


def recurrent_bias(node: Node, slot: int, directions: int, rows: int) -> Bias | None:
    part = slice(0, rows) if slot == 1 else slice(rows, 2 * rows)
    tensor = optional_input(node, 3)
    if tensor is None:
        return Bias(node, 3, (directions, 2 * rows), part)
    origin = _stored_origin(tensor)
    if origin is None or static_shape(tensor) not in ((directions, 2 * rows), None):
        return None
    return Bias(node, 3, (directions, 2 * rows), part, origin)
