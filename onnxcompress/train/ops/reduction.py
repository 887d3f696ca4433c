"""Reductions along axes, cumulative sums, and what ranks elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from onnxcompress.train.ops.call import Builder, Call, Function, integers

Axes = tuple[int, ...]
Reduce = Callable[[Tensor, Axes, bool], Tensor]


def reduction(reduce: Reduce, alone: Callable[[Tensor], Tensor], axes_are_input_from: int = 18) -> Builder:
    """The builder of a reduction.

    Args:
        reduce: Over given axes of a tensor that has them.
        alone: What it makes of each element where it reduces over no axis at all.
        axes_are_input_from: The operator set from which the axes are an input, before it an attribute.
    """

    def build(call: Call) -> Function:
        keep, noop = bool(call.attribute("keepdims", 1)), bool(call.attribute("noop_with_empty_axes", 0))

        def run(x: Tensor, axes: Axes) -> Tensor:
            if axes:
                return reduce(x, axes, keep)
            if noop or x.ndim == 0:
                return alone(x)
            return reduce(x, tuple(range(x.ndim)), keep)

        if call.opset < axes_are_input_from:
            known: Any = call.attribute("axes") or ()
        else:
            known = call.integers(1) if call.has(1) else ()
        if known is None:
            return lambda x, axes: run(x, tuple(integers(axes)))
        axes = tuple(known)
        if axes:
            return lambda x, *_: run(x, axes) if x.ndim == 0 else reduce(x, axes, keep)
        return lambda x, *_: run(x, axes)

    return build


def _in_floats(reduce: Reduce) -> Reduce:
    """``reduce``, which torch has for floating types alone; of integers it is truncated."""

    def run(x: Tensor, axes: Axes, keep: bool) -> Tensor:
        if x.is_floating_point():
            return reduce(x, axes, keep)
        return reduce(x.to(torch.float64), axes, keep).to(x.dtype)

    return run


def _sum(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.sum(x, axes, keep)
    return torch.sum(x, axes, keep, dtype=x.dtype)  # torch's own choice is int64


def _product(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = torch.prod(x, axis, keep, dtype=x.dtype)
    return x


def _extreme(function: Callable[..., Tensor], sign: int) -> Reduce:
    """amax or amin; of nothing it is the lowest or highest value of the type. Equal values share the gradient."""

    def run(x: Tensor, axes: Axes, keep: bool) -> Tensor:
        if x.numel():
            return function(x, axes, keep)
        shape = torch.sum(x, axes, keep).shape
        if x.is_floating_point():
            return x.new_full(shape, -sign * float("inf"))
        if x.dtype is torch.bool:
            return x.new_full(shape, sign < 0)
        limits = torch.iinfo(x.dtype)
        return x.new_full(shape, limits.min if sign > 0 else limits.max)

    return run


def _norm(degree: int) -> Reduce:
    return _in_floats(lambda x, axes, keep: torch.linalg.vector_norm(x, degree, axes, keep))


def _itself(x: Tensor) -> Tensor:
    return x


def arg_extreme(function: Callable[..., Tensor]) -> Builder:
    """The first of equal values, with select_last_index the last."""

    def build(call: Call) -> Function:
        axis, keep = call.attribute("axis", 0), bool(call.attribute("keepdims", 1))
        if not call.attribute("select_last_index", 0):
            return lambda x: function(x, axis, keep)
        return lambda x: x.shape[axis] - 1 - function(x.flip(axis), axis, keep)

    return build


def cumulative(function: Callable[..., Tensor], start: int) -> Builder:
    """Running sums or products along an axis; exclusive ones begin with ``start`` and leave out the last element."""

    def build(call: Call) -> Function:
        exclusive, reverse = call.attribute("exclusive", 0), call.attribute("reverse", 0)
        known = call.integers(1)

        def run(x: Tensor, given: Tensor) -> Tensor:
            axis = known[0] if known is not None else int(given)
            x = x.flip(axis) if reverse else x
            if exclusive:
                first = torch.full_like(x.narrow(axis, 0, 1), start)
                x = torch.cat([first, x.narrow(axis, 0, x.shape[axis] - 1)], axis)
            y = function(x, axis, dtype=x.dtype)
            return y.flip(axis) if reverse else y

        return run

    return build


def top_k(call: Call) -> Function:
    """A stable sort: of equal values ONNX takes the one of lower index, torch's topk any."""
    axis, largest = call.attribute("axis", -1), bool(call.attribute("largest", 1))
    known = [call.attribute("k")] if call.opset < 10 else call.integers(1)

    def run(x: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        count = known[0] if known is not None else int(given[0])
        ordered, indices = torch.sort(x, dim=axis, descending=largest, stable=True)
        return ordered.narrow(axis, 0, count), indices.narrow(axis, 0, count)

    return run


OPERATORS: dict[str, Builder] = {
    "ArgMax": arg_extreme(torch.argmax),
    "ArgMin": arg_extreme(torch.argmin),
    "CumProd": cumulative(torch.cumprod, 1),
    "CumSum": cumulative(torch.cumsum, 0),
    "ReduceL1": reduction(_norm(1), torch.abs),
    "ReduceL2": reduction(_norm(2), torch.abs),
    "ReduceLogSum": reduction(_in_floats(lambda x, axes, keep: torch.sum(x, axes, keep).log()), torch.log),
    "ReduceLogSumExp": reduction(_in_floats(lambda x, axes, keep: torch.logsumexp(x, axes, keep)), _itself),
    "ReduceMax": reduction(_extreme(torch.amax, 1), _itself),
    "ReduceMean": reduction(_in_floats(lambda x, axes, keep: torch.mean(x, axes, keep)), _itself),
    "ReduceMin": reduction(_extreme(torch.amin, -1), _itself),
    "ReduceProd": reduction(_product, _itself),
    "ReduceSum": reduction(_sum, _itself, 13),
    "ReduceSumSquare": reduction(lambda x, axes, keep: _sum(x * x, axes, keep), torch.square),
    "TopK": top_k,
}
