"""A convolution as arrays, and two of them in a row as one.

Any number of spatial axes, any group. Along one axis, with x = 0 outside [0, H),

    y[o, p] = b[o] + sum_{c,u} W[o, c, u] x[c, s*p + d*u - P]

so a second convolution reads the input of the first at s1*s2*p + (s1*d2*v + d1*u) - (P1 + s1*P2), which is again a
convolution. Only at the border the two can differ: see ``linear_border``. Computed in float64, cast once.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

import numpy as np
from numpy.typing import DTypeLike

Sizes = Sequence[int | None]


@dataclass(frozen=True, eq=False)
class ConvOp:
    """A convolution with constant weights.

    Attributes:
        weight: (O, I/group, *k), floating point; its dtype is the dtype of every result.
        bias: (O,) or None.
        strides: One integer per spatial axis, as the next three.
        dilations: Meaningless, and ignored, along an axis with one tap.
        pads_begin: Zeros before the data, at least 0.
        pads_end: Zeros after the data, at least 0.
        group: Divides I and O.
    """

    weight: np.ndarray
    bias: np.ndarray | None
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads_begin: tuple[int, ...]
    pads_end: tuple[int, ...]
    group: int = 1

    def __post_init__(self) -> None:
        if self.weight.dtype.kind not in "fV":  # V: bfloat16 of ml_dtypes
            raise TypeError(f"weight is {self.weight.dtype}, a floating-point type is needed")
        if self.weight.ndim < 3 or 0 in self.weight.shape:
            raise ValueError(f"weight has shape {self.weight.shape}, (O, I/group, *kernel) without zeros is needed")
        for name, least in (("strides", 1), ("dilations", 1), ("pads_begin", 0), ("pads_end", 0)):
            values = tuple(int(value) for value in getattr(self, name))
            if len(values) != self.spatial_rank or min(values) < least:
                raise ValueError(f"{name} is {values}, {self.spatial_rank} integers of at least {least} are needed")
            object.__setattr__(self, name, values)
        if self.group < 1 or self.out_channels % self.group:
            raise ValueError(f"group {self.group} does not divide the {self.out_channels} output channels")
        if self.bias is not None and self.bias.shape != (self.out_channels,):
            raise ValueError(f"bias has shape {self.bias.shape}, ({self.out_channels},) is needed")

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[2:])

    @property
    def out_channels(self) -> int:
        return int(self.weight.shape[0])

    @property
    def in_channels(self) -> int:
        return int(self.weight.shape[1]) * self.group

    @property
    def spatial_rank(self) -> int:
        return self.weight.ndim - 2

    @property
    def pads(self) -> tuple[int, ...]:
        """Pads in the order of the ONNX attribute: every begin, then every end."""
        return self.pads_begin + self.pads_end

    @property
    def reach(self) -> tuple[int, ...]:
        """Distance from the first to the last tap, d*(k-1), per axis."""
        return tuple(d * (k - 1) for d, k in zip(self.dilations, self.kernel, strict=True))

    @property
    def param_count(self) -> int:
        return self.weight.size + (0 if self.bias is None else self.bias.size)

    def macs(self, spatial_out: Sequence[int]) -> int:
        """Multiply-accumulates for one sample with this output size; the bias is not counted."""
        return self.weight.size * math.prod(spatial_out)

    def output_length(self, axis: int, size: int) -> int:
        """Output size along one spatial axis; ValueError where the kernel does not fit."""
        padded = size + self.pads_begin[axis] + self.pads_end[axis]
        if size < 1 or padded <= self.reach[axis]:
            raise ValueError(f"spatial axis {axis}: size {size}, {padded} padded, is less than {self.reach[axis] + 1}")
        return (padded - self.reach[axis] - 1) // self.strides[axis] + 1

    def output_size(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Output size per spatial axis: floor((H + P_begin + P_end - d*(k-1) - 1) / s) + 1."""
        sizes = known_sizes(self, spatial)
        return tuple(self.output_length(axis, size) for axis, size in enumerate(sizes))

    def can_regroup(self, group: int) -> bool:
        """Whether the blocks of this convolution lie within ``group`` blocks, whatever its weights."""
        return group >= 1 and self.group % group == 0

    def regroup(self, group: int) -> "ConvOp":
        """The same convolution with fewer groups, zeros where a group saw no input."""
        if not self.can_regroup(group):
            raise ValueError(f"group {self.group} cannot become {group}, which does not divide it")
        ratio = self.group // group
        rows, columns = self.out_channels // self.group, self.weight.shape[1]
        blocks = self.weight.reshape(group, ratio, rows, columns, *self.kernel)
        weight = np.zeros((group, ratio, rows, ratio, columns, *self.kernel), self.weight.dtype)
        for block in range(ratio):
            weight[:, block, :, block] = blocks[:, block]
        return replace(self, weight=weight.reshape(self.out_channels, ratio * columns, *self.kernel), group=group)

    def dense_weight(self) -> np.ndarray:
        """Weight (O, I, *k) of the same convolution with one group."""
        return self.regroup(1).weight

    def astype(self, dtype: DTypeLike) -> "ConvOp":
        """The same convolution in another dtype; a chain of merges is run in float64 and cast once at its end."""
        bias = None if self.bias is None else cast(self.bias, dtype)
        return replace(self, weight=cast(self.weight, dtype), bias=bias)


