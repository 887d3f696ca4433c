"""Drop a Pad that adds nothing.

    before   y = Pad(x, pads = [0, 0, 0, 0])
    after    x

Exact, in every mode.
"""

from __future__ import annotations

import numpy as np

from onnxcompress.graph import Graph, Node, Tensor, constant_value, optional_input
from onnxcompress.patterns.bypass import BypassPass
from onnxcompress.rewrite import Miss


class EliminateNoopPad(BypassPass):
    name = "eliminate-noop-pad"
    ops = ("Pad",)

    def same_value(self, graph: Graph, node: Node) -> Tensor | Miss | None:
        pads = node.attrs.get("pads") if graph.opset < 11 else constant_value(optional_input(node, 1), limit=64)
        return node.inputs[0] if pads is not None and not np.any(pads) else None
