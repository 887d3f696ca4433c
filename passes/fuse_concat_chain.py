"""Fuse a Concat into the Concat that reads it.

    before   y = Concat<axis = 1>(a, Concat<axis = 1>(b, c), d)
    after    y = Concat<axis = 1>(a, b, c, d)

Exact. The inner one must be read once, and along the same axis.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnxcompress.graph import Graph, Node, Tensor, is_op, rank
from onnxcompress.rewrite import Miss, RewritePass


@dataclass(frozen=True)
class Site:
    outer: Node
    inner: Node


class FuseConcatChain(RewritePass[Site]):
    name = "fuse-concat-chain"
    ops = ("Concat",)

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        miss = None
        for tensor in node.inputs:
            inner = graph.producer(tensor)
            if inner is None or not is_op(inner, "Concat") or not same_axis(node, inner):
                continue
            if graph.feeds_only(tensor, node):
                return Site(node, inner)
            miss = Miss(node.name, "the inner Concat is read elsewhere")
        return miss

    def rewrite(self, graph: Graph, site: Site) -> None:
        joined = site.inner.outputs[0]
        inputs: list[Tensor] = []
        for tensor in site.outer.inputs:
            inputs += site.inner.inputs if tensor is joined else [tensor]
        site.outer.inputs = inputs
        graph.remove(site.inner)
        graph.touch(site.outer)


def same_axis(a: Node, b: Node) -> bool:
    """Whether two Concats of equal rank join along the same axis."""
    first, second = int(a.attrs.get("axis", 1)), int(b.attrs.get("axis", 1))
    if first == second:
        return True
    axes = rank(a.outputs[0])
    return axes is not None and first % axes == second % axes
