"""Operators that make channels of channels: convolutions, matrix products, tables.

A convolution with groups keeps as many channels in each group. Where groups are small (depthwise, ResNeXt) whole groups
go, with their inputs and outputs; where they are large, the same positions of all groups.
"""

from __future__ import annotations

import numpy as np

from onnxcompress.channels.labels import Line, lines, varied
from onnxcompress.channels.trace import UNKNOWN, WILD, Keeping, Role, Trace, blurred
from onnxcompress.graph import Graph, Node, Tensor, is_constant, optional_input


def conv(trace: Trace, node: Node) -> None:
    """Conv: weight (O, I / group, kernel...)."""
    _convolution(trace, node, transposed=False)


def conv_transpose(trace: Trace, node: Node) -> None:
    """ConvTranspose: weight (I, O / group, kernel...)."""
    _convolution(trace, node, transposed=True)


def _convolution(trace: Trace, node: Node, *, transposed: bool) -> None:
    x, weight = node.inputs[0], node.inputs[1]
    bias = optional_input(node, 2)
    if not trace.is_weight(weight) or not (bias is None or trace.is_weight(bias)):
        trace.freeze(x, node, f"its weight is not a constant ({weight.name!r} is computed)")
        trace.freeze(weight, node, "reads it as a weight")
        trace.freeze(bias, node, "reads it as a bias")
        return
    group = int(node.attrs.get("group", 1))
    shape = weight.shape
    outputs = int(shape[1]) * group if transposed else int(shape[0])
    inputs = int(shape[0]) if transposed else int(shape[1]) * group
    rank = len(shape)
    made = trace.new(outputs, 1, rank)
    line = trace.channel_line(x, 1)
    if trace.of(x) is not None and (line is None or line.size != inputs):
        trace.freeze(x, node, "its channels are not on axis 1 alone")
        line = None
    if bias is not None:
        trace.bind(node, 2, 0, Line(made, 1), "bias")
    out = Line(made, 1)
    if group == 1:
        _plain(trace, node, line, out, (0, 1) if transposed else (1, 0))
    elif group > min(inputs, outputs) // group:
        _whole_groups(trace, node, line, out, group, transposed)
    else:
        _positions(trace, node, line, out, group, transposed)
    trace.set(node.outputs[0], made, 0.0)


def _plain(trace: Trace, node: Node, line: Line | None, out: Line, axes: tuple[int, int]) -> None:
    if line is not None:
        trace.bind(node, 1, axes[0], line, "input")
        trace.ignore(node.inputs[0], 1, node)
    trace.bind(node, 1, axes[1], out, "weight")
    trace.work(node, out.labels, None if line is None else line.labels)


def _whole_groups(trace: Trace, node: Node, line: Line | None, out: Line, group: int, transposed: bool) -> None:
    per_output = out.labels.reshape(group, -1)
    trace.space.unite(per_output, per_output[:, :1])
    if line is None:
        trace.space.freeze(out.labels, f"{node.op} {node.name!r}: each of its groups reads channels that stay")
    else:
        trace.space.unite(line.labels.reshape(group, -1), per_output[:, :1])
    first = line if transposed else out
    if first is not None:
        trace.bind(node, 1, 0, first, "weight")
    trace.work(node, out.labels)

    def act(graph: Graph, keeping: Keeping) -> None:
        node.attrs["group"] = keeping.count(out) * group // out.size
        graph.touch(node)

    trace.repair(node, out.labels, act)


def _positions(trace: Trace, node: Node, line: Line | None, out: Line, group: int, transposed: bool) -> None:
    """The same positions go from every group, on each side for itself."""
    sides: list[tuple[Line, Role]] = [(out, "weight")]
    if line is not None:
        sides.append((line, "input"))
        trace.ignore(node.inputs[0], 1, node)
    for side, role in sides:
        by_group = side.labels.reshape(group, -1)
        trace.space.unite(by_group, by_group[:1])
        is_first = (role == "weight") != transposed
        within = Line(by_group[0], 0)
        trace.bind(node, 1, 0 if is_first else 1, side if is_first else within, role)
    trace.work(node, *(side.labels for side, _ in sides))


