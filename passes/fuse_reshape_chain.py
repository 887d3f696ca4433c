"""Fuse Reshape, Flatten, Squeeze and Unsqueeze that follow each other.

    before   y = Reshape(Unsqueeze(x, [1]), [0, -1, 8])
    after    y = Reshape(x, ...)      with a constant target, or nothing where y has the shape of x

Exact: only the last shape counts. A target that copies sizes of the shape between (0) is rewritten in terms of x, where
that holds for every size. Unsqueeze after Unsqueeze and Squeeze after Squeeze stay what they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxcompress.graph import Graph, Node, Tensor, constant_value, is_op, optional_input, rank
from onnxcompress.patterns.reshape_target import constant_target, left_over_axis
from onnxcompress.patterns.sizes_pass import SizesPass
from onnxcompress.rewrite import Miss, remove_if_unread
from onnxcompress.sizes import Sizes
from onnxcompress.sizes.polynomial import Size

VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Site:
    first: Node
    second: Node
    # What stands there afterwards: nothing (False, None, None), the second on x as it is, or one of the others.
    keep_second: bool = False
    target: tuple[int, ...] | None = None
    axes: tuple[int, ...] | None = None


class FuseReshapeChain(SizesPass[Site]):
    name = "fuse-reshape-chain"
    ops = VIEWS

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        first = graph.producer(node.inputs[0])
        if first is None or not is_op(first, *VIEWS):
            return None
        source, output = first.inputs[0], node.outputs[0]
        sizes = self.sizes(graph)
        before, after = entry_shape(sizes, first), sizes.dims(output)
        if node.op == "Reshape" and copies_when_empty(sizes, node):
            return Miss(node.name, "a computed size of the target may be 0, and then copies another size")
        if before is not None and before == after:
            reason = graph.why_not_bypass(output, source)
            if reason is None:
                return Site(first, node)
        axes = joined_axes(first, node)
        if axes is not None:
            return Site(first, node, axes=tuple(axes))
        if node.op == "Reshape" and is_absolute(sizes, node):
            return Site(first, node, keep_second=True)
        if before is None or after is None:
            return Miss(node.name, "a shape is not known")
        given = sizes.values(optional_input(node, 1)) if node.op == "Reshape" else None
        target = constant_target(sizes, before, after, None if given is None else left_over_axis(given.items))
        if target is None:
            return Miss(node.name, "no constant target makes the shape for every size")
        return Site(first, node, target=tuple(target))

    def rewrite(self, graph: Graph, site: Site) -> None:
        first, second = site.first, site.second
        source, output = first.inputs[0], second.outputs[0]
        label = second.name or output.name
        if site.keep_second:
            second.inputs = [source, *second.inputs[1:]]
            graph.touch(second)
        elif site.axes is not None and (graph.opset < 13):
            second.inputs = [source]
            second.attrs["axes"] = list(site.axes)
            graph.touch(second)
        elif site.axes is not None:
            second.inputs = [source, graph.new_constant(f"{label}.axes", np.array(site.axes, np.int64))]
            graph.touch(second)
        elif site.target is not None:
            target = graph.new_constant(f"{label}.shape", np.array(site.target, np.int64))
            graph.insert("Reshape", [source, target], [output], before=second)
            graph.remove(second)
        else:
            graph.bypass(output, source)
            graph.remove(second)
        remove_if_unread(graph, [first])


def entry_shape(sizes: Sizes, node: Node) -> tuple[Size, ...] | None:
    """The shape of a view's input; axes that a Squeeze takes away have size 1, or it fails."""
    dims = sizes.dims(node.inputs[0])
    axes = axes_of(node) if node.op == "Squeeze" else None
    if dims is None or not axes:
        return dims
    gone = {axis % len(dims) for axis in axes}
    return tuple(Size.of(1) if axis in gone else dim for axis, dim in enumerate(dims))


def axes_of(node: Node) -> list[int] | None:
    """The constant axes of a Squeeze or Unsqueeze; None when they are computed or not given."""
    if "axes" in node.attrs:
        return list(node.attrs["axes"])
    values = constant_value(optional_input(node, 1), limit=64)
    return None if values is None else [int(axis) for axis in values.reshape(-1)]


def is_absolute(sizes: Sizes, node: Node) -> bool:
    """Whether the target of a Reshape copies no size of its input."""
    target = sizes.values(optional_input(node, 1))
    if node.attrs.get("allowzero", 0):
        return True
    return target is not None and all(size.known == -1 or sizes.is_positive(size) for size in target.items)


def copies_when_empty(sizes: Sizes, node: Node) -> bool:
    """Whether a computed size in a Reshape's target may be 0 and then stand for another size of its input."""
    target = sizes.values(optional_input(node, 1))
    if node.attrs.get("allowzero", 0) or target is None:
        return False
    given = sizes.dims(node.inputs[0])
    return any(
        size.known is None
        and not sizes.is_positive(size)
        and (given is None or axis >= len(given) or given[axis] != size)
        for axis, size in enumerate(target.items)
    )


def joined_axes(first: Node, second: Node) -> list[int] | None:
    """The axes of one Squeeze or Unsqueeze that does what two do, counted from the front; None where not known."""
    a, b = axes_of(first), axes_of(second)
    if first.op != second.op or first.op not in ("Squeeze", "Unsqueeze") or not a or not b:
        return None
    # Squeeze counts axes of its input, Unsqueeze those of its output.
    sides: list[tuple[list[int], Tensor]] = [
        (axes, node.inputs[0] if node.op == "Squeeze" else node.outputs[0]) for axes, node in ((a, first), (b, second))
    ]
    counted = []
    for axes, tensor in sides:
        count = rank(tensor)
        if count is None and min(axes) < 0:
            return None
        counted.append([axis if axis >= 0 else axis + (count or 0) for axis in axes])
    inner, outer = counted if first.op == "Squeeze" else counted[::-1]
    # ``inner`` counts all axes; ``outer`` counts those that ``inner`` leaves.
    left = [axis for axis in range(len(inner) + max(outer) + 1) if axis not in inner]
    return sorted(inner + [left[axis] for axis in outer])
