"""QuantizeLinear, DequantizeLinear and the operators on what they give, with a straight-through gradient.

A quantized value that a node computes travels as whole numbers in a floating-point tensor, so that the gradient gets
through; stored ones come as integers. Rounding has the gradient of the identity where the result is inside the range of
the integer type, and zero outside (Bengio et al. 2013); for a scale that is trained the pair of QuantizeLinear and
DequantizeLinear then has the gradient of a learned step size (Esser et al. 2020): q - x / s inside, q outside, with q
counted from the zero point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from onnxcompress.train.ops import linear
from onnxcompress.train.ops.call import Builder, Call, Function
from onnxcompress.train.ops.shaping import on_one_device

# Smallest and largest number of an integer type.
RANGES: dict[int, tuple[int, int]] = {
    TensorProto.INT2: (-2, 1),
    TensorProto.UINT2: (0, 3),
    TensorProto.INT4: (-8, 7),
    TensorProto.UINT4: (0, 15),
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT8: (0, 255),
    TensorProto.INT16: (-32768, 32767),
    TensorProto.UINT16: (0, 65535),
}
STORED: dict[torch.dtype, int] = {
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.int16: TensorProto.INT16,
    torch.uint16: TensorProto.UINT16,
}


class _RoundIntoRange(torch.autograd.Function):
    """Round half to even, move by the zero point, saturate; the gradient passes where nothing was saturated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, zero: Tensor | None, low: int, high: int) -> Tensor:
        rounded = torch.round(x)
        if zero is not None:
            rounded += zero
        q = rounded.clamp(low, high)
        ctx.save_for_backward(q == rounded)
        return q

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None


def round_into_range(x: Tensor, zero: Tensor | None, low: int, high: int) -> Tensor:
    """``clip(round(x) + zero, low, high)``, straight through."""
    found: Tensor = _RoundIntoRange.apply(x, zero, low, high)  # type: ignore[no-untyped-call]  # torch's
    return found


def integer_range(call: Call, position: int, zero: Tensor | None) -> tuple[int, int]:
    """The range of what the node makes, by its attribute or by the zero point at ``position``."""
    asked = call.attribute("output_dtype", 0)
    if asked:
        kind = asked
    elif zero is None:
        kind = TensorProto.UINT8
    elif zero.dtype in STORED:
        kind = STORED[zero.dtype]
    else:
        raise call.refuse(f"quantization to {str(zero.dtype).removeprefix('torch.')}")
    if kind not in RANGES:
        raise call.refuse(f"quantization to {TensorProto.DataType.Name(kind)}")
    return RANGES[kind]


class Spread:
    """How a scale or zero point lies along the tensor: one for all, for each index of an axis, or for each block."""

    def __init__(self, call: Call) -> None:
        self.axis = call.attribute("axis", 1)
        self.block = call.attribute("block_size", 0)

    def over(self, values: Tensor, x: Tensor) -> Tensor:
        """``values`` in a shape that broadcasts with x."""
        if values.dim() == 0:
            return values
        if self.block:
            return values.repeat_interleave(self.block, self.axis).narrow(self.axis, 0, x.shape[self.axis])
        return along(values, x.dim(), self.axis)


def quantize_linear(call: Call) -> Function:
    spread = Spread(call)
    fixed = call.constants.get(2)
    limits = integer_range(call, 2, fixed) if fixed is not None or not call.has(2) else None
    nothing = fixed is not None and not bool((fixed != 0).any())

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        low, high = limits or integer_range(call, 2, zero)
        x, scale = on_one_device(x, scale)
        shift = None
        if zero is not None and not nothing:
            shift = spread.over(zero.to(x.device, scale.dtype), x)
        return round_into_range(x.to(scale.dtype) / spread.over(scale, x), shift, low, high)

    return run


