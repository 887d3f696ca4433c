"""Labels of channels: which elements of which tensors stand or fall together.

The labelling of a tensor is an int array that broadcasts to the tensor's shape: size 1 on the axes along which nothing
can be removed, full size on the others. Elements with one label are removed together. An operator that moves elements
moves their labels in the same way, one that combines elements of two tensors unites their labels, and one that needs
all of them freezes them. Where a labelling has one axis, every label can go on its own; where it has several, as
(heads, dim) has, only whole slices along an axis can, for what is left must be a box.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Line:
    """One axis of a labelling: its slices are what can be removed."""

    labels: np.ndarray
    axis: int

    @property
    def size(self) -> int:
        return int(self.labels.shape[self.axis])

    def slices(self) -> np.ndarray:
        """(size, elements of a slice) labels."""
        return np.moveaxis(self.labels, self.axis, 0).reshape(self.size, -1)


class LabelSpace:
    """All labels of one graph: unions of labels, equal slices, and what must not be removed."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self.arrays: list[np.ndarray] = []
        self.links: list[tuple[Line, Line]] = []
        self.frozen_labels: list[tuple[np.ndarray, str]] = []
        self.frozen_lines: list[tuple[Line, str]] = []

    def __len__(self) -> int:
        return len(self._parent)

    def new(self, size: int) -> np.ndarray:
        """(size,) labels that nothing has."""
        first = len(self._parent)
        self._parent.extend(range(first, first + size))
        return np.arange(first, first + size)

    def find(self, label: int) -> int:
        """The label that stands for all that are united with ``label``."""
        parent = self._parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    def roots(self, labels: np.ndarray) -> np.ndarray:
        """``find`` of each element."""
        flat = [self.find(int(label)) for label in labels.reshape(-1)]
        return np.array(flat, np.int64).reshape(labels.shape)

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        """Unite labels element by element, with broadcasting."""
        for x, y in zip(*(array.reshape(-1).tolist() for array in np.broadcast_arrays(a, b)), strict=True):
            x, y = self.find(x), self.find(y)
            if x != y:
                self._parent[max(x, y)] = min(x, y)

    def unite_all(self, labels: np.ndarray) -> None:
        """Make one label of many."""
        if labels.size > 1:
            self.unite(labels.reshape(-1)[:1], labels.reshape(-1)[1:])

    def link(self, a: Line, b: Line) -> None:
        """Slice i of ``a`` and slice i of ``b`` are removed together."""
        if len(varied(a.labels)) <= 1 and len(varied(b.labels)) <= 1:
            self.unite(a.labels.reshape(-1), b.labels.reshape(-1))
        else:
            self.links.append((a, b))

    def freeze(self, labels: np.ndarray | None, reason: str) -> None:
        """None of these labels may be removed."""
        if labels is not None:
            self.frozen_labels.append((labels.reshape(-1), reason))

    def freeze_line(self, line: Line, reason: str) -> None:
        """No slice along this axis may be removed; slices along others may."""
        if len(varied(line.labels)) == 1:
            self.freeze(line.labels, reason)
        else:
            self.frozen_lines.append((line, reason))


def on_axis(labels: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """(n,) labels as the labelling of a tensor of this rank that has them along ``axis``."""
    shape = [1] * rank
    shape[axis] = len(labels)
    return labels.reshape(shape)


def varied(labels: np.ndarray | None) -> tuple[int, ...]:
    """The axes along which a labelling is not of size 1."""
    return () if labels is None else tuple(axis for axis, size in enumerate(labels.shape) if size != 1)


def padded(labels: np.ndarray, rank: int) -> np.ndarray:
    """With axes of size 1 in front, as broadcasting adds them."""
    return labels.reshape((1,) * (rank - labels.ndim) + labels.shape)


def collapsed(labels: np.ndarray) -> np.ndarray | None:
    """With size 1 on the axes along which all labels are the same; None where no axis is left."""
    for axis in varied(labels):
        first = labels.take([0], axis)
        if labels.shape[axis] and (labels == first).all():
            labels = first
    return labels if varied(labels) else None


Dim = int | str | None


def reshaped(labels: np.ndarray, source: Sequence[Dim], target: Sequence[Dim]) -> np.ndarray | None:
    """The labelling after a Reshape; None where the sizes do not tell where the elements go.

    The axes are cut into blocks with as many elements before as after, from the left as far as sizes are equal, and
    from the right. Blocks without labels may have any sizes.
    """
    before, after = list(source), list(target)
    head = _left_blocks(before, after)
    done_in = sum(len(a) for a, _ in head)
    done_out = sum(len(b) for _, b in head)
    tail = _left_blocks(before[done_in:][::-1], after[done_out:][::-1])
    tail = [(a[::-1], b[::-1]) for a, b in reversed(tail)]
    rest_in = before[done_in : len(before) - sum(len(a) for a, _ in tail)]
    rest_out = after[done_out : len(after) - sum(len(b) for _, b in tail)]
    blocks = [*head, (rest_in, rest_out), *tail]
    shape_in: list[int] = []
    shape_out: list[int] = []
    at = 0
    for ins, outs in blocks:
        here = labels.shape[at : at + len(ins)]
        at += len(ins)
        if all(size == 1 for size in here):
            shape_in += here
            shape_out += [1] * len(outs)
            continue
        numbers = [n for n in ins if isinstance(n, int)]
        new = [n for n in outs if isinstance(n, int)]
        if len(numbers) != len(ins) or len(new) != len(outs) or math.prod(numbers) != math.prod(new):
            return None
        shape_in += numbers
        shape_out += new
    return np.broadcast_to(labels, shape_in).reshape(shape_out)


def _left_blocks(before: Sequence[Dim], after: Sequence[Dim]) -> list[tuple[list[Dim], list[Dim]]]:
    """The longest run of blocks from the left whose sizes are known to be equal."""
    blocks: list[tuple[list[Dim], list[Dim]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        first, second = before[i], after[j]
        if first is not None and first == second:
            blocks.append(([first], [second]))
            i, j = i + 1, j + 1
            continue
        ins, outs = _equal_products(before[i:], after[j:])
        if not ins or not outs:
            break
        blocks.append((ins, outs))
        i, j = i + len(ins), j + len(outs)
    return blocks


def _equal_products(before: Sequence[Dim], after: Sequence[Dim]) -> tuple[list[Dim], list[Dim]]:
    """The shortest beginnings with equal products of numbers."""
    ins, outs, left, right = 0, 0, 1, 1
    while True:
        if ins and outs and left == right:
            return list(before[:ins]), list(after[:outs])
        if left <= right and ins < len(before) and isinstance(before[ins], int):
            left *= int(before[ins] or 0)
            ins += 1
        elif right <= left and outs < len(after) and isinstance(after[outs], int):
            right *= int(after[outs] or 0)
            outs += 1
        elif left < right or ins == len(before) or outs == len(after):
            return [], []
        else:
            return [], []


def lines(labels: np.ndarray | None) -> Iterable[Line]:
    """The axes of a labelling."""
    return [] if labels is None else [Line(labels, axis) for axis in varied(labels)]
