"""The algebra of linear operators: compose, add, embed, scale; arrays in, arrays out.

This is the module to import from. It holds the scales and shifts of one convolution, and gives the rest by name:

    linear_conv       ConvOp, and two in a row as one
    linear_border     where that is exact, and the bias that makes it so
    linear_parallel   sums, skips and concatenations of convolutions of one input
    linear_affine     matrices, and convolutions as such

Results are computed in float64 and cast once to the dtype of the weight. A function named ``why_not_x`` gives the
reason that ``x`` would raise as a ValueError, or None. Whether a merge pays is for ``cost``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import DTypeLike

from onnxcompress.linear.affine import (
    Affine,
    compose_affine,
    conv_as_matrix,
    fold_global_average_pool,
    scaled_bias,
    why_not_pointwise,
)
from onnxcompress.linear.border import Exactness, bias_map, border_class, shift_input_bias
from onnxcompress.linear.conv import ConvOp, Sizes, cast, channel_vector, compose, tap_response
from onnxcompress.linear.parallel import (
    add_identity,
    add_parallel,
    compose_concat,
    concat_channels,
    why_not_compose_concat,
    why_not_concat,
    why_not_identity,
    why_not_parallel,
)

__all__ = [
    "Affine",
    "ConvOp",
    "ConvTransposeOp",
    "Exactness",
    "Sizes",
    "add_identity",
    "add_parallel",
    "average_pool_as_conv",
    "batchnorm_affine",
    "bias_map",
    "border_class",
    "compose",
    "compose_affine",
    "compose_concat",
    "compose_transpose",
    "concat_channels",
    "conv_as_matrix",
    "fold_global_average_pool",
    "scale_input",
    "scale_output",
    "scale_transpose_output",
    "shift_input_bias",
    "why_not_compose_concat",
    "why_not_compose_transpose",
    "why_not_concat",
    "why_not_identity",
    "why_not_parallel",
    "why_not_pointwise",
]


def batchnorm_affine(
    scale: np.ndarray, bias: np.ndarray, mean: np.ndarray, var: np.ndarray, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """Inference-mode BatchNormalization as s * x + t, float64: s = scale / sqrt(var + epsilon), t = bias - mean * s."""
    variance = var.astype(np.float64) + epsilon
    if not (variance > 0).all():
        channel = int(np.argmin(variance > 0))
        raise ValueError(f"channel {channel}: var + epsilon is {variance[channel]:.4g}, more than 0 is needed")
    s = scale.astype(np.float64) / np.sqrt(variance)
    return s, bias.astype(np.float64) - mean.astype(np.float64) * s


def scale_output(conv: ConvOp, scale: np.ndarray | float, shift: np.ndarray | float | None = None) -> ConvOp:
    """scale * conv(x) + shift, both (O,) or scalars; exact with any pads and group."""
    factors = channel_vector(scale, conv.out_channels)
    rows = factors.reshape(-1, 1, *(1,) * conv.spatial_rank)
    weight = cast(conv.weight.astype(np.float64) * rows, conv.weight.dtype)
    return replace(conv, weight=weight, bias=scaled_bias(conv.bias, factors, shift, conv.weight.dtype))


def scale_input(conv: ConvOp, scale: np.ndarray | float) -> ConvOp:
    """conv(scale * x), scale (I,) or a scalar; exact with any pads and group. A shift is for ``shift_input_bias``."""
    factors = channel_vector(scale, conv.in_channels).reshape(conv.group, 1, -1, *(1,) * conv.spatial_rank)
    blocks = conv.weight.astype(np.float64).reshape(conv.group, -1, *conv.weight.shape[1:])
    return replace(conv, weight=cast((blocks * factors).reshape(conv.weight.shape), conv.weight.dtype))


def average_pool_as_conv(
    channels: int,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads_begin: Sequence[int],
    pads_end: Sequence[int],
    dtype: DTypeLike,
    dilations: Sequence[int] | None = None,
) -> ConvOp:
    """AveragePool as a depthwise convolution.

    This is the pool that divides by the size of the kernel everywhere: ceil_mode=0, and count_include_pad=1 or no pads.
    The default of ONNX, count_include_pad=0 with pads, divides by less at the border and is no convolution.
    """
    weight = cast(np.full((channels, 1, *kernel), 1 / math.prod(kernel)), dtype)
    steps = (1,) * len(kernel) if dilations is None else tuple(dilations)
    return ConvOp(weight, None, tuple(strides), steps, tuple(pads_begin), tuple(pads_end), channels)


@dataclass(frozen=True, eq=False)
class ConvTransposeOp:
    """The channels of a ConvTranspose; nothing here depends on its geometry.

    Attributes:
        weight: (I, O/group, *k), floating point.
        bias: (O,) or None.
        group: Divides I and O.
    """

    weight: np.ndarray
    bias: np.ndarray | None
    group: int = 1

    def __post_init__(self) -> None:
        if self.weight.dtype.kind not in "fV":
            raise TypeError(f"weight is {self.weight.dtype}, a floating-point type is needed")
        if self.weight.ndim < 3 or self.group < 1 or self.weight.shape[0] % self.group:
            raise ValueError(f"weight {self.weight.shape} is not (I, O/group, *kernel) with group {self.group}")
        if self.bias is not None and self.bias.shape != (self.out_channels,):
            raise ValueError(f"bias has shape {self.bias.shape}, ({self.out_channels},) is needed")

    @property
    def in_channels(self) -> int:
        return int(self.weight.shape[0])

    @property
    def out_channels(self) -> int:
        return int(self.weight.shape[1]) * self.group


def scale_transpose_output(
    op: ConvTransposeOp, scale: np.ndarray | float, shift: np.ndarray | float | None = None
) -> ConvTransposeOp:
    """scale * op(x) + shift, both (O,) or scalars; exact with any geometry and group."""
    factors = channel_vector(scale, op.out_channels)
    blocks = op.weight.reshape(op.group, -1, *op.weight.shape[1:])
    columns = factors.reshape(op.group, 1, -1, *(1,) * (op.weight.ndim - 2))
    weight = cast((blocks.astype(np.float64) * columns).reshape(op.weight.shape), op.weight.dtype)
    return replace(op, weight=weight, bias=scaled_bias(op.bias, factors, shift, op.weight.dtype))


def why_not_compose_transpose(first: ConvTransposeOp, second: ConvOp) -> str | None:
    """Why ``second`` after a ConvTranspose is not one ConvTranspose, or None where it is."""
    if second.in_channels != first.out_channels:
        return f"the first gives {first.out_channels} channels, the second takes {second.in_channels}"
    if second.weight.ndim != first.weight.ndim or second.weight.dtype != first.weight.dtype:
        return "dtype or number of spatial axes differs"
    return why_not_pointwise(second)


def compose_transpose(first: ConvTransposeOp, second: ConvOp) -> ConvTransposeOp:
    """ConvTranspose -> 1x1 Conv as one ConvTranspose of the geometry of ``first``; the group is the gcd of both.

    Raises:
        ValueError: ``why_not_compose_transpose`` has a reason.
    """
    reason = why_not_compose_transpose(first, second)
    if reason is not None:
        raise ValueError(f"the convolution cannot enter the ConvTranspose: {reason}")
    # Seen as a convolution from output to input, a ConvTranspose has the weight (I, O/group, *k) of one: W1^T W2^T.
    kernel, ones, zeros = first.weight.shape[2:], (1,) * second.spatial_rank, (0,) * second.spatial_rank
    backward1 = ConvOp(first.weight, None, ones, ones, zeros, zeros, first.group)
    rows, columns = second.out_channels // second.group, second.weight.shape[1]
    turned = second.weight.reshape(second.group, rows, columns).swapaxes(1, 2).reshape(-1, rows, *ones)
    backward = compose(ConvOp(turned, None, ones, ones, zeros, zeros, second.group), backward1)
    bias = second.bias
    if first.bias is not None:
        moved = tap_response(second, first.bias).reshape(-1)
        bias = cast(moved if bias is None else moved + bias, second.weight.dtype)
    return ConvTransposeOp(backward.weight.reshape(first.in_channels, -1, *kernel), bias, backward.group)
