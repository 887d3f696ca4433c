"""Tables of numbers for each place of an image, brought to another resolution by linear interpolation."""

from __future__ import annotations

import itertools

import numpy as np

from onnxcompress.resolution.axes import Axes, Piece

MIN_NUMBERS = 8  # for each place; fewer are coordinates or masks, which mean what they are at one resolution


def why_no_table(axes: Axes) -> str | None:
    """The reason why a constant with these axes is not a table of learned positions, or None."""
    sides = [factor.side for axis in axes for piece in axis.pieces for factor in piece if factor.old != factor.new]
    if len(sides) != len(set(sides)):
        return "has several numbers for each pair of places"
    if not set(sides) <= {"rows", "columns"}:
        return "is tied to sizes that are not rows and columns of the image"
    others = [axis.old for axis in axes if not axis.changed]
    if max(others, default=1) < MIN_NUMBERS:
        return f"has fewer than {MIN_NUMBERS} numbers for each place, as coordinates and masks have"
    return None


def interpolated(values: np.ndarray, axes: Axes) -> np.ndarray:
    """A table at the new resolution.

    Args:
        values: Float, one axis for each of ``axes``, of its old length.
        axes: What they count.
    """
    result = values.astype(np.float64)
    for number, axis in enumerate(axes):
        if axis.changed:
            edges = np.cumsum([0, *(int(np.prod([f.old for f in piece])) for piece in axis.pieces)]).tolist()
            parts = [
                _piece(result.take(range(a, b), number), number, piece)
                for (a, b), piece in zip(itertools.pairwise(edges), axis.pieces, strict=True)
            ]
            result = np.concatenate(parts, number)
    return result.astype(values.dtype)


def _piece(values: np.ndarray, axis: int, piece: Piece) -> np.ndarray:
    shape = values.shape
    apart = values.reshape(*shape[:axis], *(f.old for f in piece), *shape[axis + 1 :])
    for i, factor in enumerate(piece):
        if factor.old != factor.new:
            weights = linear_weights(factor.old, factor.new)
            apart = np.moveaxis(np.tensordot(weights, apart, (1, axis + i)), 0, axis + i)
    return apart.reshape(*shape[:axis], -1, *shape[axis + 1 :])


def linear_weights(old: int, new: int) -> np.ndarray:
    """(new, old) float64: linear interpolation at half-pixel places, as Resize does it."""
    place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    low = np.minimum(place.astype(np.int64), max(old - 2, 0))
    weights = np.zeros((new, old))
    weights[np.arange(new), low] = 1 - (place - low)
    if old > 1:
        weights[np.arange(new), low + 1] += place - low
    return weights
