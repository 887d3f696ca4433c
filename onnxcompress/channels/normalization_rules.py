"""Operators that normalize: each channel on its own, in groups, or all together."""

from __future__ import annotations

import numpy as np

from onnxcompress.channels.labels import Line, on_axis, varied
from onnxcompress.channels.trace import WILD, Keeping, Role, Trace, blurred, multiply_by_mask
from onnxcompress.graph import Graph, Node, is_constant, numpy_dtype, optional_input


def normalization(trace: Trace, node: Node) -> None:
    """BatchNormalization and InstanceNormalization: each channel on its own, 0 once scale and bias are."""
    x = node.inputs[0]
    labels = trace.of(x)
    if labels is None:
        return
    if any(not is_constant(t) for t in node.inputs[1:]):
        trace.freeze(x, node, "its parameters are not constants")
        return
    for axis in varied(labels):
        if axis != 1:  # a group normalization made of Reshape and InstanceNormalization: whole groups go
            trace.freeze_axis(x, axis, node, "averages over all channels of a group")
    if 1 not in varied(labels):
        return
    line = Line(labels, 1)
    if node.attrs.get("training_mode", 0) or len(node.outputs) > 1:
        trace.freeze(x, node, "is in training mode")
        return
    roles: tuple[Role, ...] = ("scale", "bias", "other", "other")
    for slot in range(1, len(node.inputs)):
        trace.bind(node, slot, 0, line, roles[slot - 1])
    trace.set(node.outputs[0], line.labels, 0.0)


def group_normalization(trace: Trace, node: Node) -> None:
    """GroupNormalization: whole groups go."""
    x = node.inputs[0]
    line = trace.channel_line(x, 1)
    if line is None or any(not is_constant(t) for t in node.inputs[1:3]):
        trace.freeze(x, node, "its channels are not on axis 1 alone, or its parameters are not constants")
        return
    groups = int(node.attrs["num_groups"])
    by_group = line.labels.reshape(groups, -1)
    trace.space.unite(by_group, by_group[:, :1])
    per_group = Line(on_axis(by_group[:, 0], 0, 1), 0)
    roles: tuple[Role, ...] = ("scale", "bias")
    for slot in (1, 2):
        whole = int(node.inputs[slot].shape[0]) == line.size and line.size != groups
        trace.bind(node, slot, 0, line if whole or line.size == groups else per_group, roles[slot - 1])

    def act(graph: Graph, keeping: Keeping) -> None:
        node.attrs["num_groups"] = keeping.count(per_group)
        graph.touch(node)

    trace.repair(node, line.labels, act)
    trace.set(node.outputs[0], line.labels, 0.0)


def layer_normalization(trace: Trace, node: Node) -> None:
    """LayerNormalization and RMSNormalization: over the channels that stay, as if the others held their mean.

    With K of n channels left, their mean m and variance v, n channels of which the others are m have the mean m and the
    variance v K / n. So (x - m) / sqrt(v K / n + epsilon) is a normalization of K channels, its scale times
    sqrt(n / K), its epsilon times n / K. For RMSNormalization the others are 0, which is what zeros are.
    """
    x, y = node.inputs[0], node.outputs[0]
    labels = trace.of(x)
    first = int(node.attrs.get("axis", -1)) % len(x.shape)
    if labels is None:
        return
    over = [axis for axis in varied(labels) if axis >= first]
    if not over:
        trace.set(y, labels, blurred(trace.rest(x)))
        return
    if over != list(varied(labels)) or first != len(x.shape) - 1:
        trace.freeze(x, node, "averages over channels on one axis of several")
        return
    if any(not is_constant(tensor) for tensor in node.inputs[1:]) or len(node.outputs) > 1:
        trace.freeze(x, node, "its parameters are not constants, or its mean is read")
        return
    if trace.rest(x) == WILD:
        trace.freeze(x, node, "a removed channel might be no finite number there")
        return
    line = Line(labels, first)
    for slot, role in ((1, "scale"), (2, "bias")):
        if optional_input(node, slot) is not None:
            trace.bind(node, slot, 0, line, role)  # type: ignore[arg-type]
    _normalize_the_rest(trace, node, line)
    trace.set(y, labels, 0.0)


def _normalize_the_rest(trace: Trace, node: Node, line: Line) -> None:
    is_centred = node.op == "LayerNormalization"
    if is_centred:
        trace.approximate(line, node, "takes mean and variance over the channels that stay")

    def act(graph: Graph, keeping: Keeping) -> None:
        growth = line.size / keeping.count(line)
        node.attrs["epsilon"] = float(node.attrs.get("epsilon", 1e-5)) * growth
        scale = node.inputs[1]
        grown = graph.new_constant(scale.name, (scale.values * np.sqrt(growth)).astype(scale.dtype))
        node.inputs = [grown if i == 1 else tensor for i, tensor in enumerate(node.inputs)]
        graph.touch(node)

    def refer(graph: Graph, keeping: Keeping) -> None:
        """Let removed channels hold the mean of the others."""
        kept = multiply_by_mask(graph, keeping, node, 0, line.labels)
        if not is_centred:
            return
        axes = graph.new_constant("axes", np.array([line.axis], np.int64))
        total = graph.insert("ReduceSum", [kept, axes], before=node).outputs[0]
        share = keeping.removed[line.labels] / keeping.count(line)
        places = graph.new_constant("share", share.astype(numpy_dtype(kept) or np.float32))
        holes = graph.insert("Mul", [total, places], before=node).outputs[0]
        filled = graph.insert("Add", [kept, holes], before=node).outputs[0]
        node.inputs = [filled, *node.inputs[1:]]

    trace.repair(node, line.labels, act)
    trace.refer(node, line.labels, refer)


def softmax(trace: Trace, node: Node) -> None:
    """Softmax, LogSoftmax, Hardmax: e^0 counts in the sum, so no channel of that axis can go."""
    x = node.inputs[0]
    rank = len(x.shape)
    old = trace.graph.opset < 13
    axis = int(node.attrs.get("axis", 1 if old else -1)) % rank
    axes = range(axis, rank) if old else range(axis, axis + 1)
    _whole_axes(trace, node, axes, "sums over all channels, and one that is 0 counts")
    labels = trace.of(x)
    if labels is not None and not set(axes) & set(varied(labels)):
        trace.set(node.outputs[0], labels, blurred(trace.rest(x)))


def _whole_axes(trace: Trace, node: Node, axes: range, why: str) -> None:
    labels = trace.of(node.inputs[0])
    if labels is not None and set(axes) & set(varied(labels)):
        trace.freeze(node.inputs[0], node, why)


def lp_normalization(trace: Trace, node: Node) -> None:
    """LpNormalization: a channel that is 0 adds nothing to the norm, and stays 0."""
    x = node.inputs[0]
    labels = trace.of(x)
    axis = int(node.attrs.get("axis", -1)) % len(x.shape)
    if labels is not None and axis in varied(labels):
        trace.mask(node, 0, axis)
        trace.set(node.outputs[0], labels, 0.0 if varied(labels) == (axis,) else blurred(trace.rest(x)))
    else:
        trace.set(node.outputs[0], labels, 0.0 if trace.rest(x) == 0 else blurred(trace.rest(x)))
