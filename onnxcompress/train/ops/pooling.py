"""Pools. torch's own where it takes the padding; else over an input padded first."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxcompress.train.ops.call import Builder, Call, Function
from onnxcompress.train.ops.linear import CONVOLUTIONS
from onnxcompress.train.ops.windows import Window, kernel_shape

_MAX: dict[int, Callable[..., Tensor]] = {1: torch.max_pool1d, 2: torch.max_pool2d, 3: torch.max_pool3d}
_MAX_INDICES: dict[int, Callable[..., tuple[Tensor, Tensor]]] = {
    1: F.max_pool1d_with_indices,
    2: F.max_pool2d_with_indices,
    3: F.max_pool3d_with_indices,
}
_AVERAGE: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _torch_pads(window: Window, kernel: Sequence[int]) -> bool:
    """Whether torch takes the padding: the same on both sides and at most half of a window."""
    return window.symmetric and all(2 * pad <= k for pad, k in zip(window.begins, kernel, strict=True))


def max_pool(call: Call) -> Function:
    kernel = kernel_shape(call)
    rank = len(kernel)
    window = Window.of(call, rank)
    if len(call.outputs) > 1 and call.outputs[1]:
        return _max_pool_with_indices(call, window, kernel)
    function, strides, dilations, ceil = _MAX[rank], window.strides, window.dilations, window.ceil
    if _torch_pads(window, kernel):
        pads = window.begins
        return lambda x: function(x, kernel, strides, pads, dilations, ceil)

    def run(x: Tensor) -> Tensor:
        padded = F.pad(x, window.exact_padding(x.shape[2:], kernel), value=_lowest(x.dtype))
        return function(padded, kernel, strides, 0, dilations)

    return run


def _lowest(dtype: torch.dtype) -> float:
    return -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min


def _max_pool_with_indices(call: Call, window: Window, kernel: tuple[int, ...]) -> Function:
    """Indices count over the whole input tensor, along columns within a plane where storage_order is 1."""
    rank = len(kernel)
    function = _MAX_INDICES[rank]
    by_columns = bool(call.attribute("storage_order", 0))

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        sizes = x.shape[2:]
        padded = F.pad(x, window.exact_padding(sizes, kernel), value=_lowest(x.dtype))
        y, found = function(padded, kernel, window.strides, 0, window.dilations)
        begins, _ = window.padding(sizes, kernel)
        coordinates = torch.unravel_index(found, padded.shape[2:])
        steps = _steps(sizes if not by_columns else sizes[::-1])
        place = torch.zeros_like(found)
        for coordinate, begin, step in zip(coordinates, begins, steps if not by_columns else steps[::-1], strict=True):
            place += (coordinate - begin) * step
        planes = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(*x.shape[:2], *(1,) * rank)
        return y, place + planes * math.prod(sizes)

    return run


def _steps(sizes: Sequence[int]) -> list[int]:
    """How far apart neighbours along each axis are in a row-major array."""
    return [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]


def average_pool(call: Call) -> Function:
    kernel = kernel_shape(call)
    rank = len(kernel)
    window = Window.of(call, rank)
    include = bool(call.attribute("count_include_pad", 0))
    if _torch_pads(window, kernel) and window.dilations == (1,) * rank:
        function, strides, pads, ceil = _AVERAGE[rank], window.strides, window.begins, window.ceil
        return lambda x: function(x, kernel, strides, pads, ceil, include)

    @functools.lru_cache(maxsize=4)
    def counts(sizes: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        with torch.inference_mode(False):  # or a training step could not use what a validation has left here
            return _elements(window, kernel, sizes, include).to(device, dtype)

    def run(x: Tensor) -> Tensor:
        return _sums(x, window, kernel) / counts(x.shape[2:], x.dtype, x.device)

    return run


def _elements(window: Window, kernel: Sequence[int], sizes: Sequence[int], include_padding: bool) -> Tensor:
    """How many elements each window averages."""
    product = torch.ones(())
    begins, ends = window.padding(sizes, kernel)
    for axis, count in enumerate(window.counts(sizes, kernel)):
        first = torch.arange(count)[:, None] * window.strides[axis] - begins[axis]
        taps = first + torch.arange(kernel[axis]) * window.dilations[axis]
        low, high = (-begins[axis], sizes[axis] + ends[axis]) if include_padding else (0, sizes[axis])
        product = product[..., None] * ((taps >= low) & (taps < high)).sum(1)
    return product


def _sums(x: Tensor, window: Window, kernel: tuple[int, ...]) -> Tensor:
    """The sum over each window, padding counted as 0."""
    rank, sizes = len(kernel), x.shape[2:]
    padded = F.pad(x, window.exact_padding(sizes, kernel))
    if window.dilations == (1,) * rank:
        return _AVERAGE[rank](padded, kernel, window.strides) * math.prod(kernel)
    planes = padded.reshape(-1, 1, *padded.shape[2:])
    found = CONVOLUTIONS[rank](planes, planes.new_ones(1, 1, *kernel), None, window.strides, 0, window.dilations)
    return found.reshape(*x.shape[:2], *found.shape[2:])


def root(x: Tensor, degree: float) -> Tensor:
    """x ** (1 / degree) of x >= 0, with gradient 0 where x is 0."""
    if degree == 1:
        return x
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).pow(1 / degree), 0)


def lp_pool(call: Call) -> Function:
    degree = call.attribute("p", 2)
    kernel = kernel_shape(call)
    window = Window.of(call, len(kernel))
    if degree == 2:
        return lambda x: root(_sums(x * x, window, kernel), 2)
    return lambda x: root(_sums(x.abs().pow(degree), window, kernel), degree)


def _spatial_axes(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


def global_average_pool(call: Call) -> Function:
    return lambda x: torch.mean(x, _spatial_axes(x), True) if x.ndim > 2 else x


def global_max_pool(call: Call) -> Function:
    """The gradient of a maximum that occurs twice goes to both, in equal parts."""
    return lambda x: torch.amax(x, _spatial_axes(x), True) if x.ndim > 2 else x


def global_lp_pool(call: Call) -> Function:
    degree = call.attribute("p", 2)
    return lambda x: torch.linalg.vector_norm(x, degree, _spatial_axes(x), True) if x.ndim > 2 else x.abs()


OPERATORS: dict[str, Builder] = {
    "AveragePool": average_pool,
    "GlobalAveragePool": global_average_pool,
    "GlobalLpPool": global_lp_pool,
    "GlobalMaxPool": global_max_pool,
    "LpPool": lp_pool,
    "MaxPool": max_pool,
}
