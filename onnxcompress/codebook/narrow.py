"""Weights as int8 with a factor per output, or as float16: for layers that a codebook serves badly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LARGEST_FLOAT16 = float(np.finfo(np.float16).max)


@dataclass(frozen=True, eq=False)
class Int8Layer:
    """A weight in int8.

    Attributes:
        values: (outputs, D) int8, -127 to 127.
        scales: (outputs,) float32.
        bias: (outputs,) float32; None leaves the layer's own.
    """

    values: np.ndarray
    scales: np.ndarray
    bias: np.ndarray | None = None

    def decode(self) -> np.ndarray:
        """(outputs, D) float32, bit for bit what Cast and Mul make of it."""
        return np.asarray(self.values.astype(np.float32) * self.scales[:, None])

    def size_bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(frozen=True, eq=False)
class Float16Layer:
    """A weight in float16.

    Attributes:
        values: (outputs, D) float16.
        bias: (outputs,) float32; None leaves the layer's own.
    """

    values: np.ndarray
    bias: np.ndarray | None = None

    def decode(self) -> np.ndarray:
        """(outputs, D) float32."""
        return self.values.astype(np.float32)

    def size_bytes(self) -> int:
        return self.values.nbytes + (0 if self.bias is None else self.bias.nbytes)


def to_int8(weight: np.ndarray, bias: np.ndarray | None = None) -> Int8Layer:
    """Round a weight to int8, symmetric, one factor per output: max|w| / 127.

    Args:
        weight: (outputs, D) float32, finite.
        bias: Stored with it.
    """
    largest = np.abs(weight).max(axis=1, initial=0.0).astype(np.float32)
    scales = (largest / np.float32(127)).astype(np.float32)
    scales[scales == 0] = 1  # a row of zeros, or of numbers too small to divide
    values = np.clip(np.rint(weight / scales[:, None]), -127, 127).astype(np.int8)
    return Int8Layer(values, scales, bias)


def to_float16(weight: np.ndarray, bias: np.ndarray | None = None) -> Float16Layer:
    """Round a weight to float16; numbers beyond its range become its largest.

    Args:
        weight: (outputs, D) float32, finite.
        bias: Stored with it.
    """
    return Float16Layer(np.clip(weight, -LARGEST_FLOAT16, LARGEST_FLOAT16).astype(np.float16), bias)
