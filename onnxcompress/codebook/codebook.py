"""What quantizing a layer reads and gives: input statistics, the form to store it in, codewords and indices.

A layer's weight is a matrix (outputs, D), D = inputs of one group times kernel positions. Each row is cut into D / d
sub-vectors of d numbers, and each sub-vector is stored as the index of one of k codewords that the whole layer shares.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnxcompress.errors import QuantizationError

CodebookType = Literal["float16", "int8"]
MAX_CODEWORDS = 65536
LONGEST_RUN = 256  # channels whose places take one byte each


@dataclass(frozen=True, eq=False)
class Skip:
    """Moments of what a layer's output is added to: c = s_f - s_q, by how much the quantized net's operand is short.

    Attributes:
        cross: (groups, D, outputs / group) float64, sum of x_q c'.
        float_cross: (groups, D, outputs / group) float64, sum of x_f c'.
        mean: (groups, outputs / group) float64, mean of c.
        power: Sum of |c|^2.
    """

    cross: np.ndarray
    float_cross: np.ndarray
    mean: np.ndarray
    power: float


@dataclass(frozen=True, eq=False)
class Statistics:
    """Second moments of a layer's input rows: x_q of the net quantized so far, x_f of the float net.

    Attributes:
        rows: How many rows the sums hold.
        gram: (groups, D, D) float64, sum of x_q x_q'.
        mean: (groups, D) float64, mean of x_q.
        cross: (groups, D, D) float64, sum of x_q x_f' (row index q, column index f); None where x_q is x_f.
        float_mean: (groups, D) float64, mean of x_f; None where x_q is x_f.
        float_gram: (groups, D, D) float64, sum of x_f x_f'; None where x_q is x_f.
        skip: Of the tensor that the output is added to; None where there is none or it is the same in both nets.
    """

    rows: int
    gram: np.ndarray
    mean: np.ndarray
    cross: np.ndarray | None = None
    float_mean: np.ndarray | None = None
    float_gram: np.ndarray | None = None
    skip: Skip | None = None

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"statistics of {self.rows} rows; pass None where there is no data")
        if self.gram.ndim != 3 or self.gram.shape[1] != self.gram.shape[2]:
            raise ValueError(f"gram has shape {self.gram.shape}, expected (groups, D, D)")
        given = [x is not None for x in (self.cross, self.float_mean, self.float_gram)]
        if any(given) and not all(given):
            raise ValueError("cross, float_mean and float_gram come together: all of them, or none where x_q is x_f")
        for name, shape in (("mean", self.gram.shape[:2]), ("float_mean", self.gram.shape[:2])):
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(f"{name} has shape {value.shape}, expected {shape}")
        for name in ("cross", "float_gram"):
            value = getattr(self, name)
            if value is not None and value.shape != self.gram.shape:
                raise ValueError(f"{name} has shape {value.shape}, expected {self.gram.shape}")
        if self.skip is not None and self.cross is None:
            raise ValueError("a skip needs the moments of both inputs: cross, float_mean and float_gram")

    def is_finite(self) -> bool:
        given = [self.gram, self.mean, self.cross, self.float_mean, self.float_gram]
        if self.skip is not None:
            given += [self.skip.cross, self.skip.float_cross, self.skip.mean]
        return all(bool(np.isfinite(value).all()) for value in given if value is not None)


@dataclass(frozen=True)
class Choice:
    """How a layer is stored.

    Attributes:
        block: Length d of a sub-vector.
        codewords: How many codewords k, 2 to 65536.
        codebook_type: "float16", or "int8" with one float32 factor for each of the d positions.
        scaled: Each output channel has a float16 factor.
        shared: Its codebook is that of all layers with this choice, see ``sharing.py``.
        permuted: Its input channels are stored in another order, see ``permuting.py``.
    """

    block: int
    codewords: int
    codebook_type: CodebookType = "float16"
    scaled: bool = False
    shared: bool = False
    permuted: bool = False

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block is {self.block}, at least 1 is needed")
        if not 2 <= self.codewords <= MAX_CODEWORDS:
            raise ValueError(f"codewords is {self.codewords}, allowed are 2 to {MAX_CODEWORDS}")
        if self.codebook_type not in ("float16", "int8"):
            raise ValueError(f"codebook_type is {self.codebook_type!r}, allowed are 'float16' and 'int8'")


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A layer as codewords and indices.

    Attributes:
        choice: How it is stored: what was asked for, but float16 where an int8 codebook cost too much.
        codebook: (k, d) float16 or int8.
        codebook_scale: (d,) float32 factors of an int8 codebook, else None.
        indices: (outputs, D / d) uint8 or uint16.
        scales: (outputs,) float16, None where not scaled.
        bias: (outputs,) float32, None where the layer has none.
        error: Relative output error on the rows it was fitted to; on the weight itself where there were none.
        held_out_error: The same on rows it was not fitted to.
        method: The method whose result was kept.
        order: Where each input channel is stored, see ``places_of``; None where they stand in their own order.
    """

    choice: Choice
    codebook: np.ndarray
    codebook_scale: np.ndarray | None
    indices: np.ndarray
    scales: np.ndarray | None
    bias: np.ndarray | None
    error: float
    held_out_error: float | None
    method: str = "sweep"
    order: np.ndarray | None = None

    def decode(self) -> np.ndarray:
        """(outputs, D) float32, bit for bit what Cast, Mul, Gather and Mul make of it in onnxruntime."""
        return decode(self.codebook, self.codebook_scale, self.indices, self.scales, self.order)

    def size_bytes(self) -> int:
        """Bytes of indices, codebook, factors, order and bias; the nodes and names of the file come on top."""
        arrays = [self.codebook, self.codebook_scale, self.scales, self.order, self.bias]
        stored = sum(array.nbytes for array in arrays if array is not None)
        return stored + indices_size_bytes(self.indices.size, self.choice.codewords)