def cast(values: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Round to ``dtype``; OverflowError where a finite number would become infinite (float16 ends at 65504)."""
    with np.errstate(over="ignore"):
        rounded = values.astype(dtype)
    if not np.array_equal(np.isfinite(rounded), np.isfinite(values)):
        largest = np.abs(values[np.isfinite(values)]).max()
        raise OverflowError(f"a merged value of magnitude {largest:.4g} does not fit {np.dtype(dtype)}; keep the parts")
    return rounded


def channel_vector(values: np.ndarray | float, channels: int) -> np.ndarray:
    """(channels,) float64 from a scalar, (1,) or (channels,)."""
    return np.broadcast_to(np.asarray(values, np.float64), (channels,))


def known_sizes(conv: ConvOp, spatial: Sizes) -> tuple[int, ...]:
    """Spatial sizes, one per axis, all of them numbers."""
    sizes = tuple(size for size in spatial if size is not None)
    if len(spatial) != conv.spatial_rank or len(sizes) != len(spatial):
        raise ValueError(f"spatial size is {tuple(spatial)}, {conv.spatial_rank} known sizes are needed")
    return sizes


def sizes_or_unknown(conv: ConvOp, spatial: Sizes | None) -> Sizes:
    """Spatial sizes, one per axis, each a number or None."""
    sizes = (None,) * conv.spatial_rank if spatial is None else tuple(spatial)
    if len(sizes) != conv.spatial_rank:
        raise ValueError(f"spatial size is {sizes}, {conv.spatial_rank} sizes are needed")
    return sizes


def compose(first: ConvOp, second: ConvOp) -> ConvOp:
    """One convolution for ``second`` after ``first``, as exact as ``border_class`` (linear_border) says.

    Along each axis W[o, c, (s1*d2*v + d1*u) / g] += sum_m W2[o, m, v] W1[m, c, u], where g is the gcd of the offsets;
    stride s1*s2, pads P1 + s1*P2, which give the output size of the pair for every input size. The bias is that of the
    interior, b2 + sum_{m,v} W2[o, m, v] b1[m]. The group is gcd(group1, group2): both divide the middle channels into
    equal runs, these have that many common boundaries, and between two of them every input reaches every output.
    """
    check_chain(first, second)
    steps = tuple(s1 * d2 for s1, d2 in zip(first.strides, second.dilations, strict=True))
    extents = [e1 + step * (k2 - 1) for e1, step, k2 in zip(first.reach, steps, second.kernel, strict=True)]
    dilations = tuple(
        math.gcd(d1 if k1 > 1 else 0, step if k2 > 1 else 0) or 1
        for d1, k1, step, k2 in zip(first.dilations, first.kernel, steps, second.kernel, strict=True)
    )
    group = math.gcd(first.group, second.group)
    kernel = tuple(extent // d + 1 for extent, d in zip(extents, dilations, strict=True))
    weight = np.zeros((group, second.out_channels // group, first.in_channels // group, *kernel))
    left = second.weight.astype(np.float64).reshape(group, -1, *second.weight.shape[1:])
    right = first.weight.astype(np.float64).reshape(group, -1, *first.weight.shape[1:])
    for middle, within, rows, columns in _shared_channels(first, second):
        factor = right[:, middle]
        flat = factor.reshape(*factor.shape[:2], -1)
        for taps in product(*map(range, second.kernel)):
            source: tuple[slice | int, ...] = (slice(None), rows, within, *taps)
            term = left[source] @ flat  # (group, rows, columns * taps of first)
            places = (
                spread(step * v // d, d1 // d, k1)
                for step, v, d, d1, k1 in zip(steps, taps, dilations, first.dilations, first.kernel, strict=True)
            )
            target: tuple[slice, ...] = (slice(None), rows, columns, *places)
            weight[target] += term.reshape(*term.shape[:2], *factor.shape[2:])
    bias = second.bias
    if first.bias is not None:
        inner = tap_response(second, first.bias).reshape(second.out_channels, -1).sum(1)
        bias = inner if bias is None else inner + bias.astype(np.float64)
    dtype = second.weight.dtype
    return ConvOp(
        cast(weight.reshape(second.out_channels, -1, *kernel), dtype),
        None if bias is None else cast(bias, dtype),
        tuple(s1 * s2 for s1, s2 in zip(first.strides, second.strides, strict=True)),
        dilations,
        tuple(p1 + s1 * p2 for p1, s1, p2 in zip(first.pads_begin, first.strides, second.pads_begin, strict=True)),
        tuple(p1 + s1 * p2 for p1, s1, p2 in zip(first.pads_end, first.strides, second.pads_end, strict=True)),
        group,
    )


def tap_response(conv: ConvOp, values: np.ndarray) -> np.ndarray:
    """sum_m W[o, m, v] values[m]: (O, *k), float64."""
    weight = conv.weight.astype(np.float64).reshape(conv.group, -1, *conv.weight.shape[1:])
    vector = channel_vector(values, conv.in_channels).reshape(conv.group, -1)
    response: np.ndarray = np.einsum("goi...,gi->go...", weight, vector)
    return response.reshape(conv.out_channels, *conv.kernel)


def spread(start: int, step: int, count: int) -> slice:
    """``count`` places from ``start`` on, ``step`` apart."""
    step = max(step, 1)  # a lattice can be coarser than the meaningless dilation of a single tap
    return slice(start, start + step * (count - 1) + 1, step)


def check_chain(first: ConvOp, second: ConvOp) -> None:
    if first.spatial_rank != second.spatial_rank:
        raise ValueError(f"the convolutions have {first.spatial_rank} and {second.spatial_rank} spatial axes")
    if first.out_channels != second.in_channels:
        raise ValueError(f"the first gives {first.out_channels} channels, the second takes {second.in_channels}")
    if first.weight.dtype != second.weight.dtype:
        raise ValueError(f"the weights are {first.weight.dtype} and {second.weight.dtype}, one dtype is needed")


def _shared_channels(first: ConvOp, second: ConvOp) -> Iterator[tuple[slice, slice, slice, slice]]:
    """Runs of middle channels within one group of either convolution.

    Counted from the start of a merged group, the same in each: the run; the run from the start of its group of
    ``second``; the output channels of that group; the input channels of its group of ``first``.
    """
    group = math.gcd(first.group, second.group)
    channels, run1, run2 = first.out_channels // group, first.out_channels // first.group, second.weight.shape[1]
    rows, columns = second.out_channels // second.group, first.weight.shape[1]
    for begin, end in pairwise(sorted({*range(0, channels + 1, run1), *range(0, channels + 1, run2)})):
        left, right = begin // run2, begin // run1
        within = slice(begin - left * run2, end - left * run2)
        row_slice, column_slice = slice(left * rows, (left + 1) * rows), slice(right * columns, (right + 1) * columns)
        yield slice(begin, end), within, row_slice, column_slice
