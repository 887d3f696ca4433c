"""Shapes at the old resolution, where inference needs numbers that are computed from sizes: Pad and Range."""

from __future__ import annotations

import numpy as np

from onnxcompress.graph import Graph, Node, Tensor, Variable, is_op, optional_input, scalar_value, static_shape
from onnxcompress.shapes import infer_shapes
from onnxcompress.sizes import Sizes

MAX_ROUNDS = 16  # each goes on from the shapes that the one before computed


def infer_old_shapes(graph: Graph) -> None:
    """As ``infer_shapes``, with more operators; sizes of inputs are numbers."""
    infer_shapes(graph)
    known: dict[str, Tensor] = {}
    for _ in range(MAX_ROUNDS):
        open_nodes = [
            node
            for node in graph.nodes
            if is_op(node, "Pad", "Range")
            and static_shape(node.outputs[0]) is None
            and node.inputs[0].dtype is not None
        ]
        if not open_nodes:
            return
        sizes, more = Sizes(graph), {}
        for node in open_nodes:
            shape = _shape(sizes, node)
            if shape is not None:
                name = node.outputs[0].name
                more[name] = Variable(name, np.dtype(node.inputs[0].dtype), shape)
        if not more.keys() - known.keys():
            return
        known |= more
        infer_shapes(graph, known=known)


def _shape(sizes: Sizes, node: Node) -> list[int] | None:
    if is_op(node, "Range"):
        bounds = range_bounds(sizes, node)
        return None if bounds is None else [len(range(*bounds))]
    shape, pads = static_shape(node.inputs[0]), _known(sizes, optional_input(node, 1))
    if shape is None or pads is None or optional_input(node, 3) is not None or len(pads) != 2 * len(shape):
        return None
    return [size + pads[i] + pads[i + len(shape)] for i, size in enumerate(shape)]


def range_bounds(sizes: Sizes, node: Node) -> list[int] | None:
    """Limits and step of a Range of whole numbers, be they cast to float."""
    bounds = []
    for tensor in node.inputs:
        cast = sizes.graph.producer(tensor)
        found = _known(sizes, cast.inputs[0] if cast is not None and is_op(cast, "Cast") else tensor)
        number = scalar_value(tensor)
        if found is None and isinstance(number, float) and number.is_integer():
            found = [int(number)]
        bounds += found or []
    return bounds if len(bounds) == 3 and bounds[2] else None


def _known(sizes: Sizes, tensor: Tensor | None) -> list[int] | None:
    values = sizes.values(tensor)
    return None if values is None or values.known is None else list(values.known)
