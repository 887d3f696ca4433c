"""One list of 256 levels for the numbers of many vectors, an error counting by how large its own vector is.

Lloyd's algorithm in one dimension, from levels as dense as the cube root of the weighted density (Panter & Dite 1951).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEVELS = 256
ROUNDS = 60


def fit_levels(vectors: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Find levels and give each number the nearest.

    Args:
        vectors: Of any shape, float, finite and within float16.

    Returns:
        (256,) float16 levels, ascending, and (n,) uint8, the level of each number of all vectors in turn.
    """
    values = np.concatenate([vector.reshape(-1) for vector in vectors]).astype(np.float64)
    distinct = np.unique(values.astype(np.float16))
    if len(distinct) <= LEVELS:
        return _numbered(values, np.pad(distinct, (0, LEVELS - len(distinct)), mode="edge"))
    powers = np.array([float(np.square(vector.astype(np.float64)).mean()) for vector in vectors])
    powers = np.maximum(powers, powers[powers > 0].min())  # zeros are to stay near zero
    weights = np.repeat(1 / powers, [vector.size for vector in vectors])
    levels = _start(values, weights)
    for _ in range(ROUNDS):
        numbers = _nearest(values, levels)
        whole = np.bincount(numbers, weights, LEVELS)
        moments = np.bincount(numbers, weights * values, LEVELS)
        moved = np.sort(np.divide(moments, whole, out=levels.copy(), where=whole > 0))
        if np.array_equal(moved, levels):
            break
        levels = moved
    return _numbered(values, np.sort(levels.astype(np.float16)))


def _start(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(256,) levels; between two neighbours the density is weight over gap, its cube root times the gap what counts."""
    order = np.argsort(values, kind="stable")
    ordered, weighed = values[order], weights[order]
    shares = np.cbrt((weighed[1:] + weighed[:-1]) / 2) * np.diff(ordered) ** (2 / 3)
    cumulative = np.concatenate([[0.0], np.cumsum(shares)])
    return np.asarray(np.interp((np.arange(LEVELS) + 0.5) / LEVELS * cumulative[-1], cumulative, ordered))


def _numbered(values: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return levels, _nearest(values, levels.astype(np.float64)).astype(np.uint8)


def _nearest(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return np.asarray(np.searchsorted((levels[1:] + levels[:-1]) / 2, values))
