"""Fuse two Transposes that follow each other.

    before   y = Transpose<perm = q>(Transpose<perm = p>(x))
    after    y = Transpose<perm = [p[i] for i in q]>(x)

Exact. Where the second undoes the first, nothing is left. The first stays while something else reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnxcompress.graph import Graph, Node, is_op, rank
from onnxcompress.rewrite import Miss, RewritePass, remove_if_unread


@dataclass(frozen=True)
class Site:
    first: Node
    second: Node
    perm: tuple[int, ...]
    undone: bool


class FuseTransposeChain(RewritePass[Site]):
    name = "fuse-transpose-chain"
    ops = ("Transpose",)

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        first = graph.producer(node.inputs[0])
        if first is None or not is_op(first, "Transpose"):
            return None
        p, q = permutation(first), permutation(node)
        if p is None or q is None:
            return Miss(node.name, "the number of axes is not known")
        perm = tuple(p[i] for i in q)
        undone = perm == tuple(range(len(perm)))
        if undone and graph.why_not_bypass(node.outputs[0], first.inputs[0]) is not None:
            # Two Transposes are worse than one that moves nothing.
            undone = False
        return Site(first, node, perm, undone)

    def rewrite(self, graph: Graph, site: Site) -> None:
        first, second = site.first, site.second
        if site.undone:
            graph.bypass(second.outputs[0], first.inputs[0])
            graph.remove(second)
        else:
            second.inputs = [first.inputs[0]]
            second.attrs["perm"] = list(site.perm)
            graph.touch(second)
        remove_if_unread(graph, [first])


def permutation(node: Node) -> list[int] | None:
    """The permutation of a Transpose; None when it is the default one of an unknown number of axes."""
    axes = rank(node.inputs[0])
    if "perm" in node.attrs:
        return list(node.attrs["perm"])
    return None if axes is None else list(range(axes))[::-1]
