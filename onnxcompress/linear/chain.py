"""Chains of convolutions, and sums of chains of one input, as one convolution and the bias map that goes with it.

A chain is affine: f(x) = L(x) + f(0), where L is the chain without its biases and f(0) what the biases alone make of an
all-zero input. f(0) is known now, whatever padding did to it on the way. L is one zero-padded convolution if
``border_class`` says so of every pair that it is put together from, in any order. Then f is exactly conv_L(x) + f(0).
Where no bias meets padding, f(0) is one number per channel; elsewhere it is a map of the size of the output. Inside all
its places are alike, so that a map is known by the border around it and one place inside.

A ``Plan`` is made from sizes alone, so that a merge can be priced before its weights are computed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise, product

import numpy as np

from onnxcompress.linear.border import Exactness, border_class
from onnxcompress.linear.conv import ConvOp, Sizes, cast, compose
from onnxcompress.linear.parallel import add_parallel, why_not_parallel

Chain = tuple[ConvOp, ...]
APPROXIMATE = "it would be approximate (class 4): padding is read where the operator before sees data"


@dataclass(frozen=True, eq=False)
class BiasMap:
    """What is added to the output of a convolution, as few different rows and columns.

    Attributes:
        values: (1, O, *n), a place of each kind along every axis.
        places: Per axis, the kind of each place of the output; None where there is one kind.
    """

    values: np.ndarray
    places: tuple[np.ndarray | None, ...]

    @property
    def full(self) -> np.ndarray:
        """(1, O, *out), with 1 instead of the output size along an axis of one kind."""
        values = self.values
        for axis, places in enumerate(self.places):
            if places is not None:
                values = np.take(values, places, axis + 2)
        return values


@dataclass(frozen=True, eq=False)
class Merged:
    """A convolution, without a bias where there is a map, and the map or None."""

    conv: ConvOp
    bias_map: BiasMap | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """What a sum of chains becomes.

    Attributes:
        chains: Each in execution order, all of one input; their outputs are added.
        spatial: Size of that input per axis.
        conv: The merged convolution with weights of zeros that take no memory; with a bias unless there is a map.
        places: Of the bias map, as in ``BiasMap``; None along every axis where there is no map.
        exactness: APPROXIMATE only where the chain's geometry allows it.
    """

    chains: tuple[Chain, ...]
    spatial: tuple[int | None, ...]
    conv: ConvOp
    places: tuple[np.ndarray | None, ...]
    exactness: Exactness

    @property
    def has_map(self) -> bool:
        return any(places is not None for places in self.places)

    @property
    def map_shape(self) -> tuple[int, ...]:
        """Shape of the map unfolded."""
        return (1, self.conv.out_channels, *(1 if places is None else len(places) for places in self.places))

    @property
    def kinds_shape(self) -> tuple[int, ...]:
        """Shape of its different values."""
        return (1, self.conv.out_channels, *(1 if places is None else int(places.max()) + 1 for places in self.places))

    def merge(self) -> Merged:
        """Compute the weights, in float64 up to the end.

        Raises:
            OverflowError: A merged value does not fit the dtype of the weights.
        """
        parts = [reduce(compose, [replace(op.astype(np.float64), bias=None) for op in ops]) for ops in self.chains]
        total = reduce(lambda left, right: add_parallel(left, right, self.spatial), parts)
        dtype = self.conv.weight.dtype
        if not self.has_map and self.conv.bias is None:
            return Merged(total.astype(dtype))
        varies = [places is not None for places in self.places]
        field = sum(zero_response(ops, self.spatial, varies) for ops in self.chains)
        assert isinstance(field, np.ndarray)
        if not self.has_map:
            return Merged(replace(total, bias=field.reshape(-1)).astype(dtype))
        for axis, places in enumerate(self.places):
            if places is not None:
                field = np.take(field, np.unique(places, return_index=True)[1], axis + 1)
        return Merged(total.astype(dtype), BiasMap(cast(field[None], dtype), self.places))


class ChainGeometry:
    """The linear part of every segment of a chain, by sizes alone: channels left out, weights of ones.

    Args:
        ops: In execution order.
        spatial: Input size per axis.
        approximate: Put segments together that are not exact, too.

    Attributes:
        sizes: Spatial sizes before each operator, and after the last.

    Raises:
        ValueError: A kernel does not fit a size.
    """

    def __init__(self, ops: Sequence[ConvOp], spatial: Sizes, *, approximate: bool = False) -> None:
        self.ops = tuple(ops)
        self.approximate = approximate
        self.sizes = [tuple(spatial)]
        for op in ops:
            self.sizes.append(output_sizes(op, self.sizes[-1]))
        self._known: dict[tuple[int, int], tuple[ConvOp, Exactness] | None] = {}

    def linear(self, start: int, stop: int) -> tuple[ConvOp, Exactness] | None:
        """Operators start to stop - 1 without biases as one, and the worst class met; None if that is not allowed."""
        if (start, stop) not in self._known:
            self._known[start, stop] = self._linear(start, stop)
        return self._known[start, stop]

    def _linear(self, start: int, stop: int) -> tuple[ConvOp, Exactness] | None:
        if stop - start == 1:
            op = self.ops[start]
            return replace(op, weight=np.ones((1, 1, *op.kernel)), bias=None, group=1), Exactness.EXACT
        # Any way to put the segment together will do; the first is nearly always one if there is one.
        for middle in range(stop - 1, start, -1):
            left, right = self.linear(start, middle), self.linear(middle, stop)
            if left is None or right is None:
                continue
            exactness = border_class(left[0], right[0], self.sizes[start])
            if exactness is not Exactness.APPROXIMATE:
                return compose(left[0], right[0]), max(left[1], right[1], exactness)
        left, right = self.linear(start, stop - 1), self.linear(stop - 1, stop)
        if self.approximate and left is not None and right is not None:
            return compose(left[0], right[0]), Exactness.APPROXIMATE
        return None

    def plan(self, start: int, stop: int) -> Plan | str:
        """A segment as one convolution, or the reason why it is none."""
        return _plan([(self, start, stop)])


def plan_sum(chains: Sequence[Sequence[ConvOp]], spatial: Sizes) -> Plan | str:
    """A sum of chains of one input as one convolution, or the reason why it is none."""
    try:
        return _plan([(ChainGeometry(ops, spatial), 0, len(ops)) for ops in chains])
    except ValueError as error:
        return str(error)


def output_sizes(op: ConvOp, spatial: Sizes) -> tuple[int | None, ...]:
    """Output size per axis, None where the input size is."""
    return tuple(None if size is None else op.output_length(axis, size) for axis, size in enumerate(spatial))


def _plan(parts: Sequence[tuple[ChainGeometry, int, int]]) -> Plan | str:
    chains = tuple(geometry.ops[start:stop] for geometry, start, stop in parts)
    reason = _why_not_channels(chains)
    if reason is not None:
        return reason
    linear = [geometry.linear(start, stop) for geometry, start, stop in parts]
    exactness = Exactness.EXACT
    total: ConvOp | None = None
    geometry, start, stop = parts[0]
    spatial = geometry.sizes[start]
    border = [np.zeros(n or 1, bool) for n in geometry.sizes[stop]]
    for part, found in zip(parts, linear, strict=True):
        if found is None:
            return APPROXIMATE
        if total is not None and (reason := why_not_parallel(total, found[0], spatial)) is not None:
            return reason
        total = found[0] if total is None else add_parallel(total, found[0], spatial)
        places = _border(*part)
        if isinstance(places, str):
            return places
        exactness = max(exactness, found[1])
        if any(axis.any() for axis in places):
            exactness = Exactness.EXACT_WITH_BIAS_MAP
        border = [a | b for a, b in zip(border, places, strict=True)]
    assert total is not None
    kinds = tuple(_kinds(axis) if axis.any() else None for axis in border)
    conv = _with_channels(total, chains, bias=all(places is None for places in kinds))
    return Plan(chains, spatial, conv, kinds, exactness)


def _kinds(border: np.ndarray) -> np.ndarray:
    """Numbers from 0 on: one for each place of the border, and the same one for all inside."""
    inside = np.flatnonzero(~border)
    kinds = np.cumsum(border | (np.arange(len(border)) == (inside[0] if inside.size else -1))) - 1
    if inside.size:
        kinds[inside] = kinds[inside[0]]
    return kinds


def _why_not_channels(chains: Sequence[Chain]) -> str | None:
    dtypes = {op.weight.dtype for ops in chains for op in ops}
    if len(dtypes) > 1:
        return f"dtypes differ: {', '.join(sorted(map(str, dtypes)))}"
    for ops in chains:
        for first, second in pairwise(ops):
            if first.out_channels != second.in_channels or first.spatial_rank != second.spatial_rank:
                return f"{first.out_channels} channels come before an operator that takes {second.in_channels}"
    for name, channels in (
        ("input", {ops[0].in_channels for ops in chains}),
        ("output", {ops[-1].out_channels for ops in chains}),
    ):
        if len(channels) > 1:
            return f"{name} channels differ: {', '.join(map(str, sorted(channels)))}"
    return None


def _with_channels(total: ConvOp, chains: Sequence[Chain], bias: bool) -> ConvOp:
    group = math.gcd(*(op.group for ops in chains for op in ops))
    first, last = chains[0][0], chains[0][-1]
    shape = (last.out_channels, first.in_channels // group, *total.kernel)
    zero = np.zeros((), first.weight.dtype)
    some = bias and any(map(has_bias, (op for ops in chains for op in ops)))
    return replace(
        total,
        weight=np.broadcast_to(zero, shape),
        bias=np.broadcast_to(zero, shape[:1]) if some else None,
        group=group,
    )


def has_bias(op: ConvOp) -> bool:
    """Whether the bias adds anything."""
    return op.bias is not None and bool(op.bias.any())


def _border(geometry: ChainGeometry, start: int, stop: int) -> list[np.ndarray] | str:
    """Per axis, which output places see padding of what a bias has reached; a reason where a size is not known.

    (out,) bool each, (1,) along an axis of unknown size.
    """
    border = [np.zeros(n or 1, bool) for n in geometry.sizes[stop]]
    for middle in range(start + 1, stop):
        if not has_bias(geometry.ops[middle - 1]):
            continue
        # What follows the bias, as one where it can be: padding that only outputs read which nothing takes is none.
        tail = geometry.linear(middle, stop)
        places = [(tail[0], middle)] if tail is not None else [(geometry.ops[i], i) for i in range(middle, stop)]
        for op, place in places:
            for axis, size in enumerate(geometry.sizes[place]):
                if size is None and (op.pads_begin[axis] or op.pads_end[axis]):
                    return f"the bias map needs the size of spatial axis {axis}, which is dynamic"
                if size is None:
                    continue
                starts = np.arange(op.output_length(axis, size)) * op.strides[axis] - op.pads_begin[axis]
                seen = (starts < 0) | (starts + op.reach[axis] >= size)
                border[axis] |= seen if tail is not None else seen.any()
    return border


def zero_response(ops: Chain, spatial: Sizes, varies: Sequence[bool]) -> np.ndarray:
    """Output (O, *out), float64, of the chain for an input of zeros.

    Args:
        ops: The chain.
        spatial: Size of its input per axis, known where ``varies`` is set.
        varies: Axes along which the output may vary; along the others it is constant, and of size 1 here.
    """
    ones = (1,) * len(spatial)
    field: np.ndarray | None = None
    sizes = tuple(spatial)
    for op in ops:
        bias = np.zeros(op.out_channels) if op.bias is None else op.bias.astype(np.float64)
        moved = 0.0 if field is None else _through(op, field, sizes, varies)
        sizes = output_sizes(op, sizes)
        shape = (op.out_channels, *(n if v and n is not None else 1 for n, v in zip(sizes, varies, strict=True)))
        field = np.broadcast_to(bias.reshape(-1, *ones) + moved, shape)
    assert field is not None
    return field


def _through(op: ConvOp, field: np.ndarray, sizes: Sizes, varies: Sequence[bool]) -> np.ndarray:
    """The convolution, without its bias, of a field (I, *sizes) that is constant, and of size 1, along some axes."""
    out = [
        op.output_length(i, n) if v and n is not None else 1 for i, (n, v) in enumerate(zip(sizes, varies, strict=True))
    ]
    pads = [(b, e) if v else (0, 0) for b, e, v in zip(op.pads_begin, op.pads_end, varies, strict=True)]
    padded = np.pad(field, [(0, 0), *pads])
    padded = padded.reshape(op.group, -1, *padded.shape[1:])
    weight = op.weight.astype(np.float64).reshape(op.group, -1, *op.weight.shape[1:])
    result = np.zeros((op.group, weight.shape[1], math.prod(out)))
    for taps in product(*map(range, op.kernel)):
        window = tuple(
            slice(d * u, d * u + s * (n - 1) + 1, s) if v else slice(None)
            for d, u, s, n, v in zip(op.dilations, taps, op.strides, out, varies, strict=True)
        )
        reads: tuple[slice, ...] = (slice(None), slice(None), *window)
        read = padded[reads]
        index: tuple[slice | int, ...] = (slice(None), slice(None), slice(None), *taps)
        result += weight[index] @ read.reshape(*read.shape[:2], -1)
    return result.reshape(op.out_channels, *out)
