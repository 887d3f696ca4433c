"""What a network of so many blocks, channels and pixels costs, and which of those that are cheap enough is best.

Blocks, channels and pixels are integers, and the optimum is often on a bound: so all triples are listed with the exact
multiply-accumulates of the pruned graph. The conditions of Karush, Kuhn and Tucker are a cross-check: where the
optimum is inside, one more per cent of cost brings the same along each axis,

    x F_x / e_x  the same for d, w and r,    e_x = (ln C)' / (ln x)',

with e = (1, 2, 2) for the cost d w^2 r^2 of Wang et al. 2021, and as counted on the graph, which is something else
where an axis acts on a part of it only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcompress.train.scale.predictor import AXES, Predictor

PAPER_EXPONENTS = (1.0, 2.0, 2.0)
EFFICIENTNET = (math.log(1.2), 2 * math.log(1.1), 2 * math.log(1.15))  # Tan & Le 2019: shares of ln(cost)
Levels = tuple[int, int, int]
_LEAST = 1e-3  # size of an axis of which nothing is left, where it is a real number


@dataclass(frozen=True, eq=False)
class CostTable:
    """Cost of every triple of levels.

    Attributes:
        sizes: By axis, what is left at each level; level 0 is 1, everything.
        costs: (depths, widths, resolutions).
        original: What the goal is a share of.
        counted: Multiply-accumulates, where costs are something else.
    """

    sizes: tuple[tuple[float, ...], ...]
    costs: np.ndarray
    original: float
    counted: np.ndarray | None = None

    def size(self, levels: Levels) -> tuple[float, float, float]:
        d, w, r = (self.sizes[axis][level] for axis, level in enumerate(levels))
        return d, w, r

    def cost(self, levels: Levels) -> float:
        return float(self.costs[levels])

    def macs(self, levels: Levels) -> float:
        return float(self.costs[levels] if self.counted is None else self.counted[levels])

    def alone(self, axis: int) -> np.ndarray:
        """Costs of the levels of one axis, the others at everything."""
        index: list[Any] = [0, 0, 0]
        index[axis] = slice(None)
        return np.asarray(self.costs[tuple(index)])

    def place(self, levels: Levels, limit: float) -> tuple[float, float, float]:
        """Of each axis, the share of the wanted saving that it would bring alone, on a scale of logarithms."""
        whole = math.log(max(float(self.costs[0, 0, 0]), 1e-30) / limit)
        shares = []
        for axis, level in enumerate(levels):
            alone = self.alone(axis)
            shares.append(math.log(alone[0] / max(float(alone[level]), 1e-30)) / whole if whole > 0 else 0.0)
        return shares[0], shares[1], shares[2]

    def all_levels(self) -> Iterator[Levels]:
        for index in np.ndindex(*self.costs.shape):
            yield int(index[0]), int(index[1]), int(index[2])

    def within(self, limit: float, *, least: float = 0.0, last: Sequence[int] | None = None) -> list[Levels]:
        """Triples that cost no more than ``limit``, and no less than ``least``.

        Args:
            limit: Of the cost.
            least: Of the cost.
            last: Of each axis the last level to take: what was measured goes no further.
        """
        ends = last or [size - 1 for size in self.costs.shape]
        return [
            levels
            for levels in self.all_levels()
            if least <= self.costs[levels] <= limit and all(a <= b for a, b in zip(levels, ends, strict=True))
        ]

    def largest(self, triples: Sequence[Levels]) -> list[Levels]:
        """Those of the triples that none of the others has less pruned on every axis."""
        there = set(triples)

        def less(levels: Levels) -> Iterator[Levels]:
            d, w, r = levels
            yield from ((d - 1, w, r), (d, w - 1, r), (d, w, r - 1))

        return [levels for levels in triples if not any(other in there for other in less(levels))]

    def nearest(self, triples: Sequence[Levels], direction: Sequence[float], limit: float) -> Levels:
        """The triple in which the axes save in these proportions."""
        wanted = np.array(direction, np.float64)
        wanted = wanted / wanted.sum()

        def distance(levels: Levels) -> float:
            place = np.array(self.place(levels, limit))
            return float(np.sum((place / max(place.sum(), 1e-12) - wanted) ** 2))

        return min(triples, key=distance)


def last_level(alone: np.ndarray, limit: float) -> int:
    """Of one axis with these costs, the first level within the limit, or the cheapest one."""
    reaching = np.flatnonzero(alone <= limit)
    return int(reaching[0]) if len(reaching) else int(np.argmin(alone))


def step_levels(alone: np.ndarray, last: int, rounds: int) -> list[int]:
    """Levels of one axis in about equal steps of cost.

    Args:
        alone: Costs of its levels.
        last: The last of them.
        rounds: Steps at most.
    """
    if last == 0:
        return []
    start, end = float(alone[0]), float(alone[last])
    found: list[int] = []
    for number in range(1, rounds):
        wanted = start + (end - start) * number / rounds
        level = int(np.argmin(np.abs(alone[: last + 1] - wanted)))
        if 0 < level < last and level not in found:
            found.append(level)
    return sorted([*found, last])


@dataclass(frozen=True)
class AxisCheck:
    """The conditions at the chosen triple, for one axis.

    Attributes:
        axis: Its name.
        size: What is left of it.
        gain: x F_x / e_x with the exponent as counted.
        paper_gain: The same with the exponent of d w^2 r^2.
        exponent: As counted, between the neighbouring levels.
        bound: "unpruned" or "most pruned" where it is on a bound, else "".
    """

    axis: str
    size: float
    gain: float
    paper_gain: float
    exponent: float
    bound: str


@dataclass(frozen=True)
class CrossCheck:
    """What the conditions say of the chosen triple.

    Attributes:
        axes: Those that are pruned.
        interior: Whether no axis is on a bound.
        spread: (largest - smallest) / |mean| of the gains of the axes inside; NaN with fewer than two.
        continuous: Sizes of the best point with the cost d^a w^b r^c fitted to the counted one.
        continuous_figure: Predicted there by the product.
        chosen_figure: Predicted by the product at the chosen triple.
        exponents: The fitted a, b, c.
        model_error: Largest relative error of d w^2 r^2 over triples near the limit.
    """

    axes: list[AxisCheck]
    interior: bool
    spread: float
    continuous: tuple[float, float, float]
    continuous_figure: float
    chosen_figure: float
    exponents: tuple[float, float, float]
    model_error: float


def cross_check(
    table: CostTable, predictor: Predictor, chosen: Levels, limit: float, last: Mapping[str, int]
) -> CrossCheck:
    """Hold the chosen triple against the conditions for an optimum.

    Args:
        table: Costs.
        predictor: The fits; the product alone is looked at.
        chosen: Levels.
        limit: Of the cost.
        last: The last level of each axis that is pruned.
    """
    sizes = table.size(chosen)
    figure = float(predictor.product(np.array([sizes]))[0])
    checks = []
    for number, axis in enumerate(AXES):
        if axis not in last:
            continue
        level = chosen[number]
        exponent = _exponent(table, chosen, number, last[axis])
        fit = predictor.fits[axis]
        if predictor.form == "product":
            slope = figure * fit.slope(sizes[number]) / max(float(fit(sizes[number])), 1e-12)
        else:
            slope = fit.slope(sizes[number])
        gain = sizes[number] * slope
        bound = "unpruned" if level == 0 else "most pruned" if level == last[axis] else ""
        paper = PAPER_EXPONENTS[number]
        checks.append(AxisCheck(axis, sizes[number], gain / exponent, gain / paper, exponent, bound))
    inside = [check.gain for check in checks if not check.bound]
    spread = math.nan
    if len(inside) > 1 and np.mean(inside) != 0:
        spread = float((max(inside) - min(inside)) / abs(np.mean(inside)))
    near = table.within(1.1 * limit, least=0.8 * limit, last=[last.get(axis, 0) for axis in AXES])
    exponents = _exponents(table, near, last)
    point, value = _continuous(table, predictor, exponents, limit, last)
    return CrossCheck(
        checks,
        all(not check.bound for check in checks),
        spread,
        point,
        value,
        figure,
        exponents,
        _model_error(table, near),
    )


def _exponent(table: CostTable, levels: Levels, axis: int, last: int) -> float:
    """d ln C / d ln x between the neighbouring levels."""
    low, high = max(levels[axis] - 1, 0), min(levels[axis] + 1, last)
    while high > low and table.sizes[axis][high] <= 0:  # nothing of it is left: there is no logarithm
        high -= 1
    if high == low:
        return PAPER_EXPONENTS[axis]

    def at(level: int) -> tuple[float, float]:
        there: Any = tuple(level if a == axis else levels[a] for a in range(3))
        return math.log(table.sizes[axis][level]), math.log(max(float(table.costs[there]), 1e-30))

    (x0, y0), (x1, y1) = at(low), at(high)
    return (y1 - y0) / (x1 - x0) if x1 != x0 and y1 != y0 else PAPER_EXPONENTS[axis]


def _exponents(table: CostTable, near: Sequence[Levels], last: Mapping[str, int]) -> tuple[float, float, float]:
    """a, b, c of C = C0 d^a w^b r^c by least squares over triples near the limit."""
    found = list(PAPER_EXPONENTS)
    axes = [number for number, axis in enumerate(AXES) if axis in last]
    near = [levels for levels in near if min(table.size(levels)) > 0]
    if len(near) > len(axes):
        logs = np.array([[math.log(size) for size in table.size(levels)] for levels in near])[:, axes]
        costs = np.log(np.array([table.costs[levels] for levels in near]) / table.costs[0, 0, 0])
        for axis, exponent in zip(axes, np.linalg.lstsq(logs, costs, rcond=None)[0], strict=True):
            found[axis] = float(exponent)
    return found[0], found[1], found[2]


def _model_error(table: CostTable, near: Sequence[Levels]) -> float:
    """How far d w^2 r^2 is off at worst, relative to the counted cost."""
    errors = [
        float(np.prod(np.power(table.size(levels), PAPER_EXPONENTS)) * table.costs[0, 0, 0] / table.costs[levels] - 1)
        for levels in near
        if table.costs[levels] > 0
    ]
    return max(errors, key=abs) if errors else math.nan


def _continuous(
    table: CostTable,
    predictor: Predictor,
    exponents: Sequence[float],
    limit: float,
    last: Mapping[str, int],
    steps: int = 60,
) -> tuple[tuple[float, float, float], float]:
    """The best point of a fine grid with the cost as a product of powers."""
    grids = [
        np.linspace(max(table.sizes[number][last.get(axis, 0)], _LEAST), 1.0, steps if axis in last else 1)
        for number, axis in enumerate(AXES)
    ]
    points = np.stack([part.reshape(-1) for part in np.meshgrid(*grids, indexing="ij")], axis=1)
    costs = float(table.costs[0, 0, 0]) * np.prod(points ** np.array(exponents), axis=1)
    points = points[costs <= limit]
    if not len(points):
        return (math.nan, math.nan, math.nan), math.nan
    values = predictor.product(points)
    best = int(np.argmax(values if predictor.higher_is_better else -values))
    d, w, r = (float(size) for size in points[best])
    return (d, w, r), float(values[best])
