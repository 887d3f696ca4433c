"""Cones: nodes that together make one tensor, replaced by one node.

A fused operator takes the place of its decomposed form only if nothing else reads what stands between the parts: the
parts would stay, and the work would be done twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from onnxcompress.graph import Graph, Node, Tensor, is_constant


def why_not_replace(graph: Graph, nodes: Iterable[Node], output: Tensor) -> str | None:
    """The reason why ``nodes`` cannot all go once another node makes ``output``, or None when they can."""
    cone = set(nodes)
    for node in cone:
        for tensor in node.outputs:
            if tensor is output:
                continue
            if graph.is_output(tensor):
                return f"{tensor.name!r}, which would go, is a model output"
            if any(reader not in cone for reader in tensor.outputs):
                return f"{tensor.name!r}, which would go, is read elsewhere"
    return None


def replace_cone(
    graph: Graph,
    nodes: Iterable[Node],
    output: Tensor,
    op: str,
    inputs: Sequence[Tensor],
    attrs: dict[str, Any] | None = None,
) -> Node:
    """Let one new node make ``output`` in place of ``nodes``, with which everything between them goes."""
    made = graph.insert(op, inputs, [output], attrs, before=graph.producer(output) or _fail(output))
    graph.remove(*dict.fromkeys(nodes))
    return made


def _fail(output: Tensor) -> Node:
    raise ValueError(f"no node of this graph makes {output.name!r}")


def upstream(graph: Graph, tensor: Tensor, ops: Sequence[str], depth: int) -> list[Tensor]:
    """``tensor`` and what it is computed from through at most ``depth`` nodes of these operators, nearest first.

    Constants are left out.
    """
    found = {tensor: None}
    border = [tensor]
    for _ in range(depth):
        nodes = [node for reached in border if (node := graph.producer(reached)) is not None]
        inputs = [t for node in nodes if node.op in ops for t in node.inputs if not t.is_empty() and not is_constant(t)]
        border = [t for t in dict.fromkeys(inputs) if t not in found]
        found |= dict.fromkeys(border)
    return list(found)
