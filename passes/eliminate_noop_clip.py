"""Drop a Clip that lets every value pass.

    before   y = Clip(x, -inf, inf)      or Clip(x) of integers
    after    x

Exact. A Clip of floating-point numbers without a bound stays: its default bounds are the largest finite numbers, so it
turns infinity into 3.4e38.
"""

from __future__ import annotations

import numpy as np

from onnxcompress.graph import Graph, Node, Tensor
from onnxcompress.patterns.bypass import BypassPass
from onnxcompress.patterns.clamps import read_clamp
from onnxcompress.rewrite import Miss


class EliminateNoopClip(BypassPass):
    name = "eliminate-noop-clip"
    ops = ("Clip",)

    def same_value(self, graph: Graph, node: Node) -> Tensor | Miss | None:
        clamp = read_clamp(graph, node)
        if clamp is None:
            return None
        if clamp.dtype.kind in "iu":
            limits = np.iinfo(clamp.dtype)
            return node.inputs[0] if clamp.low <= limits.min and clamp.high >= limits.max else None
        if clamp.low == -np.inf and clamp.high == np.inf:
            return node.inputs[0]
        if clamp.low_is_default and clamp.high_is_default:
            return Miss(node.name, "it turns infinity into the largest finite number")
        return None