def gemm(trace: Trace, node: Node) -> None:
    """Gemm: y = A' B' + C with a constant B."""
    x, weight, bias = node.inputs[0], node.inputs[1], optional_input(node, 2)
    if not trace.is_weight(weight) or not (bias is None or trace.is_weight(bias)):
        for tensor in node.inputs:
            trace.freeze(tensor, node, "its weight or bias is not a constant")
        return
    inner = 0 if node.attrs.get("transA", 0) else 1
    axes = (1, 0) if node.attrs.get("transB", 0) else (0, 1)
    out_size = int(weight.shape[axes[1]])
    line = _contracted(trace, node, x, inner)
    passing = _passing(trace, node, x, inner)
    if passing is not None:  # rows of A go; C may have rows of its own, so that is left alone
        trace.freeze(x, node, "its rows have channels")
        return
    made = trace.new(out_size, 1, 2)
    out = Line(made, 1)
    if line is not None:
        trace.bind(node, 1, axes[0], line, "input")
    trace.bind(node, 1, axes[1], out, "weight")
    trace.work(node, made, None if line is None else line.labels)
    if bias is not None and (not bias.shape or bias.shape[-1] == 1) and out_size > 1:
        trace.space.freeze(made, f"Gemm {node.name!r}: one bias serves all outputs")
    elif bias is not None:
        trace.bind_constant(node, 2, made, 2, "bias")
    trace.set(node.outputs[0], made, 0.0)


def _contracted(trace: Trace, node: Node, x: Tensor, axis: int) -> Line | None:
    """The channels that a matrix product sums over; frozen unless they are 0 once removed."""
    line = trace.channel_line(x, axis)
    if line is not None:
        trace.ignore(x, axis, node)
    elif trace.of(x) is not None:
        trace.freeze_axis(x, axis, node, "sums over one axis of several that have channels")
    return line


def _passing(trace: Trace, node: Node, x: Tensor, axis: int) -> np.ndarray | None:
    """Labels on axes that are not summed over."""
    labels = trace.of(x)
    if labels is None or not set(varied(labels)) - {axis}:
        return None
    return labels


def matmul(trace: Trace, node: Node) -> None:
    """MatMul with a constant on either side, or with none, as in attention."""
    a, b = node.inputs
    if trace.is_weight(a) == trace.is_weight(b):
        if not trace.is_weight(a):
            _product(trace, node)
        return
    weight_slot = 1 if trace.is_weight(b) else 0
    x, weight = node.inputs[1 - weight_slot], node.inputs[weight_slot]
    rank_x, rank_w = len(x.shape), len(weight.shape)
    rank = len(node.outputs[0].shape)
    if rank_x < 2 or rank_w < 2 or any(size != 1 for size in weight.shape[:-2]) or rank != rank_x:
        trace.freeze(x, node, f"its weight has the shape {list(weight.shape)}, not that of one matrix")
        return
    inner = rank_x - 1 if weight_slot == 1 else rank_x - 2
    summed, made_axis = (-2, -1) if weight_slot == 1 else (-1, -2)
    line = _contracted(trace, node, x, inner)
    passing = _passing(trace, node, x, inner)
    if passing is not None:
        if inner in varied(passing):
            trace.freeze(x, node, "sums over one axis of several that have channels")
            return
        trace.set(node.outputs[0], passing, 0.0 if trace.rest(x) == 0 else blurred(trace.rest(x)))
        trace.work(node, passing)
        return
    made = trace.new(int(weight.shape[made_axis]), inner, rank)
    if line is not None:
        trace.bind(node, weight_slot, summed, line, "input")
    trace.bind(node, weight_slot, made_axis, Line(made, inner), "weight")
    trace.work(node, made, None if line is None else line.labels)
    trace.set(node.outputs[0], made, 0.0)


