"""Drop a Resize or Upsample that keeps every size.

    before   y = Resize(x, , scales = [1, 1, 1, 1])
    after    x

Exact: at scale 1 each output element stands exactly on an input element, in every mode but the crop.
"""

from __future__ import annotations

import numpy as np

from onnxcompress.graph import Graph, Node, Tensor, constant_value, optional_input, rank
from onnxcompress.patterns.bypass import Bypass, BypassPass
from onnxcompress.patterns.sizes_pass import SizesPass
from onnxcompress.rewrite import Miss


class EliminateNoopResize(SizesPass[Bypass], BypassPass):
    name = "eliminate-noop-resize"
    ops = ("Resize", "Upsample")

    def same_value(self, graph: Graph, node: Node) -> Tensor | Miss | None:
        if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
            return None
        source = node.inputs[0]
        scales = node.attrs.get("scales")
        if scales is None:
            # (x, scales) up to opset 10, (x, roi, scales, sizes) later.
            scales = constant_value(optional_input(node, 1 if graph.opset < 11 else 2), limit=64)
        if scales is not None and len(scales):
            return source if np.all(np.asarray(scales) == 1) else None
        sizes = self.sizes(graph)
        dims, target = sizes.dims(source), sizes.values(optional_input(node, 3))
        if dims is None or target is None:
            return None
        axes = node.attrs.get("axes") or range(rank(source) or 0)
        return source if tuple(dims[axis] for axis in axes) == target.items else None
