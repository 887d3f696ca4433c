"""Drop a Transpose that leaves every element where it is.

    before   y = Transpose<perm = [0, 2, 1]>(x)      with x of shape [N, 1, 1]
    after    x

Exact. The axes keep their order, or only axes of size 1 change places among themselves.
"""

from __future__ import annotations

from onnxcompress.graph import Graph, Node, Tensor, rank, same_shape
from onnxcompress.patterns.bypass import BypassPass
from onnxcompress.rewrite import Miss


class EliminateNoopTranspose(BypassPass):
    name = "eliminate-noop-transpose"
    ops = ("Transpose",)

    def same_value(self, graph: Graph, node: Node) -> Tensor | Miss | None:
        source = node.inputs[0]
        axes = rank(source)
        if "perm" not in node.attrs and axes is None:
            return None
        perm = list(node.attrs.get("perm") or range(axes or 0)[::-1])
        if perm == sorted(perm):
            return source
        if axes != len(perm) or not same_shape(source, node.outputs[0]):
            return None
        moved = [axis for axis in perm if source.shape[axis] != 1]
        return source if moved == sorted(moved) else None
