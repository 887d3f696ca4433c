"""Drop Dropout nodes that drop nothing.

    before   y, mask = Dropout(x, ratio, training_mode)
    after    x

Exact. It drops nothing outside training (from opset 12 on ``training_mode`` is an input; opsets 7 to 11 have no
training) or at ratio 0. While the mask is read, the node stays.
"""

from __future__ import annotations

from onnxcompress.graph import Graph, Node, Tensor, optional_input, scalar_value
from onnxcompress.patterns.bypass import BypassPass
from onnxcompress.rewrite import Miss


class EliminateDropout(BypassPass):
    name = "eliminate-dropout"
    ops = ("Dropout",)

    def same_value(self, graph: Graph, node: Node) -> Tensor | Miss | None:
        if graph.opset < 7:
            return Miss(node.name, "Dropout before opset 7 may be in training mode")
        training = optional_input(node, 2)
        trains = training is not None and scalar_value(training) is not False
        if trains and scalar_value(optional_input(node, 1)) != 0:  # 0.5 when it is omitted
            return Miss(node.name, "Dropout may be in training mode")
        return node.inputs[0]
