"""Operators that move elements, or take some: Reshape, Concat, Split, Slice, Gather."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from onnxcompress.channels.labels import Line, lines, on_axis, padded, reshaped, varied
from onnxcompress.channels.linear_rules import gather_table
from onnxcompress.channels.mending import mend_sizes, new_input
from onnxcompress.channels.parameters import axes_given, slice_numbers
from onnxcompress.channels.trace import UNKNOWN, WILD, Keeping, Trace, constant_input, ints, known, name_of, sizes_of
from onnxcompress.graph import Graph, Node, Tensor, constant_value, is_constant, is_op, numpy_dtype


def reshape(trace: Trace, node: Node) -> None:
    """Reshape: the labels are reshaped, and the target gets the new sizes."""
    x, y = node.inputs[0], node.outputs[0]
    labels = trace.of(x)
    if labels is None:
        return
    found = reshaped(labels, sizes_of(x), sizes_of(y))
    if found is None:
        trace.freeze(x, node, f"where {sizes_of(x)} goes in {sizes_of(y)} is not known")
        return
    trace.set(y, found, trace.rest(x))
    found = trace.of(y)
    if found is not None:
        mend_sizes(trace, node, 1, sizes_of(y), {line.axis: line for line in lines(found)})


def flatten(trace: Trace, node: Node) -> None:
    """Flatten to two axes."""
    x, y = node.inputs[0], node.outputs[0]
    labels = trace.of(x)
    if labels is None:
        return
    axis = int(node.attrs.get("axis", 1))
    axis += len(x.shape) if axis < 0 else 0
    sizes = sizes_of(x)
    halves = [_product(sizes[:axis]), _product(sizes[axis:])]
    target = [known_size if known_size is not None else y.shape[i] for i, known_size in enumerate(halves)]
    for i, part in enumerate((sizes[:axis], sizes[axis:])):
        if len(part) == 1:
            target[i] = part[0]
    found = reshaped(labels, sizes, target)
    if found is None:
        trace.freeze(x, node, f"where {sizes} goes in {target} is not known")
        return
    trace.set(y, found, trace.rest(x))


def _product(sizes: Sequence[int | str | None]) -> int | None:
    return math.prod(s for s in sizes if isinstance(s, int)) if all(isinstance(s, int) for s in sizes) else None


def transpose(trace: Trace, node: Node) -> None:
    """Transpose."""
    x = node.inputs[0]
    labels = trace.of(x)
    if labels is not None:
        order = node.attrs.get("perm") or list(range(len(x.shape)))[::-1]
        trace.set(node.outputs[0], labels.transpose(order), trace.rest(x))


def squeeze(trace: Trace, node: Node) -> None:
    """Squeeze and Unsqueeze: axes of size 1 come and go."""
    labels, y = trace.of(node.inputs[0]), node.outputs[0]
    if labels is None:
        return
    axes = axes_given(node, 1)
    if axes is None and is_op(node, "Unsqueeze"):
        trace.freeze(node.inputs[0], node, "its axes are not constant")
        return
    if is_op(node, "Squeeze"):
        rank = labels.ndim
        gone = [a % rank for a in axes] if axes is not None else _ones(node.inputs[0])
        if gone is None or any(labels.shape[a] != 1 for a in gone):
            trace.freeze(node.inputs[0], node, "which axes go is not known")
            return
        found = labels.squeeze(tuple(gone))
    else:
        assert axes is not None
        found = np.expand_dims(labels, tuple(axes))
    trace.set(y, found, trace.rest(node.inputs[0]))


def _ones(tensor: Tensor) -> list[int] | None:
    shape = known(tensor)
    return None if shape is None else [axis for axis, size in enumerate(shape) if size == 1]


def concat(trace: Trace, node: Node) -> None:
    """Concat: along its axis the labels follow each other; on others they are the same for all parts."""
    rank = len(node.outputs[0].shape)
    axis = int(node.attrs["axis"]) % rank
    found = [trace.of(tensor) for tensor in node.inputs]
    if all(labels is None for labels in found):
        return
    others = {a for labels in found for a in varied(labels)} - {axis}
    if len(others) == 1:
        (other,) = others
        for slot, tensor in enumerate(node.inputs):
            if found[slot] is None and is_table(tensor) and tensor.shape[other] != 1:
                found[slot] = _label_constant(trace, node, slot, other)
    if others and any(set(varied(labels)) - {axis} != others for labels in found):
        for tensor in node.inputs:
            trace.freeze(tensor, node, "some of its parts have channels where others have none")
        return
    along = any(axis in varied(labels) for labels in found)
    if along and others:
        for tensor in node.inputs:
            trace.freeze(tensor, node, "its parts have channels on several axes")
        return
    live = [t for t, labels in zip(node.inputs, found, strict=True) if labels is not None and not is_constant(t)]
    rests = {trace.rest(t) for t in live}
    rest = rests.pop() if len(rests) == 1 else WILD if WILD in rests else UNKNOWN
    if not along:
        first = found[0]
        assert first is not None
        for labels in found[1:]:
            assert labels is not None
            trace.space.unite(first, labels)
        trace.set(node.outputs[0], first, rest)
        return
    parts = []
    for tensor, labels in zip(node.inputs, found, strict=True):
        size = tensor.shape[axis]
        if not isinstance(size, (int, np.integer)):
            for other in node.inputs:
                trace.freeze(other, node, f"the size of its part {tensor.name!r} is not known")
            return
        if labels is None:
            fresh = trace.space.new(int(size))
            trace.space.freeze(fresh, f"Concat {node.name!r}: {tensor.name!r} keeps its channels")
            labels = on_axis(fresh, axis, rank)
        parts.append(labels)
    # A part that stays holds any numbers, but nothing of it is ever removed.
    trace.set(node.outputs[0], np.concatenate(parts, axis), rest)


def is_table(tensor: Tensor) -> bool:
    """Whether a tensor holds constant real numbers, as a class token does."""
    dtype = numpy_dtype(tensor)
    return is_constant(tensor) and dtype is not None and dtype.kind == "f"


def _label_constant(trace: Trace, node: Node, slot: int, axis: int) -> np.ndarray:
    """New labels along one axis of a constant, whose numbers make the channels: zero where they are removed."""
    shape = node.inputs[slot].shape
    labels = trace.new(int(shape[axis]), axis, len(shape))
    trace.bind(node, slot, axis, Line(labels, axis), "weight")
    return labels


def split(trace: Trace, node: Node) -> None:
    """Split: each output gets its labels; the sizes are mended."""
    x = node.inputs[0]
    labels = trace.of(x)
    if labels is None:
        return
    axis = int(node.attrs.get("axis", 0)) % len(x.shape)
    if axis not in varied(labels):
        for output in node.outputs:
            trace.set(output, labels, trace.rest(x))
        return
    if any(known(o) is None and not isinstance(o.shape[axis], (int, np.integer)) for o in node.outputs):
        trace.freeze(x, node, "its sizes are not known")
        return
    sizes = [int(o.shape[axis]) for o in node.outputs]
    edges = np.cumsum([0, *sizes])
    parts = [labels.take(range(a, b), axis) for a, b in itertools.pairwise(edges.tolist())]
    for output, part in zip(node.outputs, parts, strict=True):
        _keep_single(trace, node, x, axis, part)
        trace.set(output, part, trace.rest(x))

    def act(graph: Graph, keeping: Keeping) -> None:
        new = [keeping.count(Line(part, axis)) for part in parts]
        if graph.opset < 13:
            node.attrs["split"] = new
        else:
            node.attrs.pop("num_outputs", None)
            given = graph.new_constant(f"{x.name}_split", np.array(new, np.int64))
            node.inputs = [x, given]
        graph.touch(node)

    trace.repair(node, labels, act)


def _keep_single(trace: Trace, node: Node, x: Tensor, axis: int, part: np.ndarray) -> None:
    """Where one channel alone is taken, it stays: nothing would be left of the tensor."""
    if part.shape[axis] != 1:
        return
    labels = trace.of(x)
    if labels is not None and len(varied(labels)) > 1:
        trace.freeze_axis(x, axis, node, "takes one of them alone")
    else:
        trace.space.freeze(part, f"{node.op} {name_of(node)!r}: takes one of them alone")


def slice_(trace: Trace, node: Node) -> None:
    """Slice: starts and ends on an axis with channels are moved; steps other than 1 are not followed there."""
    x = node.inputs[0]
    labels = trace.of(x)
    if labels is None:
        return
    rank = len(x.shape)
    given = slice_numbers(node, rank)
    if given is None:
        trace.freeze(x, node, "its limits are not constants")
        return
    starts, ends, axes, steps = given
    found = labels
    moved: dict[int, tuple[int, int, Line]] = {}
    for index, axis in enumerate(axes):
        if axis not in varied(labels):
            continue
        size = labels.shape[axis]
        if steps[index] != 1:
            trace.freeze(x, node, f"it takes each {steps[index]}th channel")
            return
        begin, end, _ = slice(starts[index], ends[index]).indices(size)
        found = found.take(range(begin, max(begin, end)), axis)
        _keep_single(trace, node, x, axis, found)
        moved[index] = (begin, max(begin, end), Line(labels, axis))
    if 0 in found.shape:
        trace.freeze(x, node, "it takes nothing")
        return
    trace.set(node.outputs[0], found, trace.rest(x))
    if not moved:
        return

    def act(graph: Graph, keeping: Keeping) -> None:
        new_starts, new_ends = list(starts), list(ends)
        for index, (begin, end, line) in moved.items():
            mask = keeping.mask(line)
            new_starts[index] = int(mask[:begin].sum())
            new_ends[index] = int(mask[:end].sum())
        if graph.opset < 10:
            node.attrs["starts"], node.attrs["ends"] = new_starts, new_ends
            graph.touch(node)
        else:
            new_input(graph, node, 1, np.array(new_starts))
            new_input(graph, node, 2, np.array(new_ends))

    trace.repair(node, labels, act)


def gather(trace: Trace, node: Node) -> None:
    """Gather by constant indices."""
    if gather_table(trace, node):
        return
    x, picks = node.inputs
    labels = trace.of(x)
    if labels is None:
        trace.freeze(picks, node, "reads them as indices")
        return
    axis = int(node.attrs.get("axis", 0)) % len(x.shape)
    indices = constant_value(picks)
    rank = len(picks.shape)
    if axis not in varied(labels):
        if indices is None:
            trace.freeze(picks, node, "reads them as indices")
        moved = np.moveaxis(labels, axis, -1)[..., 0]
        trace.set(node.outputs[0], np.expand_dims(moved, tuple(range(axis, axis + rank))), trace.rest(x))
        return
    if indices is None or rank > 1:
        trace.freeze(x, node, "which channels it takes is not known")
        return
    taken = labels.take(np.atleast_1d(indices) % labels.shape[axis], axis)
    _keep_single(trace, node, x, axis, taken)
    trace.set(node.outputs[0], taken if rank else taken.squeeze(axis), trace.rest(x))
    if rank == 0:
        return
    line = Line(labels, axis)

    def act(graph: Graph, keeping: Keeping) -> None:
        mask = keeping.mask(line)
        place = np.cumsum(mask) - 1
        wanted = indices % line.size
        new_input(graph, node, 1, place[wanted[mask[wanted]]])

    trace.repair(node, labels, act)


def expand(trace: Trace, node: Node) -> None:
    """Expand."""
    x, y = node.inputs[0], node.outputs[0]
    labels, rest = trace.of(x), trace.rest(x)
    if labels is None:
        wide = [axis for axis, size in enumerate(x.shape) if size != 1]
        if len(wide) != 1 or not is_table(x) or sum(size != 1 for size in y.shape) < 2:
            return
        labels, rest = _label_constant(trace, node, 0, wide[0]), 0.0
    found = padded(labels, len(y.shape))
    trace.set(y, found, rest)
    shape = node.inputs[1].shape
    given = None if shape is None or not isinstance(shape[0], (int, np.integer)) else int(shape[0])
    if given is None:
        trace.freeze(node.inputs[0], node, "how many sizes it is given is not known")
        return
    ahead = len(y.shape) - given
    at = {line.axis - ahead: line for line in lines(found) if line.axis >= ahead}
    if at:
        mend_sizes(trace, node, 1, sizes_of(y)[ahead:], at)


def tile(trace: Trace, node: Node) -> None:
    """Tile by constant repeats."""
    labels, repeats = trace.of(node.inputs[0]), constant_input(node, 1)
    if labels is None:
        return
    if repeats is None:
        trace.freeze(node.inputs[0], node, "its repeats are not constant")
        return
    wanted = [n if labels.shape[axis] != 1 else 1 for axis, n in enumerate(ints(repeats))]
    trace.set(node.outputs[0], np.tile(labels, wanted), trace.rest(node.inputs[0]))
