"""What the stages that look at a whole row minimize:  tr((T - W) H (T - W)'),  H the damped covariance of the input.

Few rows know little about D^2 covariances, and neighbouring positions of one picture are no independent rows. Damping
adds a part of the mean diagonal, so that what calibration did not see is not taken for free.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from onnxcompress.codebook.target import by_group


@dataclass(frozen=True)
class Assignment:
    """Codebook, indices and factors while they are fitted, all in the shape that the arithmetic likes.

    Attributes:
        codebook: (k, d) float32.
        indices: (groups, outputs / group, D / d) intp.
        scales: (groups, outputs / group) float32, ones where the layer has none.
    """

    codebook: np.ndarray
    indices: np.ndarray
    scales: np.ndarray

    def weight(self) -> np.ndarray:
        """(groups, outputs / group, D) float32."""
        groups, rows, _ = self.indices.shape
        return np.asarray(self.codebook[self.indices].reshape(groups, rows, -1) * self.scales[:, :, None])


@dataclass(frozen=True, eq=False)
class Objective:
    """Target and metric of one layer.

    Attributes:
        target: (groups, outputs / group, D) float32.
        hessian: (groups, D, D) float64, positive definite, mean diagonal about 1.
    """

    target: np.ndarray
    hessian: np.ndarray

    @cached_property
    def hessian32(self) -> np.ndarray:
        return self.hessian.astype(np.float32)

    def error(self, assignment: Assignment) -> float:
        """The objective: product in float32, sum in float64."""
        differences = self.target - assignment.weight()
        return float(np.einsum("god,god->", differences @ self.hessian32, differences, dtype=np.float64))

    def positions(self, block: int) -> np.ndarray:
        """(groups * D / d, d, d) float64: the diagonal blocks of the Hessian."""
        groups, length, _ = self.hessian.shape
        count = length // block
        tiles = self.hessian.reshape(groups, count, block, count, block)
        return np.asarray(np.einsum("gjajb->gjab", tiles)).reshape(groups * count, block, block)

    def vectors(self, block: int, scales: np.ndarray) -> np.ndarray:
        """(groups * D / d, outputs / group, d) float32: the target's sub-vectors, each row over its factor."""
        groups, rows, length = self.target.shape
        inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
        scaled = (self.target * inverse[:, :, None]).reshape(groups, rows, length // block, block)
        return np.ascontiguousarray(scaled.transpose(0, 2, 1, 3)).reshape(-1, rows, block)


def damped_objective(target: np.ndarray, covariance: np.ndarray, *, damping: float) -> Objective:
    """Build the objective.

    Args:
        target: (outputs, D).
        covariance: (groups, D, D) float64.
        damping: Added to the diagonal, as a part of its mean.

    Returns:
        The objective, its Hessian divided by the mean diagonal of the covariance.
    """
    groups, length, _ = covariance.shape
    mean_diagonal = float(np.einsum("gdd->", covariance)) / (groups * length)
    if mean_diagonal <= 0:
        hessian = np.broadcast_to(np.eye(length), covariance.shape).copy()
    else:
        hessian = covariance / mean_diagonal + max(damping, 1e-6) * np.eye(length)
    return Objective(by_group(target, groups).astype(np.float32), hessian)


def to_positions(indices: np.ndarray) -> np.ndarray:
    """(groups, rows, D / d) as (groups * D / d, rows), the order of ``Objective.vectors``."""
    return np.ascontiguousarray(indices.transpose(0, 2, 1)).reshape(-1, indices.shape[1])


def from_positions(indices: np.ndarray, groups: int) -> np.ndarray:
    """The inverse of ``to_positions``."""
    return np.ascontiguousarray(indices.reshape(groups, -1, indices.shape[1]).transpose(0, 2, 1))
