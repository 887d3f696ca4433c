"""Reductions: the axes of one, and means in the ways in which files write them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxcompress.graph import Graph, Node, Tensor, constant_value, is_op, optional_input, rank
from onnxcompress.patterns.scalar_algebra import float_dtype, is_close, scalar_beside


def reduced_axes(node: Node) -> tuple[int, ...] | None:
    """The axes that a reduction goes over, counted from the front and sorted; None when they are not known."""
    given = optional_input(node, 1)
    axes = node.attrs.get("axes", []) if given is None else constant_value(given, limit=64)
    axis_count = rank(node.inputs[0])
    if axes is None or axis_count is None:
        return None
    if len(axes) == 0:
        return None if node.attrs.get("noop_with_empty_axes", 0) else tuple(range(axis_count))
    found = {int(axis) + axis_count * (axis < 0) for axis in axes}
    return tuple(sorted(found)) if found <= set(range(axis_count)) and len(found) == len(axes) else None


def reduces_last_axis(node: Node) -> bool:
    """Whether a reduction goes over the last axis alone and keeps it; the rank need not be known for axis -1."""
    given = optional_input(node, 1)
    axes = node.attrs.get("axes", []) if given is None else constant_value(given, limit=64)
    if axes is None or len(axes) != 1 or not node.attrs.get("keepdims", 1):
        return False
    axis_count = rank(node.inputs[0])
    return int(axes[0]) == -1 or (axis_count is not None and int(axes[0]) == axis_count - 1)


@dataclass(frozen=True)
class Mean:
    """A mean over axes of ``source``, which are kept with size 1."""

    source: Tensor
    axes: tuple[int, ...]
    nodes: tuple[Node, ...]


def read_mean(graph: Graph, tensor: Tensor) -> Mean | None:
    """``tensor`` as a mean: ReduceMean, ReduceSum times 1 / n, GlobalAveragePool; None when it is none.

    Axes that were dropped may have been put back by Reshape or Unsqueeze.
    """
    nodes: list[Node] = []
    reduced = tensor
    node = graph.producer(tensor)
    if node is not None and is_op(node, "Reshape", "Unsqueeze"):
        nodes.append(node)
        reduced = node.inputs[0]
    found = _mean(graph, reduced)
    if found is None:
        return None
    mean, keeps_axes = found
    if not keeps_axes or nodes:
        kept = [1 if i in mean.axes else dim for i, dim in enumerate(mean.source.shape)]
        if not _is_reshaped_to(tensor, kept):
            return None
    return Mean(mean.source, mean.axes, (*nodes, *mean.nodes))


def _is_reshaped_to(tensor: Tensor, wanted: Sequence[int | str | None]) -> bool:
    """Whether a tensor with as many elements as ``wanted`` has that shape: one size follows from the others."""
    if tensor.shape is None or len(tensor.shape) != len(wanted):
        return False
    different = [i for i, size in enumerate(wanted) if size is None or size != tensor.shape[i]]
    others = [size for i, size in enumerate(wanted) if i not in different]
    return not different or (len(different) == 1 and all(isinstance(n, (int, np.integer)) and n > 0 for n in others))


def _mean(graph: Graph, tensor: Tensor) -> tuple[Mean, bool] | None:
    """A mean, and whether its axes are kept."""
    node = graph.producer(tensor)
    if node is None:
        return None
    if is_op(node, "GlobalAveragePool"):
        axis_count = rank(node.inputs[0])
        return None if axis_count is None else (Mean(node.inputs[0], tuple(range(2, axis_count)), (node,)), True)
    nodes: tuple[Node, ...] = (node,)
    factor = None
    if is_op(node, "Mul", "Div"):
        constants = [(t, scalar_beside(other, t)) for t, other in (node.inputs, node.inputs[::-1])]
        live, value = next(((t, v) for t, v in constants if v), (None, None))
        if live is None or value is None or (node.op == "Div" and live is not node.inputs[0]):
            return None
        factor = value if node.op == "Mul" else 1 / value
        inner = graph.producer(live)
        if inner is None or not is_op(inner, "ReduceSum"):
            return None
        node, nodes = inner, (node, inner)
    elif not is_op(node, "ReduceMean"):
        return None
    axes = reduced_axes(node)
    if axes is None:
        return None
    if factor is not None:
        sizes, dtype = sizes_along(node.inputs[0], axes), float_dtype(node.inputs[0])
        if sizes is None or dtype is None or not is_close(factor, 1 / math.prod(sizes), dtype):
            return None
    return Mean(node.inputs[0], axes, nodes), bool(node.attrs.get("keepdims", 1))


def sizes_along(tensor: Tensor, axes: Sequence[int]) -> tuple[int, ...] | None:
    """Sizes of these axes when each is a known number above 0."""
    if tensor.shape is None:
        return None
    sizes = [tensor.shape[axis] for axis in axes]
    return tuple(map(int, sizes)) if all(isinstance(n, (int, np.integer)) and n > 0 for n in sizes) else None
