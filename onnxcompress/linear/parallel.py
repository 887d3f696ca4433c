"""Convolutions of one input side by side: their sum, a skip connection, their concatenation.

Along one axis the taps of a convolution read the input at s*p + (d*u - P). With equal strides and equal output sizes
the sum of two is one convolution whose taps are the union of both sets d*u - P, laid on the coarsest common lattice: a
1x1 lands in the centre of a 3x3, a 1x3 and a 3x1 make a cross. Both pad with zeros, so this is exact up to the border.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import numpy as np

from onnxcompress.linear.border import Exactness, border_class
from onnxcompress.linear.conv import ConvOp, Sizes, cast, channel_vector, compose, sizes_or_unknown, spread


def why_not_parallel(a: ConvOp, b: ConvOp, spatial: Sizes | None = None) -> str | None:
    """Why conv_a(x) + conv_b(x) is not one convolution, or None where it is.

    Args:
        a: One convolution.
        b: Another one, of the same input.
        spatial: Input size per axis; None stands for every size.
    """
    if a.out_channels != b.out_channels:
        return f"output channels differ: {a.out_channels} and {b.out_channels}"
    return _why_not_one_grid(a, b, spatial)


def add_parallel(a: ConvOp, b: ConvOp, spatial: Sizes | None = None) -> ConvOp:
    """One convolution for conv_a(x) + conv_b(x); its group is the gcd of the groups.

    Raises:
        ValueError: ``why_not_parallel`` has a reason. With ``spatial`` the result holds for that size only.
    """
    reason = why_not_parallel(a, b, spatial)
    if reason is not None:
        raise ValueError(f"two convolutions cannot be added: {reason}")
    group = math.gcd(a.group, b.group)
    lattices = [_lattice(a, b, axis) for axis in range(a.spatial_rank)]
    begins, dilations, kernel = zip(*lattices, strict=True)
    weight = np.zeros((a.out_channels, a.in_channels // group, *kernel))
    for op in (a, b):
        places = (
            spread((begin - p) // d, d_op // d, k)
            for begin, p, d, d_op, k in zip(begins, op.pads_begin, dilations, op.dilations, op.kernel, strict=True)
        )
        index: tuple[slice, ...] = (slice(None), slice(None), *places)
        weight[index] += op.regroup(group).weight
    biases = [op.bias.astype(np.float64) for op in (a, b) if op.bias is not None]
    reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    # What is added to the size before it is divided by the stride; where it differs, ``spatial`` allows either.
    surplus = [max(_surplus(a, axis), _surplus(b, axis)) for axis in range(a.spatial_rank)]
    return ConvOp(
        cast(weight, a.weight.dtype),
        cast(sum(biases[1:], biases[0]), a.weight.dtype) if biases else None,
        a.strides,
        dilations,
        begins,
        tuple(n + r - begin for n, r, begin in zip(surplus, reach, begins, strict=True)),  # at least 0: see _lattice
        group,
    )


def why_not_identity(conv: ConvOp, spatial: Sizes | None = None) -> str | None:
    """Why conv(x) + scale * x is not a convolution with this kernel, or None where it is; ``spatial`` as above."""
    if conv.in_channels != conv.out_channels:
        return f"{conv.in_channels} input and {conv.out_channels} output channels"
    for axis, size in enumerate(sizes_or_unknown(conv, spatial)):
        pad, stride, d, k = conv.pads_begin[axis], conv.strides[axis], conv.dilations[axis], conv.kernel[axis]
        if stride != 1 and size != 1:
            return f"spatial axis {axis}: stride {stride}"
        if _surplus(conv, axis) if size is None else conv.output_length(axis, size) != size:
            return f"spatial axis {axis}: the output does not have the size of the input"
        if pad % d or pad > d * (k - 1):
            return f"spatial axis {axis}: no tap reads its own position ({k} taps, dilation {d}, pad {pad})"
    return None


def add_identity(conv: ConvOp, scale: np.ndarray | float | None = None, spatial: Sizes | None = None) -> ConvOp:
    """conv(x) + scale * x as one convolution of the same kernel and group.

    Args:
        conv: Any convolution whose output lies on its input.
        scale: (C,) or a scalar; None is 1.
        spatial: Input size per axis; None stands for every size.

    Raises:
        ValueError: ``why_not_identity`` has a reason.
    """
    reason = why_not_identity(conv, spatial)
    if reason is not None:
        raise ValueError(f"a skip connection cannot enter the convolution: {reason}")
    factors = 1.0 if scale is None else scale
    channels, ones, zeros = conv.in_channels, (1,) * conv.spatial_rank, (0,) * conv.spatial_rank
    weight = channel_vector(factors, channels).reshape(channels, 1, *ones)
    # Where there is a stride, the size is 1 and the only step is never taken.
    identity = ConvOp(weight, None, conv.strides, ones, zeros, zeros, channels)
    return add_parallel(conv.astype(np.float64), identity, spatial).astype(conv.weight.dtype)


def why_not_concat(ops: Sequence[ConvOp]) -> str | None:
    """Why the channel concatenation of these convolutions of one input is not one convolution, or None where it is."""
    for op in ops[1:]:
        if op.in_channels != ops[0].in_channels:
            return f"input channels differ: {ops[0].in_channels} and {op.in_channels}"
        if op.weight.dtype != ops[0].weight.dtype:
            return f"dtypes differ: {ops[0].weight.dtype} and {op.weight.dtype}"
        if _geometry(op) != _geometry(ops[0]):
            return "kernel, strides, dilations or pads differ"
    return None if ops else "there is no convolution"


def concat_channels(ops: Sequence[ConvOp]) -> ConvOp:
    """One convolution whose output channels are those of ``ops``, in order; grouped ones become dense.

    Raises:
        ValueError: ``why_not_concat`` has a reason.
    """
    reason = why_not_concat(ops)
    if reason is not None:
        raise ValueError(f"convolutions cannot be put side by side: {reason}")
    if len(ops) == 1:
        return ops[0]
    weight = np.concatenate([op.dense_weight() for op in ops])
    bias = None
    if any(op.bias is not None for op in ops):
        biases = [np.zeros(op.out_channels, weight.dtype) if op.bias is None else op.bias for op in ops]
        bias = np.concatenate(biases)
    return replace(ops[0], weight=weight, bias=bias, group=1)


def why_not_compose_concat(firsts: Sequence[ConvOp], second: ConvOp, spatial: Sizes | None = None) -> str | None:
    """Why ``second`` on the concatenated outputs of ``firsts`` is not one convolution, or None where it is, exactly."""
    if not firsts:
        return "there is no convolution before the concatenation"
    channels = sum(first.out_channels for first in firsts)
    if channels != second.in_channels:
        return f"the branches give {channels} channels, the convolution takes {second.in_channels}"
    for index, first in enumerate(firsts):
        reason = _why_not_one_grid(firsts[0], first, spatial)
        if reason is not None:
            return f"branches 0 and {index}: {reason}"
    for index, (first, part) in enumerate(zip(firsts, _split_input(second, firsts), strict=True)):
        if first.weight.dtype != part.weight.dtype or first.spatial_rank != part.spatial_rank:
            return f"branch {index}: dtype or number of spatial axes differs from the convolution"
        exactness = border_class(first, part, spatial)
        if exactness > Exactness.EXACT_WITHOUT_BIAS:
            return f"branch {index}: the convolution reads its padding ({exactness.name})"
    return None


def compose_concat(firsts: Sequence[ConvOp], second: ConvOp, spatial: Sizes | None = None) -> ConvOp:
    """One dense convolution for ``second`` on the channel concatenation of ``firsts``: the sum of the merged branches.

    Args:
        firsts: Convolutions of one input, in the order of the concatenation.
        second: Convolution that reads no padding of theirs, 1x1 for instance.
        spatial: Input size of ``firsts`` per axis; None stands for every size.

    Raises:
        ValueError: ``why_not_compose_concat`` has a reason.
    """
    reason = why_not_compose_concat(firsts, second, spatial)
    if reason is not None:
        raise ValueError(f"the branches cannot be merged: {reason}")
    parts = _split_input(second.astype(np.float64), firsts)
    merged = [compose(first.astype(np.float64), part) for first, part in zip(firsts, parts, strict=True)]
    total = reduce(lambda left, right: add_parallel(left, right, spatial), merged)
    if second.bias is not None:
        bias = second.bias if total.bias is None else total.bias + second.bias.astype(np.float64)
        total = replace(total, bias=bias)
    return total.astype(second.weight.dtype)


def _why_not_one_grid(a: ConvOp, b: ConvOp, spatial: Sizes | None) -> str | None:
    """Why the two do not read one input, or do not give outputs of one size at the same places."""
    if a.spatial_rank != b.spatial_rank:
        return f"{a.spatial_rank} and {b.spatial_rank} spatial axes"
    if a.in_channels != b.in_channels:
        return f"input channels differ: {a.in_channels} and {b.in_channels}"
    if a.weight.dtype != b.weight.dtype:
        return f"dtypes differ: {a.weight.dtype} and {b.weight.dtype}"
    if a.strides != b.strides:
        return f"strides differ: {a.strides} and {b.strides}"
    for axis, size in enumerate(sizes_or_unknown(a, spatial)):
        if size is None:
            # Equal for every size only if equal before the division by the stride.
            if _surplus(a, axis) != _surplus(b, axis):
                return f"spatial axis {axis}: output sizes are not the same for every input size"
        elif a.output_length(axis, size) != b.output_length(axis, size):
            lengths = f"{a.output_length(axis, size)} and {b.output_length(axis, size)}"
            return f"spatial axis {axis}: outputs of {lengths} from an input of {size}"
    return None


def _surplus(conv: ConvOp, axis: int) -> int:
    """The output size is floor((H - 1 + surplus) / s) + 1."""
    return conv.pads_begin[axis] + conv.pads_end[axis] - conv.reach[axis]


def _lattice(a: ConvOp, b: ConvOp, axis: int) -> tuple[int, int, int]:
    """Begin pad, dilation and taps of the smallest kernel that holds the taps d*u - P of both.

    The end pad follows as surplus + reach - begin pad; as the reach ends at or after that of either, it is no less than
    the end pad of the one that the surplus is taken from.
    """
    begin = max(a.pads_begin[axis], b.pads_begin[axis])
    end = max(op.reach[axis] - op.pads_begin[axis] for op in (a, b))
    steps = [op.dilations[axis] for op in (a, b) if op.kernel[axis] > 1]
    dilation = math.gcd(a.pads_begin[axis] - b.pads_begin[axis], *steps) or 1
    return begin, dilation, (begin + end) // dilation + 1


def _geometry(conv: ConvOp) -> tuple[object, ...]:
    dilations = tuple(d if k > 1 else 1 for d, k in zip(conv.dilations, conv.kernel, strict=True))
    return conv.kernel, conv.strides, dilations, conv.pads_begin, conv.pads_end


def _split_input(second: ConvOp, firsts: Sequence[ConvOp]) -> list[ConvOp]:
    """``second`` without its bias, cut into one dense convolution per branch."""
    ends = np.cumsum([first.out_channels for first in firsts])
    pieces = np.split(second.dense_weight(), ends[:-1], axis=1)
    return [replace(second, weight=piece, bias=None, group=1) for piece in pieces]
