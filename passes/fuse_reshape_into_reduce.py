"""Let a reduction keep or drop its axes itself, where a Reshape, Unsqueeze or Squeeze does it afterwards.

    before   y = Unsqueeze(ReduceSum<keepdims = 0>(x, axes = [-1]), [-1])
    after    y = ReduceSum<keepdims = 1>(x, axes = [-1])

Exact: the numbers and their order are the same. The shapes must be equal for every input size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnxcompress.graph import Graph, Node, constant_value, is_op, optional_input
from onnxcompress.patterns.sizes_pass import SizesPass
from onnxcompress.rewrite import Miss
from onnxcompress.sizes.polynomial import Size

REDUCTIONS = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"),
    *("ReduceSum", "ReduceSumSquare", "ArgMax", "ArgMin"),
)


@dataclass(frozen=True)
class Site:
    reduction: Node
    view: Node


class FuseReshapeIntoReduce(SizesPass[Site]):
    name = "fuse-reshape-into-reduce"
    ops = ("Reshape", "Unsqueeze", "Squeeze", "Flatten")

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        reduction = graph.producer(node.inputs[0])
        if reduction is None or not is_op(reduction, *REDUCTIONS):
            return None
        sizes = self.sizes(graph)
        dims, wanted = sizes.dims(reduction.inputs[0]), sizes.dims(node.outputs[0])
        axes = reduced_axes(reduction)
        if dims is None or wanted is None or axes is None:
            return None
        other = shape_after(dims, axes, keep=not reduction.attrs.get("keepdims", 1))
        if other != wanted:
            return None
        if not graph.feeds_only(reduction.outputs[0], node):
            return Miss(node.name, "the reduction is read elsewhere")
        return Site(reduction, node)

    def rewrite(self, graph: Graph, site: Site) -> None:
        reduction, output = site.reduction, site.view.outputs[0]
        graph.remove(site.view)
        reduction.outputs = [output]
        reduction.attrs["keepdims"] = 0 if reduction.attrs.get("keepdims", 1) else 1
        graph.touch(reduction)


def reduced_axes(node: Node) -> list[int] | None:
    """The axes that are reduced, [] for all; None where they are computed, or none is."""
    if node.op in ("ArgMax", "ArgMin"):
        return [int(node.attrs.get("axis", 0))]
    given = optional_input(node, 1)
    axes = node.attrs.get("axes", []) if given is None else constant_value(given, limit=64)
    if axes is None or (len(axes) == 0 and node.attrs.get("noop_with_empty_axes", 0)):
        return None
    return [int(axis) for axis in axes]


def shape_after(dims: Sequence[Size], axes: Sequence[int], *, keep: bool) -> tuple[Size, ...] | None:
    """The shape of a reduction; None when an axis does not exist."""
    if any(not -len(dims) <= axis < len(dims) for axis in axes):
        return None
    gone = {axis % len(dims) for axis in axes} if axes else set(range(len(dims)))
    if keep:
        return tuple(Size.of(1) if axis in gone else dim for axis, dim in enumerate(dims))
    return tuple(dim for axis, dim in enumerate(dims) if axis not in gone)
