"""Choose how each layer is stored, so that the whole fits a byte budget with the least damage (Shoham & Gersho 1988).

    minimize  sum of damage(layer, offer)   subject to   sum of size(layer, offer) <= budget,   one offer a layer

First the Lagrangian solution: on each layer's lower convex hull of damage over size, steps are taken by damage saved
per byte until the next one does not fit. It is off the optimum by less than that step. The rest is searched for
exactly: layer by layer, partial sums that are dominated, or whose linear bound exceeds the best sum known, are dropped.

References:
    Shoham & Gersho, Efficient bit allocation for an arbitrary set of quantizers, IEEE Trans. ASSP 36(9), 1988.
    Sinha & Zoltners, The multiple-choice knapsack problem, Operations Research 27(3), 1979.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_STATES = 4096  # partial sums kept a layer; beyond it those with the best bound, and exactness is lost
SLACK = 1e-9  # relative: a bound this near above the best sum may still be that sum, rounded


@dataclass(frozen=True)
class Offer:
    """One way to store a layer.

    Attributes:
        size_bytes: What it takes in the file.
        damage: How much worse the network's outputs get; not negative, added over the layers.
    """

    size_bytes: int
    damage: float


def pareto(offers: Sequence[Offer]) -> list[int]:
    """Numbers of the offers that no other beats in both, by rising size and falling damage."""
    found: list[int] = []
    order = sorted(range(len(offers)), key=lambda i: (offers[i].size_bytes, offers[i].damage, i))
    for index in order:
        if not found or offers[index].damage < offers[found[-1]].damage:
            found.append(index)
    return found


def convex_hull(offers: Sequence[Offer]) -> list[int]:
    """Numbers of the offers on the lower convex hull of damage over size, by rising size."""
    hull: list[int] = []
    for index in pareto(offers):
        while len(hull) > 1 and _slope(offers, hull[-2], hull[-1]) <= _slope(offers, hull[-1], index):
            hull.pop()
        hull.append(index)
    return hull


def _slope(offers: Sequence[Offer], small: int, large: int) -> float:
    """Damage saved per byte."""
    saved = offers[small].damage - offers[large].damage
    return saved / (offers[large].size_bytes - offers[small].size_bytes)


def smallest_size(layers: Sequence[Sequence[Offer]]) -> int:
    """Bytes below which no allocation comes."""
    return sum(min(offer.size_bytes for offer in offers) for offers in layers)


def totals(layers: Sequence[Sequence[Offer]], chosen: Sequence[int]) -> Offer:
    """Size and damage of a whole allocation."""
    picked = [offers[index] for offers, index in zip(layers, chosen, strict=True)]
    return Offer(sum(offer.size_bytes for offer in picked), sum(offer.damage for offer in picked))


def allocate(layers: Sequence[Sequence[Offer]], budget_bytes: int) -> list[int]:
    """The least damage within a budget.

    Args:
        layers: The offers of each layer, at least one.
        budget_bytes: Limit for the sum of sizes.

    Returns:
        The number of the chosen offer for each layer.

    Raises:
        ValueError: Nothing fits; ``smallest_size`` is what is needed.
    """
    least = smallest_size(layers)
    if least > budget_bytes:
        raise ValueError(f"a budget of {budget_bytes} bytes, at least {least} are needed")
    chosen = _lagrangian(layers, budget_bytes)
    return _improve(layers, budget_bytes, chosen)


def least_size_for_damage(layers: Sequence[Sequence[Offer]], damage: float) -> list[int]:
    """A small total size whose damage stays within a limit: the first such point of the Lagrangian path.

    Args:
        layers: The offers of each layer, at least one.
        damage: Limit; where no allocation meets it, the least damage there is.

    Returns:
        The number of the chosen offer for each layer.
    """
    chosen = [pareto(offers)[0] for offers in layers]
    for number, large, _ in _steps(layers):
        if totals(layers, chosen).damage <= damage:
            break
        chosen[number] = large
    return chosen


def _steps(layers: Sequence[Sequence[Offer]]) -> list[tuple[int, int, int]]:
    """(layer, offer, bytes added) for every step along the hulls, most damage saved per byte first."""
    steps = []
    for number, offers in enumerate(layers):
        hull = convex_hull(offers)
        for small, large in itertools.pairwise(hull):
            added = offers[large].size_bytes - offers[small].size_bytes
            steps.append((-_slope(offers, small, large), number, large, added))
    steps.sort()  # slopes of one hull fall strictly, so each layer's steps stay in order
    return [(number, large, added) for _, number, large, added in steps]


def _lagrangian(layers: Sequence[Sequence[Offer]], budget_bytes: int) -> list[int]:
    chosen = [pareto(offers)[0] for offers in layers]
    room = budget_bytes - totals(layers, chosen).size_bytes
    stopped: set[int] = set()
    for number, large, added in _steps(layers):
        if number in stopped:
            continue
        if added <= room:
            chosen[number] = large
            room -= added
        else:
            stopped.add(number)
    while True:  # what is left, by the largest saving that still fits
        best: tuple[float, int, int] | None = None
        for number, offers in enumerate(layers):
            now = offers[chosen[number]]
            for index, offer in enumerate(offers):
                saved = now.damage - offer.damage
                if saved > 0 and offer.size_bytes - now.size_bytes <= room and (best is None or saved > best[0]):
                    best = (saved, number, index)
        if best is None:
            return chosen
        _, number, index = best
        room -= layers[number][index].size_bytes - layers[number][chosen[number]].size_bytes
        chosen[number] = index


class _Bound:
    """The least damage of the layers from one on, as if offers could be mixed: convex and piecewise linear."""

    def __init__(self, layers: Sequence[Sequence[Offer]]) -> None:
        sizes = [smallest_size(layers)]
        damages = [sum(offers[pareto(offers)[0]].damage for offers in layers)]
        now = [pareto(offers)[0] for offers in layers]
        for number, large, added in _steps(layers):
            sizes.append(sizes[-1] + added)
            damages.append(damages[-1] - layers[number][now[number]].damage + layers[number][large].damage)
            now[number] = large
        self.least_bytes = sizes[0]
        self._sizes, self._damages = np.array(sizes, np.float64), np.array(damages)

    def __call__(self, room: np.ndarray) -> np.ndarray:
        return np.asarray(np.interp(room, self._sizes, self._damages))


def _improve(layers: Sequence[Sequence[Offer]], budget_bytes: int, chosen: list[int]) -> list[int]:
    """Search for anything better than a given allocation."""
    best = totals(layers, chosen).damage
    sizes, damages = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for number, offers in enumerate(layers):
        bound = _Bound(layers[number + 1 :])
        useful = np.array(pareto(offers))
        own_sizes = np.array([offers[i].size_bytes for i in useful], np.int64)
        own_damages = np.array([offers[i].damage for i in useful])
        new_sizes = (sizes[:, None] + own_sizes).reshape(-1)
        new_damages = (damages[:, None] + own_damages).reshape(-1)
        limits = new_damages + bound(budget_bytes - new_sizes)
        fits = (new_sizes + bound.least_bytes <= budget_bytes) & (limits <= best * (1 + SLACK))
        kept = np.flatnonzero(fits)
        kept = kept[np.lexsort((new_damages[kept], new_sizes[kept]))]
        below = np.minimum.accumulate(np.concatenate([[np.inf], new_damages[kept]]))[:-1]
        kept = kept[new_damages[kept] < below]
        if len(kept) > MAX_STATES:
            kept = np.sort(kept[np.argsort(limits[kept], kind="stable")[:MAX_STATES]])
        if not len(kept):
            return chosen
        sizes, damages = new_sizes[kept], new_damages[kept]
        trail.append((kept // len(useful), useful[kept % len(useful)]))
    state = int(np.argmin(damages))
    if damages[state] >= best:
        return chosen
    found: list[int] = []
    for parents, picked in reversed(trail):
        found.append(int(picked[state]))
        state = int(parents[state])
    return found[::-1]
