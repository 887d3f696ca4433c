"""Drop Identity nodes.

    before   y = Identity(x)    z = f(y)
    after    z = f(x)

Exact. One stays where the name of a model output needs it: the output equals an input, a constant or another output.
"""

from __future__ import annotations

from onnxcompress.graph import Graph, Node, Tensor
from onnxcompress.patterns.bypass import BypassPass
from onnxcompress.rewrite import Miss


class EliminateIdentity(BypassPass):
    name = "eliminate-identity"
    ops = ("Identity",)

    def same_value(self, graph: Graph, node: Node) -> Tensor | Miss | None:
        return node.inputs[0]