def dequantize_linear(call: Call) -> Function:
    spread = Spread(call)
    fixed = call.constants.get(2)
    nothing = not call.has(2) or (fixed is not None and not bool((fixed != 0).any()))

    def run(q: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        q, scale = on_one_device(q, scale)
        value = q.to(scale.dtype)
        if zero is not None and not nothing:
            value = value - spread.over(zero.to(q.device, scale.dtype), q)
        return value * spread.over(scale, q)

    return run


def dynamic_quantize_linear(call: Call) -> Function:
    """uint8 with the scale that the data need; the scale and the zero point hold still for the gradient."""

    def run(x: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
            scale = (high - low) / 255
            scale = torch.where(scale == 0, torch.ones_like(scale), scale)
            zero = torch.round((-low / scale).clamp(0, 255))
        return round_into_range(x / scale, zero, 0, 255), scale, zero.to(torch.uint8)

    return run


def along(values: Tensor, rank: int, axis: int) -> Tensor:
    """A scale or zero point in a shape that broadcasts: one for all, or one for each index of ``axis``."""
    if values.numel() == 1:
        return values.reshape(())
    return values.reshape([-1] + [1] * (rank - 1 - axis % rank)) if values.dim() == 1 else values


def shifted(q: Tensor, zero: Tensor | None, float_type: torch.dtype, axis: int) -> Tensor:
    """Quantized values, counted from their zero point."""
    value = q if q.is_floating_point() else q.to(float_type)
    return value if zero is None else value - along(zero.to(value.device, value.dtype), value.dim(), axis)


def convolution(call: Call, position: int) -> Function:
    """The convolution of a node whose weight is the input at ``position``."""
    weight = call.constants.get(position)
    constants = {} if weight is None else {1: weight}
    return linear.OPERATORS["Conv"](replace(call, inputs=(True, True), constants=constants))


def requantized(call: Call, sums: Tensor, factor: Tensor, zero: Tensor) -> Tensor:
    low, high = integer_range(call, 7, zero)
    return round_into_range(sums * factor, zero.to(sums.device, sums.dtype), low, high)


def matmul_integer(call: Call) -> Function:
    kind = call.float_type

    def run(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
        a, b = on_one_device(a, b)
        return shifted(a, a_zero, kind, -2) @ shifted(b, b_zero, kind, -1)

    return run


def conv_integer(call: Call) -> Function:
    kind, conv = call.float_type, convolution(call, 1)

    def run(x: Tensor, w: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None) -> Any:
        x, w = on_one_device(x, w)
        return conv(shifted(x, x_zero, kind, 1), shifted(w, w_zero, kind, 0))

    return run


def qlinear_matmul(call: Call) -> Function:
    kind = call.float_type

    def run(*inputs: Tensor) -> Tensor:
        a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = inputs
        a, b, a_scale, b_scale, y_scale = on_one_device(a, b, a_scale, b_scale, y_scale)
        sums = shifted(a, a_zero, kind, -2) @ shifted(b, b_zero, kind, -1)
        factor = along(a_scale, a.dim(), -2) * along(b_scale, b.dim(), -1) / y_scale
        return requantized(call, sums, factor, y_zero)

    return run


def qlinear_conv(call: Call) -> Function:
    kind, conv = call.float_type, convolution(call, 3)

    def run(*inputs: Tensor) -> Tensor:
        x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = inputs[:8]
        x, w, x_scale, w_scale, y_scale = on_one_device(x, w, x_scale, w_scale, y_scale)
        sums = conv(shifted(x, x_zero, kind, 1), shifted(w, w_zero, kind, 0))
        assert isinstance(sums, Tensor)
        if len(inputs) > 8 and inputs[8] is not None:
            sums = sums + along(inputs[8].to(sums.device, sums.dtype), sums.dim(), 1)
        return requantized(call, sums, along(x_scale * w_scale / y_scale, sums.dim(), 1), y_zero)

    return run


OPERATORS: dict[str, Builder] = {
    "ConvInteger": conv_integer,
    "DequantizeLinear": dequantize_linear,
    "DynamicQuantizeLinear": dynamic_quantize_linear,
    "MatMulInteger": matmul_integer,
    "QLinearConv": qlinear_conv,
    "QLinearMatMul": qlinear_matmul,
    "QuantizeLinear": quantize_linear,
}
