"""Drop a Concat of one tensor, and what a Concat takes from tensors without elements.

    before   y = Concat<axis = 1>(a, e, b)      with e of shape [N, 0, 8]
    after    y = Concat<axis = 1>(a, b)

Exact.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnxcompress.graph import Graph, Node, Tensor, rank
from onnxcompress.rewrite import Miss, RewritePass


@dataclass(frozen=True)
class Site:
    node: Node
    inputs: tuple[Tensor, ...]


class EliminateNoopConcat(RewritePass[Site]):
    name = "eliminate-noop-concat"
    ops = ("Concat",)

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        axis, axes = int(node.attrs.get("axis", 1)), rank(node.outputs[0])
        kept = tuple(tensor for tensor in node.inputs if not is_empty_along(tensor, axis, axes)) or (node.inputs[0],)
        if len(kept) == 1:
            reason = graph.why_not_bypass(node.outputs[0], kept[0])
            if reason is not None and len(node.inputs) == 1:
                return Miss(node.name, reason)
        return Site(node, kept) if len(kept) < len(node.inputs) or len(kept) == 1 else None

    def rewrite(self, graph: Graph, site: Site) -> None:
        node = site.node
        if len(site.inputs) == 1 and graph.why_not_bypass(node.outputs[0], site.inputs[0]) is None:
            graph.bypass(node.outputs[0], site.inputs[0])
            graph.remove(node)
            return
        node.inputs = list(site.inputs)
        graph.touch(node)


def is_empty_along(tensor: Tensor, axis: int, axes: int | None) -> bool:
    """Whether ``tensor`` has ``axes`` axes and no elements along ``axis``."""
    shape = tensor.shape
    return shape is not None and len(shape) == axes and -axes <= axis < axes and shape[axis] == 0
