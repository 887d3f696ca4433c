"""Inputs of nodes that say how many channels there are, kept right when some go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxcompress.channels.labels import Line
from onnxcompress.channels.trace import Keeping, Trace
from onnxcompress.graph import Graph, Node, constant_value, is_op


def new_input(graph: Graph, node: Node, slot: int, values: np.ndarray) -> None:
    """Give a node a constant of its own; others may share the one that was there."""
    old = node.inputs[slot]
    fresh = graph.new_constant(old.name, values.astype(old.dtype))
    node.inputs = [fresh if i == slot else tensor for i, tensor in enumerate(node.inputs)]
    graph.touch(node)


def mend_sizes(trace: Trace, node: Node, slot: int, shape: Sequence[int | str | None], at: Mapping[int, Line]) -> None:
    """Keep an input that holds sizes right: ``at`` gives the element where the size of each line stands."""
    labels = np.concatenate([line.labels.reshape(-1) for line in at.values()])

    def act(graph: Graph, keeping: Keeping) -> None:
        tensor = node.inputs[slot]
        values = constant_value(tensor)
        if values is not None:
            new = values.copy()
            for index, line in at.items():
                if new[index] == line.size:
                    new[index] = keeping.count(line)
            new_input(graph, node, slot, new)
            return
        sizes = {i: size for i, size in enumerate(shape) if isinstance(size, int)}
        sizes |= {index: keeping.count(line) for index, line in at.items()}
        copied = {i: 0 for i in range(len(shape)) if i not in sizes and _is_copied(node, shape, i)}
        if len(sizes) + len(copied) == len(shape):
            new_input(graph, node, slot, np.array([value for _, value in sorted((sizes | copied).items())]))
            return
        # Computed from other shapes: what is known is put in its place, the rest stays computed.
        mask = np.array([i in sizes for i in range(len(shape))])
        wanted = np.array([sizes.get(i, 0) for i in range(len(shape))], np.int64)
        inputs = [graph.new_constant(f"{tensor.name}_known", mask), graph.new_constant(f"{tensor.name}_sizes", wanted)]
        where = graph.insert("Where", [*inputs, tensor], before=node)
        where.outputs[0].dtype, where.outputs[0].shape = np.dtype(np.int64), [len(shape)]
        node.inputs = [where.outputs[0] if i == slot else t for i, t in enumerate(node.inputs)]
        graph.touch(node)

    trace.repair(node, labels, act)


def _is_copied(node: Node, shape: Sequence[int | str | None], axis: int) -> bool:
    """Whether a 0 in the target of a Reshape gives this size."""
    source = node.inputs[0].shape
    if not is_op(node, "Reshape") or node.attrs.get("allowzero", 0) or axis >= len(source):
        return False
    return isinstance(shape[axis], str) and source[axis] == shape[axis]
