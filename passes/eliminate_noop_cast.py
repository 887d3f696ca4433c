"""Drop a Cast or CastLike to the type that the tensor has already.

    before   y = Cast<to = float>(x)      with x of type float
    after    x

Exact.
"""

from __future__ import annotations

from onnxcompress.graph import Graph, Node, Tensor, numpy_dtype
from onnxcompress.model_io import element_dtype
from onnxcompress.patterns.bypass import BypassPass
from onnxcompress.rewrite import Miss


class EliminateNoopCast(BypassPass):
    name = "eliminate-noop-cast"
    ops = ("Cast", "CastLike")

    def same_value(self, graph: Graph, node: Node) -> Tensor | Miss | None:
        source = numpy_dtype(node.inputs[0])
        target = element_dtype(int(node.attrs["to"])) if node.op == "Cast" else numpy_dtype(node.inputs[1])
        return node.inputs[0] if source is not None and source == target else None
