"""Drop an Expand or Tile that repeats nothing.

    before   y = Expand(x, shape)     with no axis of shape larger than that of x
             y = Tile(x, [1, 1])
    after    x

Exact. Sizes that are computed at run time are followed: Expand(x, Shape(x)) is found too.
"""

from __future__ import annotations

from onnxcompress.graph import Graph, Node, Tensor, same_shape
from onnxcompress.patterns.bypass import Bypass, BypassPass
from onnxcompress.patterns.sizes_pass import SizesPass
from onnxcompress.rewrite import Miss
from onnxcompress.sizes.polynomial import Size


class EliminateNoopExpand(SizesPass[Bypass], BypassPass):
    name = "eliminate-noop-expand"
    ops = ("Expand", "Tile")

    def same_value(self, graph: Graph, node: Node) -> Tensor | Miss | None:
        source = node.inputs[0]
        if same_shape(source, node.outputs[0]):
            return source
        sizes = self.sizes(graph)
        dims, given = sizes.dims(source), sizes.values(node.inputs[1])
        if given is None:
            return None
        if node.op == "Tile":
            return source if given.known is not None and set(given.known) <= {1} else None
        if dims is None or len(given.items) > len(dims):
            return None
        one = Size.of(1)
        pairs = zip(dims[len(dims) - len(given.items) :], given.items, strict=True)
        return source if all(size in (dim, one) for dim, size in pairs) else None
