"""Operators that work on each element, and those that mix channels but not places."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnxcompress.graph import Constant, Node, Tensor, is_constant, optional_input
from onnxcompress.resolution.axes import Axes, Axis, axis_of
from onnxcompress.resolution.tables import interpolated, why_no_table
from onnxcompress.resolution.walk import Walk


def same(walk: Walk, node: Node) -> None:
    """What comes out has the shape of the first input; other inputs are parameters of channels."""
    for output in node.outputs:
        if not output.is_empty():
            walk.set(output, walk.of(node.inputs[0]))


def batch_normalization(walk: Walk, node: Node) -> None:
    """BatchNormalization, InstanceNormalization, GroupNormalization: parameters for each channel."""
    x = walk.of(node.inputs[0])
    if len(x) > 1 and x[1].changed:
        raise walk.refuse(node, f"would have {x[1].new} channels for {x[1].old}")
    if len(node.outputs) > 1:
        raise walk.refuse(node, "is in training mode")
    walk.set(node.outputs[0], x)


def layer_normalization(walk: Walk, node: Node) -> None:
    """LayerNormalization over axes that stay."""
    x = walk.of(node.inputs[0])
    first = int(node.attrs.get("axis", -1)) % len(x)
    for axis in x[first:]:
        if axis.changed:
            raise walk.refuse(node, f"has parameters for each of {axis.old} places")
    for output in node.outputs:
        if not output.is_empty():
            walk.set(output, x if output is node.outputs[0] else (*x[:first], *(axis_of(1) for _ in x[first:])))


def several(walk: Walk, node: Node) -> None:
    """Several operands with broadcasting; a table of positions that is added is interpolated."""
    operands = [tensor for tensor in node.inputs if not tensor.is_empty()]
    walk.set(node.outputs[0], broadcast(walk, node, operands))


def broadcast(walk: Walk, node: Node, operands: Sequence[Tensor]) -> Axes:
    """The axes of operands that meet; constants among them are mended, and what cannot meet any more is refused."""
    rank = max(len(walk.of(tensor)) for tensor in operands)
    found: list[Axis] = [axis_of(1)] * rank
    for tensor in sorted(operands, key=is_constant):
        own = _padded(walk.of(tensor), rank)
        if is_constant(tensor) and any(a.old > 1 and b.changed for a, b in zip(own, found, strict=True)):
            own = _interpolate(walk, node, tensor, own, found)
        found = [_meet(walk, node, a, b) for a, b in zip(found, own, strict=True)]
    return tuple(found)


def _padded(axes: Axes, rank: int) -> Axes:
    return (*(axis_of(1) for _ in range(rank - len(axes))), *axes)


def _meet(walk: Walk, node: Node, a: Axis, b: Axis) -> Axis:
    if a.old == 1 or b.old == 1:
        found = b if a.old == 1 else a
        return found
    if a.new != b.new:
        raise walk.refuse(node, f"joins what would be {a.new} and {b.new} long, and was {a.old}")
    ranked = sorted((a, b), key=lambda axis: (axis.is_free, axis.changed, bool(axis.side), len(axis.pieces)))
    return ranked[-1]


def _interpolate(walk: Walk, node: Node, tensor: Tensor, own: Axes, found: Sequence[Axis]) -> Axes:
    """Bring a constant that is added to every place to the new places; gives its axes."""
    axes = tuple(b if a.old > 1 and b.changed else a for a, b in zip(own, found, strict=True))
    sizes = "x".join(str(a.old) for a in own)
    reason = why_no_table(axes) if node.op in ("Add", "Sum") else "is not added, so it is no table of positions"
    if reason is None and np.dtype(tensor.dtype).kind != "f":
        reason = "does not hold real numbers"
    if reason is not None:
        raise walk.refuse(node, f"reads a constant of {sizes}, tied to the size, that {reason}")
    assert isinstance(tensor, Constant)
    slot = next(i for i, t in enumerate(node.inputs) if t is tensor)
    rank = len(tensor.shape)
    values = interpolated(tensor.values, axes[len(axes) - rank :])
    what = f"positions {tensor.name!r} of {sizes} interpolated to {'x'.join(str(axis.new) for axis in axes)}"
    walk.new_input(node, slot, values, what)
    return axes


def gemm(walk: Walk, node: Node) -> None:
    """Gemm: what is summed over cannot change."""
    a, b = walk.of(node.inputs[0]), walk.of(node.inputs[1])
    left, right = (a[::-1] if node.attrs.get("transA", 0) else a), (b[::-1] if node.attrs.get("transB", 0) else b)
    _want_summed(walk, node, left[1], right[0], is_constant(node.inputs[1]))
    made = (left[0], right[1])
    bias = optional_input(node, 2)
    if bias is not None:
        for own, axis in zip(_padded(walk.of(bias), 2), made, strict=True):
            if own.old > 1 and own.new != axis.new:
                raise walk.refuse(node, f"adds {own.new} biases to {axis.new} outputs")
    walk.set(node.outputs[0], made)


def _want_summed(walk: Walk, node: Node, a: Axis, b: Axis, is_weight: bool) -> None:
    if a.new == b.new:
        return
    if is_weight:
        parts = " x ".join(str(factor.old) for piece in a.pieces for factor in piece if factor.old > 1)
        what = f"flattens {parts} = {a.old}" if len(a.pieces[0]) > 1 else f"sums over {a.old} places"
        raise walk.refuse(node, f"{what}, and has a weight for each of them; {a.new} would be left")
    raise walk.refuse(node, f"multiplies {a.new} by {b.new} elements, which were {a.old}")


def matmul(walk: Walk, node: Node) -> None:
    """MatMul, with a weight or of two tensors."""
    a, b = walk.of(node.inputs[0]), walk.of(node.inputs[1])
    left = a if len(a) > 1 else (axis_of(1), *a)
    right = b if len(b) > 1 else (*b, axis_of(1))
    weight = is_constant(node.inputs[0]) or is_constant(node.inputs[1])
    changing = left[-1] if left[-1].changed else right[-2]
    other = right[-2] if left[-1].changed else left[-1]
    _want_summed(walk, node, changing, other, weight)
    rank = max(len(left), len(right))
    ahead = [
        _meet(walk, node, m, n)
        for m, n in zip(_padded(left[:-2], rank - 2), _padded(right[:-2], rank - 2), strict=True)
    ]
    made = [*ahead, *([left[-2]] if len(a) > 1 else []), *([right[-1]] if len(b) > 1 else [])]
    walk.set(node.outputs[0], tuple(made))


def per_axis(walk: Walk, node: Node) -> None:
    """QuantizeLinear, DequantizeLinear: scales for each index of an axis that stays."""
    x = walk.of(node.inputs[0])
    for tensor in node.inputs[1:]:
        if not tensor.is_empty() and math.prod(axis.old for axis in walk.of(tensor)) > 1:
            axis = x[int(node.attrs.get("axis", 1)) % len(x)]
            if axis.changed or node.attrs.get("block_size", 0):
                raise walk.refuse(node, f"has a scale for each of {axis.old} places")
    walk.set(node.outputs[0], x)
    for output in node.outputs[1:]:  # DynamicQuantizeLinear tells its scale and zero point
        walk.set(output, ())
