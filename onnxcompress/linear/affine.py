"""Affine maps y = x @ matrix + bias, and the convolutions that are such a map of their whole input or of its means."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import DTypeLike

from onnxcompress.linear.conv import ConvOp, cast, channel_vector, known_sizes


@dataclass(frozen=True, eq=False)
class Affine:
    """y = x @ matrix + bias, for example a Gemm with alpha, beta and the transpositions worked in.

    Attributes:
        matrix: (K, N), floating point; its dtype is the dtype of every result.
        bias: (N,) or None.
    """

    matrix: np.ndarray
    bias: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.matrix.dtype.kind not in "fV":
            raise TypeError(f"matrix is {self.matrix.dtype}, a floating-point type is needed")
        if self.matrix.ndim != 2 or (self.bias is not None and self.bias.shape != self.matrix.shape[1:]):
            shapes = f"{self.matrix.shape} and {None if self.bias is None else self.bias.shape}"
            raise ValueError(f"matrix and bias have shapes {shapes}, (K, N) and (N,) are needed")

    def add_identity(self, scale: np.ndarray | float | None = None) -> "Affine":
        """x @ matrix + bias + scale * x, with scale (N,) or a scalar; None is 1."""
        if self.matrix.shape[0] != self.matrix.shape[1]:
            raise ValueError(f"a skip connection needs a square matrix, this one is {self.matrix.shape}")
        factors = channel_vector(1.0 if scale is None else scale, len(self.matrix))
        return replace(self, matrix=cast(self.matrix.astype(np.float64) + np.diag(factors), self.matrix.dtype))

    def scale_output(self, scale: np.ndarray | float, shift: np.ndarray | float | None = None) -> "Affine":
        """scale * (x @ matrix + bias) + shift, both (N,) or scalars."""
        factors = channel_vector(scale, self.matrix.shape[1])
        bias = scaled_bias(self.bias, factors, shift, self.matrix.dtype)
        return Affine(cast(self.matrix.astype(np.float64) * factors, self.matrix.dtype), bias)

    def scale_input(self, scale: np.ndarray | float, shift: np.ndarray | float | None = None) -> "Affine":
        """(scale * x + shift) @ matrix + bias, both (K,) or scalars."""
        rows = self.matrix.astype(np.float64)
        bias = self.bias
        if shift is not None:
            moved = channel_vector(shift, len(rows)) @ rows
            bias = cast(moved if bias is None else moved + bias, self.matrix.dtype)
        return Affine(cast(rows * channel_vector(scale, len(rows))[:, None], self.matrix.dtype), bias)


def compose_affine(first: Affine, second: Affine) -> Affine:
    """``second`` after ``first``."""
    if first.matrix.shape[1] != second.matrix.shape[0] or first.matrix.dtype != second.matrix.dtype:
        left, right = first.matrix, second.matrix
        raise ValueError(f"{left.dtype} {left.shape} cannot come before {right.dtype} {right.shape}")
    right = second.matrix.astype(np.float64)
    matrix = cast(first.matrix.astype(np.float64) @ right, second.matrix.dtype)
    if first.bias is None:
        return Affine(matrix, second.bias)
    moved = first.bias.astype(np.float64) @ right
    return Affine(matrix, cast(moved if second.bias is None else moved + second.bias, second.matrix.dtype))


def why_not_pointwise(conv: ConvOp) -> str | None:
    """Why conv(x) is not one matrix applied at every position of x, or None where it is."""
    if math.prod(conv.kernel) != 1:
        return f"the kernel is {conv.kernel}, 1 along every axis is needed"
    if any(conv.pads) or math.prod(conv.strides) != 1:
        return f"strides {conv.strides}, pads {conv.pads}: the output does not have the positions of the input"
    return None


def fold_global_average_pool(conv: ConvOp, affine: Affine) -> Affine:
    """``affine`` for the means of x, where it was for the means of conv(x): Conv -> GlobalAveragePool -> Gemm.

    A mean over positions and a matrix over channels commute, so the convolution disappears into the matrix.

    Raises:
        ValueError: ``why_not_pointwise`` has a reason.
    """
    reason = why_not_pointwise(conv)
    if reason is not None:
        raise ValueError(f"the convolution cannot pass a global average: {reason}")
    return compose_affine(Affine(conv.dense_weight().reshape(conv.out_channels, -1).T, conv.bias), affine)


def conv_as_matrix(conv: ConvOp, spatial: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Matrix and bias with flatten(conv(x)) = flatten(x) @ matrix + bias, for one input size.

    Args:
        conv: Any convolution.
        spatial: Input size per axis.

    Returns:
        Matrix (I * prod(spatial), O * prod(out)), mostly zeros, and bias (O * prod(out),), in the dtype of the weight.
    """
    sizes = known_sizes(conv, spatial)
    out = conv.output_size(sizes)
    matrix = np.zeros((conv.in_channels, math.prod(sizes), conv.out_channels, math.prod(out)), conv.weight.dtype)
    rows, columns = conv.out_channels // conv.group, conv.weight.shape[1]
    places = np.indices(out).reshape(len(out), -1)  # (axes, outputs)
    for taps in product(*map(range, conv.kernel)):
        start = np.array([d * u - p for d, u, p in zip(conv.dilations, taps, conv.pads_begin, strict=True)])
        read = places * np.array(conv.strides)[:, None] + start[:, None]
        inside = ((read >= 0) & (read < np.array(sizes)[:, None])).all(axis=0)
        sources, targets = np.ravel_multi_index(tuple(read[:, inside]), sizes), np.flatnonzero(inside)
        for g in range(conv.group):
            ins, outs = slice(g * columns, (g + 1) * columns), slice(g * rows, (g + 1) * rows)
            index: tuple[slice | int, ...] = (outs, slice(None), *taps)
            # Two index arrays around a slice: their axis comes first, (outputs, I/group, O/group).
            matrix[ins, sources, outs, targets] = conv.weight[index].T
    bias = np.zeros(conv.out_channels, conv.weight.dtype) if conv.bias is None else cast(conv.bias, conv.weight.dtype)
    return matrix.reshape(conv.in_channels * math.prod(sizes), -1), np.repeat(bias, math.prod(out))


def scaled_bias(
    bias: np.ndarray | None, factors: np.ndarray, shift: np.ndarray | float | None, dtype: DTypeLike
) -> np.ndarray | None:
    """factors * bias + shift, or None where there is neither."""
    if bias is None and shift is None:
        return None
    scaled = np.zeros(len(factors)) if bias is None else bias.astype(np.float64) * factors
    return cast(scaled + channel_vector(0.0 if shift is None else shift, len(factors)), dtype)
