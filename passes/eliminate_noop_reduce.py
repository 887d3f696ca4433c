"""Drop a reduction over axes of size 1 that are kept, or over no axes.

    before   y = ReduceMax<keepdims = 1>(x, axes = [1])      with x of shape [N, 1, 8]
    after    x

Exact. ReduceSum and ReduceMean of floating-point numbers stay: a sum starts at +0 and turns -0.0 into 0.0.
"""

from __future__ import annotations

from onnxcompress.graph import Graph, Node, Tensor, constant_value, numpy_dtype, optional_input, rank
from onnxcompress.patterns.bypass import BypassPass
from onnxcompress.rewrite import Miss


class EliminateNoopReduce(BypassPass):
    name = "eliminate-noop-reduce"
    ops = ("ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceMean")

    def same_value(self, graph: Graph, node: Node) -> Tensor | Miss | None:
        source = node.inputs[0]
        given = optional_input(node, 1)
        axes = node.attrs.get("axes", []) if given is None else constant_value(given, limit=64)
        if axes is None:
            return None
        if len(axes) == 0 and node.attrs.get("noop_with_empty_axes", 0):
            return source  # defined as the identity, so nothing is added to
        axis_count = rank(source)
        if axis_count is None or not node.attrs.get("keepdims", 1):
            return None
        reduced = [int(axis) for axis in axes] or list(range(axis_count))
        if any(not -axis_count <= axis < axis_count or source.shape[axis] != 1 for axis in reduced):
            return None
        dtype = numpy_dtype(source)
        if node.op in ("ReduceSum", "ReduceMean") and (dtype is None or dtype.kind not in "iu"):
            return Miss(node.name, "a sum turns -0.0 into 0.0")
        return source