def decode(
    codebook: np.ndarray,
    codebook_scale: np.ndarray | None,
    indices: np.ndarray,
    scales: np.ndarray | None,
    order: np.ndarray | None = None,
) -> np.ndarray:
    """Write the weight out: every step in float32, in the order of the nodes in the file.

    Args:
        codebook: (k, d) float16 or int8.
        codebook_scale: (d,) or () float32 factors, None for float16.
        indices: (outputs, D / d) unsigned.
        scales: (outputs,) float16 or None.
        order: Where each input channel is stored, or None.

    Returns:
        (outputs, D) float32.
    """
    codewords = codebook.astype(np.float32)
    if codebook_scale is not None:
        codewords = codewords * codebook_scale.astype(np.float32)
    weight = codewords[indices].reshape(len(indices), -1)
    if scales is not None:
        weight = weight * scales.astype(np.float32)[:, None]
    if order is not None:
        channels = weight.reshape(len(weight), order.size, -1)
        weight = channels[:, places_of(order)].reshape(weight.shape)
    return np.asarray(weight)


def order_shape(channels: int, together: int = 1) -> tuple[tuple[int, ...], type[np.unsignedinteger]]:
    """Shape and type of an order of input channels.

    Up to 256 channels, or within equal runs of 128 to 256 of them, a place is one byte; elsewhere two.

    Args:
        channels: How many.
        together: Channels of a sub-vector; a run holds whole ones.
    """
    if channels <= LONGEST_RUN:
        return (channels,), np.uint8
    runs = (run for run in range(LONGEST_RUN, LONGEST_RUN // 2 - 1, -1) if channels % run == 0 == run % together)
    run = next(runs, 0)
    return ((channels // run, run), np.uint8) if run else ((channels,), np.uint16)


def places_of(order: np.ndarray) -> np.ndarray:
    """(channels,) intp: where each channel is stored; an order of (runs, channels of a run) counts within each run."""
    starts = np.arange(len(order))[:, None] * order.shape[1] if order.ndim == 2 else 0
    return np.asarray((order.astype(np.intp) + starts).reshape(-1))


def index_type(codewords: int) -> type[np.unsignedinteger]:
    """The type indices have in memory; the file packs those of up to 16 codewords to 4 bits."""
    return np.uint8 if codewords <= 256 else np.uint16


def index_bits(codewords: int) -> int:
    """Bits an index takes in the file: 4, 8 or 16."""
    return 4 if codewords <= 16 else 8 if codewords <= 256 else 16


def indices_size_bytes(count: int, codewords: int) -> int:
    return (count * index_bits(codewords) + 7) // 8


def order_size_bytes(channels: int, together: int) -> int:
    """Bytes of an order of input channels, ``together`` of which are in a sub-vector."""
    return channels * np.dtype(order_shape(channels, together)[1]).itemsize


def size_bytes(shape: Sequence[int], choice: Choice, *, has_bias: bool, kernel: int = 1) -> int:
    """What ``QuantizedLayer.size_bytes`` will say of a weight (outputs, D) stored as chosen.

    Args:
        shape: Of the weight.
        choice: The form.
        has_bias: A bias comes with it.
        kernel: Numbers of a row that belong to one input channel.
    """
    outputs, length = shape
    codebook = choice.codewords * choice.block * (2 if choice.codebook_type == "float16" else 1)
    factors = 4 * choice.block if choice.codebook_type == "int8" else 0
    rows = outputs * (2 * choice.scaled + 4 * has_bias)
    if choice.permuted:
        factors += order_size_bytes(length // kernel, choice.block // kernel)
    return indices_size_bytes(outputs * (length // choice.block), choice.codewords) + codebook + factors + rows


def why_not_quantizable(weight: np.ndarray, choice: Choice) -> str | None:
    """The reason that ``quantize_layer`` would refuse, or None."""
    if weight.ndim != 2 or weight.size == 0:
        return f"the weight has shape {weight.shape}, expected (outputs, D) with at least one element"
    if not np.isfinite(weight).all():
        bad = int(weight.size - np.isfinite(weight).sum())
        return f"{bad} of {weight.size} weights are NaN or infinite; keep this layer"
    if weight.shape[1] % choice.block:
        # A padded last block would need a Slice in the file and spend indices on nothing: another d is better.
        return f"rows of {weight.shape[1]} weights cannot be cut into blocks of {choice.block}; use a divisor"
    vectors = weight.size // choice.block
    if vectors < 4 * choice.codewords and not choice.shared:
        return f"{vectors} sub-vectors are too few for {choice.codewords} codewords; at most {vectors // 4} fit"
    return None


def check_quantizable(weight: np.ndarray, choice: Choice) -> None:
    reason = why_not_quantizable(weight, choice)
    if reason is not None:
        raise QuantizationError(reason)
