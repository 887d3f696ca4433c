"""Drop a Split into one piece.

    before   y = Split(x)      with one output
    after    x

Exact.
"""

from __future__ import annotations

from onnxcompress.graph import Graph, Node, Tensor
from onnxcompress.patterns.bypass import BypassPass
from onnxcompress.rewrite import Miss


class EliminateNoopSplit(BypassPass):
    name = "eliminate-noop-split"
    ops = ("Split",)

    def same_value(self, graph: Graph, node: Node) -> Tensor | Miss | None:
        return node.inputs[0] if len(node.outputs) == 1 else None
