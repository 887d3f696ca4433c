"""The accuracy of a network pruned in depth, width and resolution, predicted from a few pruned ones.

As in Wang et al. 2021 (Accelerate CNNs from Three Dimensions, ICML, arXiv 2010.04879) with rank 1: a product of
polynomials,

    F(d, w, r) = H1(d) H2(w) H3(r) / a0^2,

where Hi is what pruning along one axis alone leaves of the figure a0 of the original. Points on the axes tell nothing
about a second term of the product, so three fits in one variable are all there is to do. Each goes through the unpruned
point, its degree has the smallest leave-one-out error, and its curvature is shrunk a little.

Points off the axes show how far the product is off. Their residuals correct it as a Gaussian process does: near to
them by about what they say, far from them by nothing, and less the more a figure is due to chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

AXES = ("depth", "width", "resolution")
HIGHEST_DEGREE = 3
LENGTH = 0.4  # over which residuals look alike, where the way from nothing to all of the saving is 1
# Of the coefficients of pruned, pruned^2 and pruned^3, in units of the most that was pruned. Of 5 points of curves of
# five kinds with noise of 0.003 to 0.015, errors were 2 to 15 % smaller than without it.
SHRINKAGE = (0.0, 0.02, 0.25)


@dataclass(frozen=True)
class AxisFit:
    """What pruning along one axis alone leaves.

    Attributes:
        axis: One of ``AXES``.
        sizes: What is left of the axis at each point, the unpruned one first: 1 is all.
        figures: Measured there.
        degree: Of the polynomial.
        coefficients: Of the figure as a polynomial of the size, constant first.
        loo_error: Root mean square leave-one-out error over the pruned points; NaN with fewer than two of them.
        candidates: That error by degree that was tried.
    """

    axis: str
    sizes: tuple[float, ...]
    figures: tuple[float, ...]
    degree: int
    coefficients: tuple[float, ...]
    loo_error: float
    candidates: dict[str, float]

    def __call__(self, size: np.ndarray | float) -> np.ndarray:
        return np.asarray(np.polynomial.polynomial.polyval(size, np.array(self.coefficients)))

    def slope(self, size: float) -> float:
        """The derivative."""
        derived = np.polynomial.polynomial.polyder(np.array(self.coefficients))
        return float(np.polynomial.polynomial.polyval(size, derived))

    def as_dict(self) -> dict[str, Any]:
        return {
            "axis": self.axis,
            "sizes": list(self.sizes),
            "figures": list(self.figures),
            "degree": self.degree,
            "coefficients": list(self.coefficients),
            "loo_error": self.loo_error,
            "candidates": dict(self.candidates),
        }


def fit_axis(axis: str, sizes: Sequence[float], figures: Sequence[float]) -> AxisFit:
    """Fit one axis.

    Args:
        axis: Its name.
        sizes: Of the points, the unpruned one, 1, first.
        figures: Measured there; one point alone makes a constant.
    """
    pruned = 1.0 - np.array(sizes, np.float64)
    y = np.array(figures, np.float64)
    reach = float(pruned.max()) or 1.0
    errors = {
        degree: _leave_one_out(pruned / reach, y, degree) for degree in range(1, min(HIGHEST_DEGREE, len(y) - 1) + 1)
    }
    # The first of equals, and with one pruned point a line.
    degree = min(errors, key=lambda d: (errors[d], d) if math.isfinite(errors[d]) else (math.inf, d)) if errors else 0
    powers = _fit(pruned / reach, y, degree) / reach ** np.arange(degree + 1)
    coefficients: np.ndarray = np.zeros(1)  # sum a_k (1 - x)^k in powers of x
    for power in powers[::-1]:
        coefficients = np.polynomial.polynomial.polymul(coefficients, [1.0, -1.0])
        coefficients = np.polynomial.polynomial.polyadd(coefficients, [power])
    padded = np.pad(coefficients, (0, max(0, degree + 1 - len(coefficients))))[: degree + 1]
    return AxisFit(
        axis,
        tuple(float(size) for size in sizes),
        tuple(float(figure) for figure in figures),
        degree,
        tuple(float(c) for c in padded),
        errors.get(degree, math.nan),
        {str(tried): error for tried, error in errors.items()},
    )


def _fit(pruned: np.ndarray, y: np.ndarray, degree: int) -> np.ndarray:
    """(degree + 1,) coefficients of powers of what is pruned, in units of the most that was; curvature is shrunk."""
    powers = pruned[1:, None] ** np.arange(1, degree + 1)
    shrinkage = np.diag(SHRINKAGE[:degree])
    found = np.linalg.lstsq(powers.T @ powers + shrinkage, powers.T @ (y[1:] - y[0]), rcond=None)[0]
    return np.concatenate([y[:1], found])


def _leave_one_out(pruned: np.ndarray, y: np.ndarray, degree: int) -> float:
    """Over the pruned points; the unpruned one is known, whatever is to be predicted."""
    if len(y) < 3:
        return math.nan
    errors = []
    for out in range(1, len(y)):
        left = np.arange(len(y)) != out
        powers = _fit(pruned[left], y[left], degree)
        errors.append(y[out] - float(pruned[out] ** np.arange(degree + 1) @ powers))
    return float(np.sqrt(np.mean(np.square(errors))))


@dataclass(frozen=True)
class Residuals:
    """Where the product was measured to be off, and by how much.

    Attributes:
        places: (n, 3) for each axis its share of the wanted saving, see ``solving.CostTable.place``.
        residuals: (n,) measured less predicted.
        noise: Standard deviation of a figure.
        spread: Standard deviation of what the product is off by, in the prior.
    """

    places: np.ndarray
    residuals: np.ndarray
    noise: float
    spread: float

    def correction(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) expected residuals at (n, 3) places, and their standard deviations."""
        if not len(self.residuals) or self.spread == 0:
            return np.zeros(len(places)), np.full(len(places), self.spread)
        own = self._kernel(self.places, self.places) + self.noise**2 * np.eye(len(self.places))
        cross = self._kernel(places, self.places)
        solved = np.linalg.solve(own, np.column_stack([self.residuals, cross.T]))
        variance = self.spread**2 - np.einsum("nm,mn->n", cross, solved[:, 1:])
        return cross @ solved[:, 0], np.sqrt(np.clip(variance, 0.0, None))

    def _kernel(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        squares = ((a[:, None, :] - b[None, :, :]) ** 2).sum(axis=2)
        return np.asarray(self.spread**2 * np.exp(-0.5 * squares / LENGTH**2))


@dataclass(frozen=True)
class Predictor:
    """The product of three fits, and its correction.

    Attributes:
        base: Figure of the original.
        fits: By axis; an axis that is not pruned has none.
        higher_is_better: Which way is up.
        correction: From points off the axes; None before there are any.
    """

    base: float
    fits: Mapping[str, AxisFit]
    higher_is_better: bool = True
    correction: Residuals | None = None

    @property
    def form(self) -> str:
        """A figure that is small when it is good, or nothing, is no share of the original's: losses add up."""
        return "product" if self.higher_is_better and self.base > 0 else "sum"

    def product(self, sizes: np.ndarray) -> np.ndarray:
        """(n,) predicted by the fits alone for (n, 3) sizes."""
        sizes = np.atleast_2d(np.asarray(sizes, np.float64))
        found = np.full(len(sizes), self.base)
        for axis, fit in self.fits.items():
            values = fit(sizes[:, AXES.index(axis)])
            found = found * values / self.base if self.form == "product" else found + values - self.base
        return found

    def predict(self, sizes: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) figures and their standard deviations for (n, 3) sizes at (n, 3) places."""
        found = self.product(sizes)
        if self.correction is None:
            return found, np.zeros(len(found))
        shift, deviation = self.correction.correction(np.atleast_2d(places))
        return found + shift, deviation

    def best(self, sizes: np.ndarray, places: np.ndarray, *, hope: float = 0.0) -> int:
        """Number of the best of these; ``hope`` counts so many standard deviations as gained."""
        values, deviation = self.predict(sizes, places)
        score = values + hope * deviation if self.higher_is_better else hope * deviation - values
        return int(np.argmax(score))


def corrected(
    predictor: Predictor, sizes: np.ndarray, places: np.ndarray, figures: np.ndarray, *, noise: float
) -> Predictor:
    """The predictor with the residuals of measured points, those on the axes among them.

    Args:
        predictor: The fits.
        sizes: (n, 3) of the points.
        places: (n, 3).
        figures: (n,) measured.
        noise: Standard deviation of a figure by the number of samples alone.
    """
    residuals = np.asarray(figures, np.float64) - predictor.product(sizes)
    errors = [fit.loo_error for fit in predictor.fits.values() if math.isfinite(fit.loo_error)]
    found = max([noise, *(0.5 * error for error in errors)])
    # What the residuals are more than noise, and at least a little: two agreeing points are no proof of the product.
    off = float(np.mean(residuals**2)) if len(residuals) else 0.0
    spread = math.sqrt(max(off - found**2, 0.25 * found**2, 1e-12))
    held = Residuals(np.asarray(places, np.float64), residuals, found, spread)
    return Predictor(predictor.base, predictor.fits, predictor.higher_is_better, held)
