"""Operators that move elements, or work along axes: Reshape, Concat, Split, pools, reductions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from onnxcompress.channels.labels import Line, lines, on_axis, padded, reshaped, varied
from onnxcompress.channels.linear_rules import gather_table
from onnxcompress.channels.trace import (
    UNKNOWN,
    WILD,
    Keeping,
    Trace,
    blurred,
    constant_input,
    ints,
    known,
    name_of,
    sizes_of,
)
from onnxcompress.graph import Graph, Node, Tensor, constant_value, is_constant, is_op, numpy_dtype, optional_input

INT_MAX = np.iinfo(np.int64).max


def _new_input(graph: Graph, node: Node, slot: int, values: np.ndarray) -> None:
    """Give a node a constant of its own; others may share the one that was there."""
    old = node.inputs[slot]
    fresh = graph.new_constant(old.name, values.astype(old.dtype))
    node.inputs = [fresh if i == slot else tensor for i, tensor in enumerate(node.inputs)]
    graph.touch(node)


def _mend_sizes(trace: Trace, node: Node, slot: int, shape: Sequence[int | str | None], at: Mapping[int, Line]) -> None:
    """Keep an input that holds sizes right: ``at`` gives the element where the size of each line stands."""
    labels = np.concatenate([line.labels.reshape(-1) for line in at.values()])

    def act(graph: Graph, keeping: Keeping) -> None:
        tensor = node.inputs[slot]
        values = constant_value(tensor)
        if values is not None:
            new = values.copy()
            for index, line in at.items():
                if new[index] == line.size:
                    new[index] = keeping.count(line)
            _new_input(graph, node, slot, new)
            return
        sizes = {i: size for i, size in enumerate(shape) if isinstance(size, int)}
        sizes |= {index: keeping.count(line) for index, line in at.items()}
        copied = {i: 0 for i in range(len(shape)) if i not in sizes and _is_copied(node, shape, i)}
        if len(sizes) + len(copied) == len(shape):
            _new_input(graph, node, slot, np.array([value for _, value in sorted((sizes | copied).items())]))
            return
        # Computed from other shapes: what is known is put in its place, the rest stays computed.
        mask = np.array([i in sizes for i in range(len(shape))])
        wanted = np.array([sizes.get(i, 0) for i in range(len(shape))], np.int64)
        inputs = [graph.new_constant(f"{tensor.name}_known", mask), graph.new_constant(f"{tensor.name}_sizes", wanted)]
        where = graph.insert("Where", [*inputs, tensor], before=node)
        where.outputs[0].dtype, where.outputs[0].shape = np.dtype(np.int64), [len(shape)]
        node.inputs = [where.outputs[0] if i == slot else t for i, t in enumerate(node.inputs)]
        graph.touch(node)

    trace.repair(node, labels, act)


def _is_copied(node: Node, shape: Sequence[int | str | None], axis: int) -> bool:
    """Whether a 0 in the target of a Reshape gives this size."""
    source = node.inputs[0].shape
    if not is_op(node, "Reshape") or node.attrs.get("allowzero", 0) or axis >= len(source):
        return False
    return isinstance(shape[axis], str) and source[axis] == shape[axis]


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
        _mend_sizes(trace, node, 1, sizes_of(y), {line.axis: line for line in lines(found)})


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
    axes = _axes(node, 1)
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


def _axes(node: Node, slot: int) -> list[int] | None:
    """Axes from the attribute or a constant input; None when there are none or they are not known."""
    given = node.attrs.get("axes")
    if given is None:
        given = constant_input(node, slot)
    return None if given is None else ints(given)


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
    given = _slice_numbers(node, rank)
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
            _new_input(graph, node, 1, np.array(new_starts))
            _new_input(graph, node, 2, np.array(new_ends))

    trace.repair(node, labels, act)


def _slice_numbers(node: Node, rank: int) -> tuple[list[int], list[int], list[int], list[int]] | None:
    if "starts" in node.attrs:
        starts, ends = list(node.attrs["starts"]), list(node.attrs["ends"])
        axes, steps = list(node.attrs.get("axes") or range(len(starts))), [1] * len(starts)
    else:
        found = [constant_input(node, slot) for slot in range(1, 5)]
        if found[0] is None or found[1] is None:
            return None
        if any(found[s - 1] is None and optional_input(node, s) is not None for s in (3, 4)):
            return None
        starts, ends = ints(found[0]), ints(found[1])
        axes = list(range(len(starts))) if found[2] is None else ints(found[2])
        steps = [1] * len(starts) if found[3] is None else ints(found[3])
    return starts, ends, [axis % rank for axis in axes], steps


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
        _new_input(graph, node, 1, place[wanted[mask[wanted]]])

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
        _mend_sizes(trace, node, 1, sizes_of(y)[ahead:], at)


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
        _mend_sizes(trace, node, 3, sizes_of(y), {line.axis: line for line in lines(labels)})


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
    axes = _axes(node, 1)
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


SIZE_STEPS = frozenset(
    {"Cast", "Concat", "Unsqueeze", "Squeeze", "Gather", "Slice", "Identity", "Mul", "Div", "Add", "Sub"}
)
SIZE_READERS = {"Reshape": 1, "Expand": 1, "Resize": 3}


def shape(trace: Trace, node: Node) -> None:
    """Shape: sizes of axes with channels may only reach inputs that are mended."""
    x = node.inputs[0]
    labels = trace.of(x)
    if labels is None:
        return
    rank = len(x.shape)
    start, end, _ = slice(node.attrs.get("start", 0), node.attrs.get("end", INT_MAX)).indices(rank)
    touched = {axis - start for axis in varied(labels) if start <= axis < end}
    reason = _leak(trace.graph, node.outputs[0], touched) if touched else None
    if reason is not None:
        trace.freeze(x, node, reason)


def _leak(graph: Graph, tensor: Tensor, touched: set[int] | None) -> str | None:
    """Where sizes go that change, if not only to shapes that are mended; ``touched`` are their elements."""
    if graph.is_output(tensor):
        return "the number of channels is an output of the model"
    for reader in dict.fromkeys(tensor.outputs):
        slot = next(i for i, t in enumerate(reader.inputs) if t is tensor)
        if reader.graph is not graph:
            return "a nested graph reads the number of channels"
        if touched is not None and is_op(reader, "Gather", "Slice") and slot == 0:
            taken = _taken(reader, int(tensor.shape[0]) if tensor.shape else 0)
            if taken is not None and not touched & taken:
                continue
        if SIZE_READERS.get(reader.op) == slot and is_op(reader, reader.op):
            continue
        if not is_op(reader, *SIZE_STEPS) or (is_op(reader, "Gather", "Slice") and slot != 0):
            return f"{reader.op} {reader.name!r} computes with the number of channels"
        reason = _leak(graph, reader.outputs[0], None)
        if reason is not None:
            return reason
    return None


def _taken(reader: Node, count: int) -> set[int] | None:
    if is_op(reader, "Gather"):
        indices = constant_input(reader, 1)
        return None if indices is None else {int(i) % max(count, 1) for i in indices.reshape(-1)}
    given = _slice_numbers(reader, 1)
    if given is None or given[3] != [1]:
        return None
    return set(range(*slice(given[0][0], given[1][0]).indices(count)))


def size(trace: Trace, node: Node) -> None:
    """Size of a tensor whose number of channels may change."""
    trace.freeze(node.inputs[0], node, "computes with the number of channels")
