"""Drop a Reshape, Flatten, Squeeze or Unsqueeze whose output has the shape of its input for every input size.

    before   y = Reshape(x, [0, -1, 8])      with x of shape [N, M, 8]
    after    x

Exact. Sizes that are computed at run time are followed: Reshape(x, Shape(x)) is found too.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnxcompress.graph import Graph, Node, Tensor, optional_input, same_shape
from onnxcompress.patterns.bypass import Bypass, BypassPass
from onnxcompress.patterns.sizes_pass import SizesPass
from onnxcompress.rewrite import Miss
from onnxcompress.sizes import Sizes
from onnxcompress.sizes.polynomial import Size


class EliminateNoopReshape(SizesPass[Bypass], BypassPass):
    name = "eliminate-noop-reshape"
    ops = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")

    def same_value(self, graph: Graph, node: Node) -> Tensor | Miss | None:
        source = node.inputs[0]
        if same_shape(source, node.outputs[0]):
            return source
        if node.op != "Reshape":
            return None
        sizes = self.sizes(graph)
        dims, target = sizes.dims(source), sizes.values(optional_input(node, 1))
        if dims is None or target is None or len(dims) != len(target.items):
            return None
        allow_zero = bool(node.attrs.get("allowzero", 0))
        return source if keeps_shape(sizes, dims, target.items, allow_zero=allow_zero) else None


def keeps_shape(sizes: Sizes, dims: Sequence[Size], target: Sequence[Size], *, allow_zero: bool) -> bool:
    """Whether a Reshape of ``dims`` to as many sizes changes none of them."""
    other = [
        size for dim, size in zip(dims, target, strict=True) if size != dim and not (size.known == 0 and not allow_zero)
    ]
    # The number of elements stays, so one -1 can only take the size that the axis has. (With an empty axis beside it
    # the Reshape fails.)
    return not other or (len(other) == 1 and other[0].known == -1)
