"""The base of passes that drop a node whose output is one of its inputs, bit for bit."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from onnxcompress.graph import Graph, Node, Tensor
from onnxcompress.rewrite import Miss, RewritePass

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bypass:
    """``node`` goes; ``source`` takes the place of its first output."""

    node: Node
    source: Tensor


class BypassPass(RewritePass[Bypass]):
    """A pass says which tensor the first output equals; this class asks whether that can stand there, and acts."""

    def same_value(self, graph: Graph, node: Node) -> Tensor | Miss | None:
        """The tensor that always holds the same value as the node's first output.

        Other outputs must be unread. A Miss when it looked so and cannot be proven; None when it is another thing.
        """
        raise NotImplementedError

    def match(self, graph: Graph, node: Node) -> Bypass | Miss | None:
        if not node.outputs or not node.inputs:
            return None
        source = self.same_value(graph, node)
        if source is None or isinstance(source, Miss):
            return source
        if any(is_used(graph, tensor) for tensor in node.outputs[1:]):
            return Miss(node.name, "another output of the node is read")
        reason = graph.why_not_bypass(node.outputs[0], source)
        return Miss(node.name, reason) if reason is not None else Bypass(node, source)

    def rewrite(self, graph: Graph, site: Bypass) -> None:
        graph.bypass(site.node.outputs[0], site.source)
        graph.remove(site.node)


def is_used(graph: Graph, tensor: Tensor) -> bool:
    """Whether anything reads ``tensor`` or it leaves the graph."""
    return bool(tensor.outputs) or graph.is_output(tensor)
