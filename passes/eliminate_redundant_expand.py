"""Let an elementwise operator broadcast by itself what an Expand has broadcast for it.

    before   y = Sub(x, Expand(m, Shape(x)))      with m of shape [N, 1]
    after    y = Sub(x, m)

Exact. Each axis that the Expand enlarges must have the same size in another operand, for every input size. Not for Pow,
Max and Min, which onnxruntime computes in another way where it broadcasts.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnxcompress.graph import Graph, Node, Tensor, is_op
from onnxcompress.patterns.sizes_pass import SizesPass
from onnxcompress.rewrite import Miss, remove_if_unread
from onnxcompress.sizes import Sizes
from onnxcompress.sizes.polynomial import Size

ELEMENTWISE = (
    *("Add", "Sub", "Mul", "Div", "Mod", "And", "Or", "Xor", "Where"),
    *("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"),
)


@dataclass(frozen=True)
class Site:
    node: Node
    expand: Node


class EliminateRedundantExpand(SizesPass[Site]):
    name = "eliminate-redundant-expand"
    ops = ELEMENTWISE

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        miss = None
        for tensor in node.inputs:
            expand = graph.producer(tensor)
            if expand is None or not is_op(expand, "Expand"):
                continue
            others = [other for other in node.inputs if other is not tensor]
            if is_covered(self.sizes(graph), expand, others):
                return Site(node, expand)
            miss = Miss(node.name, "the other operands are not proven to have the expanded shape")
        return miss

    def rewrite(self, graph: Graph, site: Site) -> None:
        expanded, source = site.expand.outputs[0], site.expand.inputs[0]
        site.node.inputs = [source if tensor is expanded else tensor for tensor in site.node.inputs]
        graph.touch(site.node)
        remove_if_unread(graph, [site.expand])


def is_covered(sizes: Sizes, expand: Node, others: list[Tensor]) -> bool:
    """Whether every axis that ``expand`` enlarges has its new size in one of ``others``."""
    source, expanded = sizes.dims(expand.inputs[0]), sizes.dims(expand.outputs[0])
    shapes = [dims for dims in map(sizes.dims, others) if dims is not None]
    if source is None or expanded is None:
        return False
    for place in range(1, len(expanded) + 1):  # from the last axis on
        size = expanded[-place]
        if size != size_at(source, place) and all(size != size_at(dims, place) for dims in shapes):
            return False
    return True


def size_at(dims: tuple[Size, ...], place: int) -> Size | None:
    """The size of an axis counted from the last, which is 1."""
    return dims[-place] if place <= len(dims) else None
