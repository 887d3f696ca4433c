"""Drop a Slice that takes everything.

    before   y = Slice(x, starts = [0], ends = [INT_MAX], axes = [1])
    after    x

Exact. Each axis is taken from its first element, in steps of 1, to an end that is the axis's size or more; a size that
is computed at run time is followed.
"""

from __future__ import annotations

from onnxcompress.graph import Graph, Node, Tensor
from onnxcompress.patterns.bypass import Bypass, BypassPass
from onnxcompress.patterns.sizes_pass import SizesPass
from onnxcompress.rewrite import Miss
from onnxcompress.sizes import Sizes, slice_bounds
from onnxcompress.sizes.polynomial import Size

# No axis is longer. Exporters write it for "to the end" (tf2onnx; others the greatest int32 or int64).
NO_END = 10**9


class EliminateNoopSlice(SizesPass[Bypass], BypassPass):
    name = "eliminate-noop-slice"
    ops = ("Slice",)

    def same_value(self, graph: Graph, node: Node) -> Tensor | Miss | None:
        sizes = self.sizes(graph)
        bounds = slice_bounds(sizes, node)
        if bounds is None:
            return None
        starts, ends, axes, steps = bounds
        if any(step != 1 for step in steps):
            return None
        dims = sizes.dims(node.inputs[0])
        for start, end, axis in zip(starts.items, ends.items, axes, strict=True):
            if not covers(sizes, start, end, dims[axis] if dims and -len(dims) <= axis < len(dims) else None):
                return None
        return node.inputs[0]


def covers(sizes: Sizes, start: Size, end: Size, dim: Size | None) -> bool:
    """Whether start:end takes the whole of an axis with ``dim`` elements (None: not known)."""
    if dim is None:
        return start.known == 0 and end.known is not None and end.known >= NO_END
    from_first = start.known == 0 or sizes.is_not_negative(-start - dim)
    to_last = (end.known is not None and end.known >= NO_END) or sizes.is_not_negative(end - dim)
    return from_first and to_last
