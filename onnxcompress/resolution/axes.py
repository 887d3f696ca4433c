"""Axes of tensors at two resolutions: how long each was, how long it will be, and what it is made of.

An axis is a run of *pieces*, one behind the other, as a class token and the patches of an image are. A piece is a
product of *factors*, the outermost first: 49 patches are 7 rows of 7 columns. So it is known what becomes of an axis
that a Reshape made of others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# free: a size that the file leaves open; a number stands for it here and is never written.
Side = Literal["rows", "columns", "free", ""]


@dataclass(frozen=True)
class Factor:
    """A part of an axis.

    Attributes:
        old: Length at the old resolution.
        new: Length at the new one.
        side: What it counts: rows or columns of the image, or something else.
    """

    old: int
    new: int
    side: Side = ""


Piece = tuple[Factor, ...]


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor."""

    pieces: tuple[Piece, ...]

    @property
    def old(self) -> int:
        return sum(math.prod(factor.old for factor in piece) for piece in self.pieces)

    @property
    def new(self) -> int:
        return sum(math.prod(factor.new for factor in piece) for piece in self.pieces)

    @property
    def changed(self) -> bool:
        return self.factors_changed or self.old != self.new

    @property
    def factors_changed(self) -> bool:
        return any(factor.old != factor.new for piece in self.pieces for factor in piece)

    @property
    def is_free(self) -> bool:
        """Whether its length is left open."""
        return any(factor.side == "free" for piece in self.pieces for factor in piece)

    @property
    def side(self) -> Side:
        """Rows or columns, where it counts nothing else that changes."""
        sides = {factor.side for piece in self.pieces for factor in piece if factor.side in ("rows", "columns")}
        return sides.pop() if len(sides) == 1 and not self.is_free else ""


Axes = tuple[Axis, ...]


def axis_of(old: int, new: int | None = None, side: Side = "") -> Axis:
    """An axis of one factor; of the same length at both resolutions unless ``new`` is given."""
    return Axis(((Factor(old, old if new is None else new, side),),))


def fixed(shape: Sequence[int]) -> Axes:
    """Axes that no resolution changes."""
    return tuple(axis_of(size) for size in shape)


def joined(parts: Sequence[Axis]) -> Axis:
    """One behind the other."""
    pieces: list[Piece] = []
    for part in parts:
        plain = [_is_plain(piece) for piece in (*pieces[-1:], part.pieces[0])]
        if len(plain) == 2 and all(plain):
            old = sum(math.prod(f.old for f in piece) for piece in (pieces[-1], part.pieces[0]))
            pieces[-1:] = [(Factor(old, old),), *part.pieces[1:]]
        else:
            pieces += part.pieces
    return Axis(tuple(pieces))


def _is_plain(piece: Piece) -> bool:
    return all(factor.side == "" and factor.old == factor.new for factor in piece)


def cut(axis: Axis, start: int, end: int) -> Axis | None:
    """What stands from ``start`` to ``end`` of the old length, where it is whole pieces or parts of fixed ones."""
    found: list[Axis] = []
    at = 0
    for piece in axis.pieces:
        length = math.prod(factor.old for factor in piece)
        low, high = max(start, at), min(end, at + length)
        if low < high:
            if high - low == length:
                found.append(Axis((piece,)))
            elif _is_plain(piece):
                found.append(axis_of(high - low))
            else:
                return None
        at += length
    return joined(found) if found else None


def regrouped(axes: Axes, target: Sequence[int]) -> Axes | None:
    """The axes after a Reshape to the old sizes ``target``; None where the sizes do not tell what goes where.

    Where a part of the image is cut, the inner part keeps its length, as windows and pixel blocks do.
    """
    parts: list[Axis] = []
    for axis in axes:
        if len(axis.pieces) > 1:
            parts.append(axis)
        else:
            for factor in axis.pieces[0]:
                if factor.old == factor.new == 1:
                    continue
                last = parts[-1].pieces[0][0] if parts and len(parts[-1].pieces) == 1 else None
                if last is not None and last.side == "" == factor.side and _is_plain((last, factor)):
                    parts[-1] = axis_of(last.old * factor.old)
                else:
                    parts.append(Axis(((factor,),)))
    found = []
    for size in target:
        taken, parts_left = _take(parts, size)
        if taken is None:
            return None
        found.append(taken)
        parts = parts_left
    return tuple(found) if not parts else None


def _take(parts: list[Axis], size: int) -> tuple[Axis | None, list[Axis]]:
    """The parts from the left with ``size`` elements, and those that are left."""
    if parts and len(parts[0].pieces) > 1 and parts[0].old == size:
        return parts[0], parts[1:]
    rest, left, factors = list(parts), size, []
    while rest and left > 1:
        part = rest[0]
        # Behind a product with others, a class token and patches are only a number.
        factor = part.pieces[0][0] if len(part.pieces) == 1 else Factor(part.old, part.new)
        if left % factor.old == 0:
            factors.append(factor)
            left //= factor.old
            rest = rest[1:]
            continue
        inner, over = divmod(factor.old, left)
        if over or factor.new % inner or factor.side == "free" or len(part.pieces) > 1:
            return None, parts
        factors.append(Factor(left, factor.new // inner, factor.side))
        rest = [axis_of(inner), *rest[1:]]
        left = 1
    return (Axis((tuple(factors) or (Factor(1, 1),),)), rest) if left == 1 else (None, parts)
