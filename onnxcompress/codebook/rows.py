"""The rows that a weight matrix (outputs, D) is multiplied with, out of the tensors that its operator reads.

    Conv            patches of the padded input, (channel of the group, kernel position)
    ConvTranspose   the same of the input with zeros between its pixels: y = Conv(spread x, W turned round)
    Gemm, MatMul    the input's last axis; for a constant left operand the last but one
    LSTM, GRU       W: the input of a step; R: the hidden state of the step before, of each direction its own
    Gather          no rows: an id picks one

Where the operator has groups (or directions), each has its own rows of length D.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Form = Literal["patches", "spread patches", "last axis", "last but one axis", "hidden states", "ids"]


@dataclass(frozen=True)
class Window:
    """Geometry of a Conv or ConvTranspose as its attributes say; ``pads`` is None where ``auto_pad`` rules."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | None
    auto_pad: str = "NOTSET"
    output_padding: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()

    @property
    def reach(self) -> list[int]:
        return [dilation * (size - 1) + 1 for dilation, size in zip(self.dilations, self.kernel, strict=True)]

    def conv_pads(self, size: Sequence[int]) -> list[tuple[int, int]]:
        """(begin, end) per axis of a Conv on an input of this spatial size."""
        if self.pads is not None:
            return list(zip(self.pads[: len(size)], self.pads[len(size) :], strict=True))
        totals = [
            max((-(-n // stride) - 1) * stride + reach - n, 0)
            for n, stride, reach in zip(size, self.strides, self.reach, strict=True)
        ]
        return [self._split(total) for total in totals]

    def spread_pads(self, size: Sequence[int]) -> list[tuple[int, int]]:
        """(begin, end) per axis around the spread input of a ConvTranspose; negative ones cut."""
        extra = self.output_padding or (0,) * len(size)
        whole = [
            stride * (n - 1) + more + reach
            for n, stride, more, reach in zip(size, self.strides, extra, self.reach, strict=True)
        ]
        if self.output_shape:
            given = self.output_shape[-len(size) :]
            cut = [
                self._split(total - n)[:: -1 if self.auto_pad in ("NOTSET", "VALID") else 1]
                for total, n in zip(whole, given, strict=True)
            ]
        elif self.pads is None:
            cut = [self._split(total - n * s) for total, n, s in zip(whole, size, self.strides, strict=True)]
        else:
            cut = list(zip(self.pads[: len(size)], self.pads[len(size) :], strict=True))
        return [
            (reach - 1 - begin, reach - 1 - end + more)
            for (begin, end), reach, more in zip(cut, self.reach, extra, strict=True)
        ]

    def _split(self, total: int) -> tuple[int, int]:
        small = total // 2
        return (total - small, small) if self.auto_pad == "SAME_LOWER" else (small, total - small)


@dataclass(frozen=True)
class RowSource:
    """Which tensors give the rows of one reader of a weight, and how.

    Attributes:
        form: See the module's text.
        tensor: Name of the tensor.
        groups: Groups of a convolution, directions of hidden states.
        window: Geometry of a convolution.
        initial: Hidden states before the first step, where they are given.
        direction: "forward", "reverse" or "bidirectional".
        layout: 0 for (steps, batch, ...), 1 for (batch, steps, ...).
    """

    form: Form
    tensor: str
    groups: int = 1
    window: Window | None = None
    initial: str = ""
    direction: str = "forward"
    layout: int = 0

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.tensor, self.initial) if self.initial else (self.tensor,)


class Rows:
    """The rows of one batch: how many there are, and any of them by number.

    Args:
        source: How the tensors give rows.
        arrays: The tensors of ``source.tensors``.
    """

    def __init__(self, source: RowSource, arrays: Sequence[np.ndarray]) -> None:
        self.source = source
        x = np.asarray(arrays[0])
        x = x if x.dtype == np.float32 else x.astype(np.float32)
        if source.form in ("patches", "spread patches"):
            self._view = _patches(source, x)
            axes = (self._view.ndim - 2) // 2
            self._places = (self._view.shape[0], *self._view.shape[2 : 2 + axes])
        elif source.form == "hidden states":
            self._view = _hidden_states(source, x, arrays[1] if len(arrays) > 1 else None)
            self._places = self._view.shape[:1]
        else:
            if source.form == "last but one axis" and x.ndim > 1:
                x = np.swapaxes(x, -1, -2)
            self._view = x.reshape(-1, x.shape[-1])
            self._places = self._view.shape[:1]
        self._leading = x.shape[:-1]
        self.count = math.prod(self._places)
        self.length = math.prod(self._view.shape) // max(self.count, 1) // source.groups

    def output_shape(self, outputs: int) -> tuple[int, ...]:
        """The shape of what the operator makes, of forms that ``output_rows`` knows."""
        if self.source.window is not None:
            return (self._places[0], outputs, *self._places[1:])
        return (*self._leading, outputs)

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """(groups, n, D) float32 of the rows with these numbers, (n,) int."""
        places: list[Any] = list(np.unravel_index(numbers, self._places))
        rows = self._view[tuple([places[0], slice(None), *places[1:]] if len(places) > 1 else places)]
        return np.asarray(rows.reshape(len(numbers), self.source.groups, self.length).transpose(1, 0, 2))

    def chunks(self, numbers: np.ndarray, limit_bytes: int) -> Iterator[np.ndarray]:
        """The rows with these numbers in pieces of (groups, n, D) float32 of at most ``limit_bytes``."""
        step = max(1, limit_bytes // (4 * self.length * self.source.groups))
        for start in range(0, len(numbers), step):
            yield self.take(numbers[start : start + step])


def output_rows(source: RowSource, output: np.ndarray) -> np.ndarray:
    """(groups, n, outputs / group) float32: what the operator makes of each row, in the order of ``Rows``.

    Only of forms whose outputs stand on the channel axis or the last: patches and "last axis".
    """
    flat = np.moveaxis(output, 1, -1) if source.window is not None else output
    flat = flat.reshape(-1, source.groups, flat.shape[-1] // source.groups)
    return np.asarray(flat.transpose(1, 0, 2), np.float32)


def _patches(source: RowSource, x: np.ndarray) -> np.ndarray:
    """(N, C, places..., kernel...): a view of the padded input."""
    window = source.window
    assert window is not None, "only convolutions have patches"
    strides, flip = window.strides, False
    if source.form == "spread patches":
        pads = window.spread_pads(x.shape[2:])
        x, strides, flip = _spread(x, window.strides), (1,) * len(window.kernel), True
    else:
        pads = window.conv_pads(x.shape[2:])
    x = np.pad(x, [(0, 0), (0, 0), *((max(begin, 0), max(end, 0)) for begin, end in pads)])
    x = x[_tail(slice(max(-b, 0), n - max(-e, 0)) for (b, e), n in zip(pads, x.shape[2:], strict=True))]
    axes = tuple(range(2, x.ndim))
    view = np.lib.stride_tricks.sliding_window_view(x, window.reach, axis=axes)
    # A transposed convolution meets the last kernel position first.
    inner = [-dilation if flip else dilation for dilation in window.dilations]
    return view[_tail(slice(None, None, step) for step in [*strides, *inner])]


def _tail(slices: Iterable[slice]) -> tuple[slice, ...]:
    """An index that leaves batch and channels alone."""
    return (slice(None), slice(None), *slices)


def _spread(x: np.ndarray, strides: Sequence[int]) -> np.ndarray:
    size = [stride * (n - 1) + 1 for n, stride in zip(x.shape[2:], strides, strict=True)]
    spread = np.zeros((*x.shape[:2], *size), np.float32)
    spread[_tail(slice(None, None, stride) for stride in strides)] = x
    return spread


def _hidden_states(source: RowSource, y: np.ndarray, initial: np.ndarray | None) -> np.ndarray:
    """(steps * batch, directions, hidden): the state that each step starts from."""
    if source.layout:
        y = y.transpose(1, 2, 0, 3)  # (batch, steps, directions, hidden)
        initial = None if initial is None else initial.transpose(1, 0, 2)
    steps, directions, batch, size = y.shape
    before = np.zeros((steps, batch, directions, size), np.float32)
    for index in range(directions):
        backward = source.direction == "reverse" or index == 1
        first, rest, made = (-1, slice(0, -1), slice(1, None)) if backward else (0, slice(1, None), slice(0, -1))
        before[rest, :, index] = y[made, index]
        if initial is not None:
            before[first, :, index] = initial[index]
    return before.reshape(steps * batch, directions, size)
