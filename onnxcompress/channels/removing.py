"""Channels taken out of a graph, or made zero in it; both give the same outputs.

``remove_channels`` cuts the channels out of all weights and mends what says how many there are. ``zero_channels``
leaves all shapes and sets to zero what makes the channels: rows of weights, biases, constants that are added, and the
scale and bias of normalizations. The removed channels are then exactly 0 wherever something mixes channels, so the two
models compute the same, apart from the order in which onnxruntime sums.
"""

from __future__ import annotations

import functools

import numpy as np
from onnx import ModelProto

from onnxcompress.channels.groups import Channels, Removed, find_channels
from onnxcompress.channels.trace import MAKERS, ZEROED, Binding
from onnxcompress.graph import Constant, Graph, Tensor, constant_value, is_op, optional_input
from onnxcompress.model_io import load, to_proto
from onnxcompress.shapes import infer_shapes


def remove_channels(channels: Channels, removed: Removed) -> None:
    """Take channels out of the graph; ``channels`` is of no use afterwards.

    Args:
        channels: Of a graph that was not changed since.
        removed: Indices of channels by group name.

    Raises:
        ValueError: See ``Channels.removed_labels``.
    """
    keeping = channels.keeping(removed)
    graph = channels.graph
    cuts: dict[Tensor, dict[int, np.ndarray]] = {}
    for binding in channels.bindings:
        mask = keeping.mask(binding.line)
        if not mask.all():
            cuts.setdefault(binding.tensor, {})[binding.axis] = mask
    for tensor, axes in cuts.items():
        assert isinstance(tensor, Constant)
        values = tensor.values
        for axis, mask in axes.items():
            values = values.compress(mask, axis)
        _replace(channels, tensor, np.ascontiguousarray(values))
    for repair in channels.repairs:
        if keeping.changes(repair.labels):
            repair.act(graph, keeping)
    _forget_sizes(graph, {t.name for t, labels in channels.labels.items() if keeping.changes(labels)})
    graph.sort()
    for node in graph.nodes:
        for output in node.outputs:
            output.shape = None
    infer_shapes(graph)


def zero_channels(channels: Channels, removed: Removed, *, makers_alone: bool = False) -> None:
    """Set to zero what makes the channels and what reads them; no shape changes.

    Args:
        channels: Of a graph that was not changed since.
        removed: Indices of channels by group name.
        makers_alone: Leave what reads them: the graph without the channels of a group that is not approximate
            computes the same.
    """
    keeping = channels.keeping(removed)
    zeros: dict[Tensor, list[tuple[Binding, np.ndarray]]] = {}
    for binding in channels.bindings:
        mask = keeping.mask(binding.line)
        if binding.role in (MAKERS if makers_alone else ZEROED) and not mask.all():
            zeros.setdefault(binding.tensor, []).append((binding, mask))
    for tensor, found in zeros.items():
        assert isinstance(tensor, Constant)
        values = np.array(tensor.values)
        for binding, mask in found:
            zero = np.moveaxis(_zero(binding), binding.axis, 0)
            np.moveaxis(values, binding.axis, 0)[~mask] = zero[~mask]
        _replace(channels, tensor, values)
    for offset in channels.offsets:
        if keeping.changes(offset.labels):
            values = offset.node.inputs[offset.slot].values
            zeroed = np.where(keeping.removed[offset.labels], 0, values).astype(values.dtype)
            fresh = channels.graph.new_constant(offset.node.inputs[offset.slot].name, zeroed)
            offset.node.inputs = [fresh if i == offset.slot else t for i, t in enumerate(offset.node.inputs)]
            channels.graph.touch(offset.node)
    for reference in () if makers_alone else channels.references:
        if keeping.changes(reference.labels):
            reference.act(channels.graph, keeping)


def remove_and_zero(
    model: ModelProto, removed: Removed, *, makers_alone: bool = False
) -> tuple[ModelProto, ModelProto]:
    """Both ways on copies of a model: channels taken out, and channels made zero."""
    made = []
    for act in (remove_channels, functools.partial(zero_channels, makers_alone=makers_alone)):
        copy = ModelProto()
        copy.CopyFrom(model)
        graph = load(copy)
        infer_shapes(graph)
        act(find_channels(graph), removed)
        made.append(to_proto(graph))
    return made[0], made[1]


def _zero(binding: Binding) -> np.ndarray:
    """What stands for 0 in a constant, in its shape: the zero point where it is dequantized."""
    tensor, node = binding.tensor, binding.node
    point = constant_value(optional_input(node, 2)) if is_op(node, "DequantizeLinear") and binding.slot == 0 else None
    if point is None:
        return np.broadcast_to(np.zeros(1, tensor.dtype), tensor.shape)
    if point.size > 1:
        shape = [1] * len(tensor.shape)
        shape[int(node.attrs.get("axis", 1)) % len(shape)] = point.size
        point = point.reshape(shape)
    return np.broadcast_to(point, tensor.shape)


def _replace(channels: Channels, tensor: Constant, values: np.ndarray) -> None:
    """A constant of the same name with other values, in every place of the old one."""
    fresh = Constant(tensor.name, values, home=tensor.home)
    for node in list(dict.fromkeys(tensor.outputs)):
        node.inputs = [fresh if t is tensor else t for t in node.inputs]
        channels.graph.touch(node)


def _forget_sizes(graph: Graph, names: set[str]) -> None:
    """Drop what the file said about the shapes of tensors that have fewer channels now."""
    if graph.carrier is None:
        return
    kept = [value for value in graph.carrier.value_info if value.name not in names]
    if len(kept) != len(graph.carrier.value_info):
        del graph.carrier.value_info[:]
        graph.carrier.value_info.extend(kept)
