"""Convolutions and matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxcompress.train.ops.call import Builder, Call, Function
from onnxcompress.train.ops.windows import Window, same_padding, spatial_rank, torch_order

CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: torch.conv_transpose1d,
    2: torch.conv_transpose2d,
    3: torch.conv_transpose3d,
}


def _by_rank(build: Callable[[Call, int], Function]) -> Builder:
    """The builder of a convolution; its number of spatial axes may be known from the weight alone."""

    def build_any(call: Call) -> Function:
        rank = spatial_rank(call)
        if rank is not None:
            return build(call, rank)
        built: dict[int, Function] = {}

        def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
            rank = weight.ndim - 2
            if rank not in built:
                built[rank] = build(call, rank)
            return built[rank](x, weight, bias)

        return run

    return build_any


def conv(call: Call, rank: int) -> Function:
    window = Window.of(call, rank)
    function, group = CONVOLUTIONS[rank], call.attribute("group", 1)
    strides, pads, dilations, none = window.strides, window.begins, window.dilations, (0,) * rank
    if window.symmetric:
        return lambda x, weight, bias=None: function(x, weight, bias, strides, pads, dilations, group)
    explicit = torch_order(window.begins, window.ends)
    if not window.same:
        return lambda x, weight, bias=None: function(F.pad(x, explicit), weight, bias, strides, none, dilations, group)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        begins, ends = window.padding(x.shape[2:], weight.shape[2:])
        if begins == ends:
            return function(x, weight, bias, strides, begins, dilations, group)
        return function(F.pad(x, torch_order(begins, ends)), weight, bias, strides, none, dilations, group)

    return run


def conv_transpose(call: Call, rank: int) -> Function:
    """Padding takes away from the output here; ``output_shape`` and ``auto_pad`` say how much."""
    window = Window.of(call, rank)
    function, group = _TRANSPOSED[rank], call.attribute("group", 1)
    strides, dilations, none = window.strides, window.dilations, (0,) * rank
    extra = tuple(call.attribute("output_padding") or none)
    shape = call.attribute("output_shape")
    fits = all(e < max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True))  # torch's limit
    if shape is None and window.symmetric and fits:
        pads = window.begins
        return lambda x, weight, bias=None: function(x, weight, bias, strides, pads, extra, group, dilations)
    upper = window.auto_pad == "SAME_UPPER"

    def crop(sizes: torch.Size, kernel: torch.Size) -> list[int]:
        """Elements to add to the whole output, most of them negative, as torch's pad takes them."""
        if shape is None and not window.same:
            return torch_order(
                [-b for b in window.begins], [e - end for e, end in zip(extra, window.ends, strict=True)]
            )
        whole = [(n - 1) * s + k for n, s, k in zip(sizes, strides, window.extents(kernel), strict=True)]
        if shape is not None:
            wanted = shape[-rank:]
        else:  # a kernel shorter than the stride reaches less far, and onnxruntime leaves it at that
            wanted = [min(n * s, w + e) for n, s, w, e in zip(sizes, strides, whole, extra, strict=True)]
        pads = [same_padding(max(w + e - o, 0), upper=upper) for w, e, o in zip(whole, extra, wanted, strict=True)]
        begins = [-begin for begin, _ in pads]
        return torch_order(begins, [o - w - b for o, w, b in zip(wanted, whole, begins, strict=True)])

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        whole = function(x, weight, None, strides, none, none, group, dilations)
        cropped = F.pad(whole, crop(x.shape[2:], weight.shape[2:]))
        return cropped if bias is None else cropped + bias.reshape(-1, *(1,) * rank)

    return run


def _number(value: float) -> float:
    """As an integer where it is one: torch wants it for integer matrices."""
    return int(value) if value == int(value) else value


def gemm(call: Call) -> Function:
    """alpha * A' * B' + beta * C; torch's linear where it is that."""
    alpha, beta = _number(call.attribute("alpha", 1.0)), _number(call.attribute("beta", 1.0))
    transposed_a, transposed_b = call.attribute("transA", 0), call.attribute("transB", 0)
    if alpha == beta == 1 and transposed_b and not transposed_a:
        return _linear

    def run(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a, b = a.t() if transposed_a else a, b.t() if transposed_b else b
        if c is not None:
            return torch.addmm(c, a, b, beta=beta, alpha=alpha)
        product = torch.mm(a, b)
        return product if alpha == 1 else product * alpha

    return run


def _linear(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    if c is None or c.ndim == 1:
        return F.linear(a, b, c)
    return torch.addmm(c, a, b.t())


def einsum(call: Call) -> Function:
    equation = call.attribute("equation").replace(" ", "")
    return lambda *operands: torch.einsum(equation, *operands)


OPERATORS: dict[str, Builder] = {
    "Conv": _by_rank(conv),
    "ConvTranspose": _by_rank(conv_transpose),
    "Einsum": einsum,
    "Gemm": gemm,
    "MatMul": lambda call: torch.matmul,
}
