"""One codebook for several layers: in a small network the codebooks themselves are much of the file.

Rows are brought to the same size by their factors, so that layers of very different weights have like sub-vectors; each
layer's sub-vectors count by what an error of its output does to the network. Kernels of depthwise convolutions are
unlike the sub-vectors of a matrix, and share codebooks among themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxcompress.codebook.fitting import cluster
from onnxcompress.codebook.objective import Assignment, damped_objective
from onnxcompress.codebook.scaling import round_scales
from onnxcompress.codebook.sweep import nearest_blockwise, sweep
from onnxcompress.codebook.target import energy

DAMPING = 0.1


@dataclass(frozen=True, eq=False)
class SharedCodebook:
    """Codewords as the file has them.

    Attributes:
        values: (k, d) int8.
        factors: (d,) float32.
    """

    values: np.ndarray
    factors: np.ndarray

    def codewords(self) -> np.ndarray:
        """(k, d) float32."""
        return np.asarray(self.values.astype(np.float32) * self.factors)


@dataclass(frozen=True, eq=False)
class Member:
    """A layer that shares a codebook.

    Attributes:
        weight: (outputs, D) float32.
        moments: (groups, D, D) covariance of its input; the identity without data.
        importance: Damage of an error that is as large as the layer's output.
    """

    weight: np.ndarray
    moments: np.ndarray
    importance: float


def shared_scales(target: np.ndarray) -> np.ndarray:
    """Root mean square of each row of (groups, rows, D), rounded to float16."""
    return round_scales(np.sqrt((target.astype(np.float64) ** 2).mean(axis=2)).astype(np.float32))


def fit_shared(members: Sequence[Member], block: int, codewords: int, *, seed: int) -> SharedCodebook:
    """Fit one codebook to all members.

    Args:
        members: At least one; each D is a multiple of ``block``.
        block: Length d of a sub-vector.
        codewords: How many.
        seed: Same seed, same codebook.
    """
    most = max(len(member.weight) // len(member.moments) for member in members)
    vectors, metrics, weights = [], [], []
    for member in members:
        objective = damped_objective(member.weight, member.moments, damping=DAMPING)
        scales = shared_scales(objective.target)
        found, own = objective.vectors(block, scales), objective.positions(block)
        weight = np.repeat(scales.astype(np.float64) ** 2, objective.target.shape[2] // block, axis=0)
        energy = float(np.einsum("sn,snd,sde,sne->", weight, found, own, found, optimize=True))
        weight *= member.importance / energy if energy > 0 else 0.0
        room = ((0, 0), (0, most - found.shape[1]))
        vectors.append(np.pad(found, (*room, (0, 0))))
        weights.append(np.pad(weight, room))
        metrics.append(own)
    whole = np.concatenate(weights)
    mean = float(whole[whole > 0].mean()) if (whole > 0).any() else 1.0
    clustering = cluster(
        np.concatenate(vectors),
        np.concatenate(metrics),
        codewords,
        seed=seed,
        weights=(whole / mean).astype(np.float32),
        sample=1 << 30,
    )
    factors = np.abs(clustering.codebook).max(axis=0).astype(np.float32) / np.float32(127)
    factors = np.where(factors > 0, factors, np.float32(1)).astype(np.float32)
    values = np.clip(np.rint(clustering.codebook / factors), -127, 127).astype(np.int8)
    return SharedCodebook(values, factors)


def shared_error(member: Member, shared: SharedCodebook, *, swept: bool) -> float:
    """Relative squared error of a layer's output,  tr(E C E') / tr(W C W'),  with a codebook that is given."""
    objective = damped_objective(member.weight, member.moments, damping=DAMPING)
    codewords, scales = shared.codewords(), shared_scales(objective.target)
    if swept:
        made = sweep(objective, codewords, scales)
    else:
        made = Assignment(codewords, nearest_blockwise(objective, codewords, scales), scales)
    target, weight = (rows.astype(np.float64) for rows in (objective.target, made.weight()))
    spread = energy(target, member.moments)
    return max(energy(target - weight, member.moments), 0.0) / spread if spread > 0 else 0.0
