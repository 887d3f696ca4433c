"""Operators that work along axes: pools, padding, resizing, pixel blocks, reductions."""

from __future__ import annotations

import numpy as np

from onnxcompress.channels.labels import Line, lines, on_axis, varied
from onnxcompress.channels.mending import mend_sizes
from onnxcompress.channels.parameters import axes_given
from onnxcompress.channels.trace import Keeping, Trace, blurred, constant_input, ints, sizes_of
from onnxcompress.graph import Graph, Node, constant_value, is_constant, is_op, optional_input


def pool(trace: Trace, node: Node) -> None:
    """Pools over the axes behind the channels."""
    x = node.inputs[0]
    labels, rest = trace.of(x), trace.rest(x)
    if labels is None:
        return
    if set(varied(labels)) - {0, 1}:
        trace.freeze(x, node, "pools along an axis that has channels")
        return
    averages_border = node.op in ("AveragePool", "LpPool", "GlobalLpPool") and rest != 0
    trace.set(node.outputs[0], labels, blurred(rest) if averages_border else rest)


def pad(trace: Trace, node: Node) -> None:
    """Pad on axes without channels."""
    x = node.inputs[0]
    labels = trace.of(x)
    if labels is None:
        return
    amounts = node.attrs.get("pads") or constant_input(node, 1)
    if amounts is None:
        amounts = constant_input(node, 1)
    axes_given = optional_input(node, 3)
    axes = list(range(len(x.shape))) if axes_given is None else None
    if axes_given is not None and is_constant(axes_given):
        axes = [a % len(x.shape) for a in ints(constant_value(axes_given))]
    if amounts is None or axes is None:
        trace.freeze(x, node, "how much it adds to the channels is not known")
        return
    numbers = ints(amounts)
    for index, axis in enumerate(axes):
        if numbers[index] or numbers[index + len(axes)]:
            trace.freeze_axis(x, axis, node, "adds channels")
            if axis in varied(labels):
                return
    rest = trace.rest(x)
    if (node.attrs.get("mode") or "constant") == "constant":
        filled = optional_input(node, 2)
        number = float(node.attrs.get("value", 0.0)) if filled is None else trace.rest(filled)
        rest = rest if number == rest else blurred(rest)
    trace.set(node.outputs[0], labels, rest)


def resize(trace: Trace, node: Node) -> None:
    """Resize and Upsample of axes without channels."""
    x, y = node.inputs[0], node.outputs[0]
    labels = trace.of(x)
    if labels is None:
        return
    for axis in varied(labels):
        size = y.shape[axis]
        if not isinstance(size, (int, np.integer)) or int(size) != labels.shape[axis]:
            trace.freeze(x, node, "changes an axis that has channels")
            return
    outside = node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    trace.set(y, labels, blurred(trace.rest(x)) if outside else trace.rest(x))
    trace.work(node, labels)
    if is_op(node, "Resize") and optional_input(node, 3) is not None and "axes" not in node.attrs:
        mend_sizes(trace, node, 3, sizes_of(y), {line.axis: line for line in lines(labels)})


def depth_to_space(trace: Trace, node: Node) -> None:
    """DepthToSpace (PixelShuffle): the channels that become one pixel block go together."""
    x = node.inputs[0]
    line = trace.channel_line(x, 1)
    if line is None:
        trace.freeze(x, node, "its channels are not on axis 1 alone")
        return
    square = int(node.attrs["blocksize"]) ** 2
    flat = line.labels.reshape(-1)
    column_row = (node.attrs.get("mode") or "DCR") == "CRD"
    by_pixel = flat.reshape(-1, square) if column_row else flat.reshape(square, -1).T
    trace.space.unite(by_pixel, by_pixel[:, :1])
    trace.set(node.outputs[0], on_axis(by_pixel[:, 0], 1, 4), trace.rest(x))


def space_to_depth(trace: Trace, node: Node) -> None:
    """SpaceToDepth: each channel becomes several."""
    x = node.inputs[0]
    line = trace.channel_line(x, 1)
    if line is None:
        trace.freeze(x, node, "its channels are not on axis 1 alone")
        return
    many = np.tile(line.labels.reshape(-1), int(node.attrs["blocksize"]) ** 2)
    trace.set(node.outputs[0], on_axis(many, 1, 4), trace.rest(x))


SUMS = frozenset({"ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"})


def reduce(trace: Trace, node: Node) -> None:
    """Reductions: sums over channels lose nothing by those that are 0; means and extremes are of those that stay."""
    x, y = node.inputs[0], node.outputs[0]
    labels = trace.of(x)
    if labels is None:
        return
    rank = len(x.shape)
    axes = axes_given(node, 1)
    if axes is None:
        if optional_input(node, 1) is not None:
            trace.freeze(x, node, "its axes are not constant")
            return
        axes = [] if node.attrs.get("noop_with_empty_axes", 0) else list(range(rank))
    axes = [axis % rank for axis in axes]
    gone = [axis for axis in axes if axis in varied(labels)]
    rest = trace.rest(x)
    if gone:
        if len(varied(labels)) > 1:
            trace.freeze(x, node, "takes channels of several axes together")
        elif node.op in SUMS:
            trace.mask(node, 0, gone[0])
        else:
            _reduce_the_rest(trace, node, Line(labels, gone[0]))
        return
    if node.op in SUMS or node.op not in ("ReduceMean", "ReduceMax", "ReduceMin"):
        rest = 0.0 if rest == 0 and node.op in SUMS else blurred(rest)
    kept = labels if node.attrs.get("keepdims", 1) else labels.squeeze(tuple(axes))
    trace.set(y, kept, rest)


def _reduce_the_rest(trace: Trace, node: Node, line: Line) -> None:
    trace.approximate(line, node, "is taken over the channels that stay")

    def refer(graph: Graph, keeping: Keeping) -> None:
        source = node.inputs[0]
        kept = graph.new_constant(f"{source.name}_kept", np.flatnonzero(keeping.mask(line)))
        taken = graph.insert("Gather", [source, kept], attrs={"axis": line.axis}, before=node).outputs[0]
        node.inputs = [taken, *node.inputs[1:]]

    trace.refer(node, line.labels, refer)


def arg_reduce(trace: Trace, node: Node) -> None:
    """ArgMax, ArgMin, TopK: numbers of channels are their result."""
    trace.freeze(node.inputs[0], node, "its result is numbers of elements")