def _product(trace: Trace, node: Node) -> None:
    """MatMul of two tensors: (..., M, K) by (..., K, N)."""
    a, b = node.inputs
    rank = len(node.outputs[0].shape)
    if len(a.shape) != rank or len(b.shape) != rank:
        for tensor in node.inputs:
            trace.freeze(tensor, node, "multiplies tensors with different numbers of axes")
        return
    left, right = trace.of(a), trace.of(b)
    if left is None and right is None:
        return
    left_axes, right_axes = varied(left), varied(right)
    rows, columns = rank - 2 in left_axes, rank - 1 in right_axes
    if (rows and columns) or (rank - 1 in left_axes and rows) or (rank - 2 in right_axes and columns):
        for tensor in node.inputs:
            trace.freeze(tensor, node, "multiplies tensors that both have channels on a matrix axis")
        return
    _unite_summed(trace, node, a, b)
    batch = [axis for axis in range(rank - 2) if axis in left_axes or axis in right_axes]
    for axis in batch:
        _match_batch(trace, node, a, b, axis)
    found = left if rows else right if columns else None
    if found is None:
        by_axis = {line.axis: line for line in [*lines(right), *lines(left)]}
        found = trace.joint([by_axis[axis] for axis in batch], batch, rank)
    elif found is not None:
        keep = set(batch) | ({rank - 2} if rows else {rank - 1})
        found = found if set(varied(found)) <= keep else None
    if found is not None:
        rests = (trace.rest(a) if left is not None else UNKNOWN, trace.rest(b) if right is not None else UNKNOWN)
        rest = WILD if WILD in rests else 0.0 if 0 in rests else UNKNOWN
        trace.set(node.outputs[0], found, rest)
    inner = left if left is not None and rank - 1 in left_axes else None
    trace.work(node, *([inner] if inner is not None else []), *([found] if found is not None and inner is None else []))


def _unite_summed(trace: Trace, node: Node, a: Tensor, b: Tensor) -> None:
    left, right = trace.of(a), trace.of(b)
    rank = len(node.outputs[0].shape)
    has_left, has_right = rank - 1 in varied(left), rank - 2 in varied(right)
    if has_left and has_right:
        assert left is not None and right is not None
        turned = np.swapaxes(right, -1, -2)
        trace.contracted.append(Line(left, rank - 1))
        if varied(turned) == varied(left) and turned.shape == left.shape:
            trace.space.unite(left, turned)
        else:
            trace.space.link(Line(left, rank - 1), Line(right, rank - 2))
        if WILD in (trace.rest(a), trace.rest(b)):
            trace.freeze_axis(a, rank - 1, node, "a removed channel might be no finite number there")
        elif trace.rest(a) != 0 and trace.rest(b) != 0:
            trace.mask(node, 0, rank - 1)
    elif has_left:
        trace.freeze_axis(a, rank - 1, node, "sums over channels that the other operand keeps")
    elif has_right:
        trace.freeze_axis(b, rank - 2, node, "sums over channels that the other operand keeps")


def _match_batch(trace: Trace, node: Node, a: Tensor, b: Tensor, axis: int) -> None:
    left, right = trace.of(a), trace.of(b)
    in_left, in_right = axis in varied(left), axis in varied(right)
    if in_left and in_right:
        assert left is not None and right is not None
        trace.space.link(Line(left, axis), Line(right, axis))
        return
    mine, other = (a, b) if in_left else (b, a)
    if other.shape[axis] != 1:
        trace.freeze_axis(mine, axis, node, "the other operand keeps what it has there")


def gather_table(trace: Trace, node: Node) -> bool:
    """A Gather that picks rows of a constant table: its columns are channels. False where it is another one."""
    table, indices = node.inputs
    if not is_constant(table) or is_constant(indices) or len(table.shape) != 2 or int(node.attrs.get("axis", 0)) != 0:
        return False
    rank = len(node.outputs[0].shape)
    made = trace.new(int(table.shape[1]), rank - 1, rank)
    trace.bind(node, 0, 1, Line(made, rank - 1), "weight")
    trace.set(node.outputs[0], made, 0.0)
    return True
