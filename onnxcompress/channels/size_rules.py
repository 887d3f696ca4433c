"""Operators that tell sizes: Shape and Size.

Numbers of channels may only reach inputs that are mended.
"""

from __future__ import annotations

import numpy as np

from onnxcompress.channels.labels import varied
from onnxcompress.channels.parameters import slice_numbers
from onnxcompress.channels.trace import Trace, constant_input
from onnxcompress.graph import Graph, Node, Tensor, is_op

SIZE_STEPS = frozenset(
    {"Cast", "Concat", "Unsqueeze", "Squeeze", "Gather", "Slice", "Identity", "Mul", "Div", "Add", "Sub"}
)
SIZE_READERS = {"Reshape": 1, "Expand": 1, "Resize": 3}


def shape(trace: Trace, node: Node) -> None:
    """Shape: sizes of axes with channels may only reach inputs that are mended."""
    x = node.inputs[0]
    labels = trace.of(x)
    if labels is None:
        return
    rank = len(x.shape)
    start, end, _ = slice(node.attrs.get("start", 0), node.attrs.get("end", np.iinfo(np.int64).max)).indices(rank)
    touched = {axis - start for axis in varied(labels) if start <= axis < end}
    reason = _leak(trace.graph, node.outputs[0], touched) if touched else None
    if reason is not None:
        trace.freeze(x, node, reason)


def _leak(graph: Graph, tensor: Tensor, touched: set[int] | None) -> str | None:
    """Where sizes go that change, if not only to shapes that are mended; ``touched`` are their elements."""
    if graph.is_output(tensor):
        return "the number of channels is an output of the model"
    for reader in dict.fromkeys(tensor.outputs):
        slot = next(i for i, t in enumerate(reader.inputs) if t is tensor)
        if reader.graph is not graph:
            return "a nested graph reads the number of channels"
        if touched is not None and is_op(reader, "Gather", "Slice") and slot == 0:
            taken = _taken(reader, int(tensor.shape[0]) if tensor.shape else 0)
            if taken is not None and not touched & taken:
                continue
        if SIZE_READERS.get(reader.op) == slot and is_op(reader, reader.op):
            continue
        if not is_op(reader, *SIZE_STEPS) or (is_op(reader, "Gather", "Slice") and slot != 0):
            return f"{reader.op} {reader.name!r} computes with the number of channels"
        reason = _leak(graph, reader.outputs[0], None)
        if reason is not None:
            return reason
    return None


def _taken(reader: Node, count: int) -> set[int] | None:
    if is_op(reader, "Gather"):
        indices = constant_input(reader, 1)
        return None if indices is None else {int(i) % max(count, 1) for i in indices.reshape(-1)}
    given = slice_numbers(reader, 1)
    if given is None or given[3] != [1]:
        return None
    return set(range(*slice(given[0][0], given[1][0]).indices(count)))


def size(trace: Trace, node: Node) -> None:
    """Size of a tensor whose number of channels may change."""
    trace.freeze(node.inputs[0], node, "computes with the number of channels")
