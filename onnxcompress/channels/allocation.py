"""Which channels of which groups go, within a budget of multiply-accumulates.

Greedy: of the next steps of all groups the one is done that costs least for each MAC that it saves now. A step takes as
many channels as leave a multiple, because other counts run no faster: 8 by default, less where a group would have fewer
than four steps. MACs are those of the real pruned graph (``MacsModel`` gives the same number).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxcompress.channels.groups import Channels, Group, MacsModel
from onnxcompress.channels.ranking import Ranking
from onnxcompress.errors import OnnxCompressError

MIN_STEPS = 4


class BudgetError(OnnxCompressError):
    """What was asked for cannot be reached by removing channels."""

    exit_code = 1


@dataclass(frozen=True)
class Allocation:
    """What goes.

    Attributes:
        removed: Indices of channels by group name.
        macs: What is left.
        cost: Sum of the costs.
    """

    removed: dict[str, list[int]]
    macs: int
    cost: float


@dataclass(frozen=True)
class Limits:
    """How far a group may shrink.

    Args:
        round_to: Elements of a tensor's axis to keep a multiple of.
        min_keep: Share of a group's channels that stays at least.
    """

    round_to: int = 8
    min_keep: float = 0.1

    def counts(self, group: Group) -> list[int]:
        """Numbers of channels to keep, from all of them down."""
        unit = self.unit(group)
        least = max(unit, math.ceil(self.min_keep * group.size), 1)
        first = (group.size - 1) // unit * unit
        return [group.size, *(n for n in range(first, 0, -unit) if n >= least)]

    def unit(self, group: Group) -> int:
        """Channels of a step."""
        unit = max(1, self.round_to // math.gcd(self.round_to, group.width))
        while unit > 1 and group.size < MIN_STEPS * unit:
            unit = unit // 2 if unit % 2 == 0 else 1
        return unit


class _State:
    """What is gone so far."""

    def __init__(self, channels: Channels, model: MacsModel, rankings: Mapping[str, Ranking], limits: Limits) -> None:
        self.channels, self.model, self.rankings = channels, model, rankings
        self.groups = [g for g in channels.groups if not g.frozen and g.name in rankings]
        self.counts = {group.name: limits.counts(group) for group in self.groups}
        self.level = {group.name: 0 for group in self.groups}
        self.gone = np.zeros(channels.count + 1, bool)
        self.macs = model.macs_of(self.gone)

    def step(self, group: Group) -> tuple[list[int], float] | None:
        """The next channels of a group to go, and their cost."""
        counts, level = self.counts[group.name], self.level[group.name]
        if level + 1 >= len(counts):
            return None
        ranking = self.rankings[group.name]
        chosen = slice(group.size - counts[level], group.size - counts[level + 1])
        cost = float(ranking.costs[chosen].sum())
        return ([int(i) for i in ranking.order[chosen]], cost) if math.isfinite(cost) else None

    def saving(self, group: Group, indices: list[int]) -> float:
        atoms = [group.atoms[i] for i in indices]
        before = self.model.macs_near(self.gone, group)
        self.gone[atoms] = True
        after = self.model.macs_near(self.gone, group)
        self.gone[atoms] = False
        return before - after

    def take(self, group: Group, indices: list[int]) -> None:
        self.gone[[group.atoms[i] for i in indices]] = True
        self.level[group.name] += 1
        self.macs = self.model.macs_of(self.gone)

    def allocation(self) -> Allocation:
        removed, cost = {}, 0.0
        for group in self.groups:
            count = group.size - self.counts[group.name][self.level[group.name]]
            if count:
                ranking = self.rankings[group.name]
                removed[group.name] = sorted(int(i) for i in ranking.order[:count])
                cost += float(ranking.costs[:count].sum())
        return Allocation(removed, round(self.macs), cost)


def allocate(
    channels: Channels, rankings: Mapping[str, Ranking], budget_macs: float, limits: Limits | None = None
) -> Allocation:
    """Choose the channels to remove.

    Args:
        channels: Of the graph.
        rankings: Of the groups that may be pruned.
        budget_macs: Largest number of MACs.
        limits: How far groups may shrink.

    Raises:
        BudgetError: Not reachable; names the nearest.
    """
    model = MacsModel(channels)
    state = _State(channels, model, rankings, limits or Limits())
    start = state.macs
    while state.macs > budget_macs:
        best: tuple[float, int] | None = None
        for number, group in enumerate(state.groups):
            step = state.step(group)
            if step is None:
                continue
            saved = state.saving(group, step[0])
            if saved <= 0:
                continue
            score = step[1] / saved
            if best is None or score < best[0]:
                best = (score, number)
        if best is None:
            raise BudgetError(
                f"{budget_macs:,.0f} MACs cannot be reached by removing channels: {state.macs:,.0f} "
                f"({state.macs / start:.3f}x) is the least of {start:,.0f}; lower --min-keep or --round-to"
            )
        group = state.groups[best[1]]
        step = state.step(group)
        assert step is not None
        state.take(group, step[0])
    _give_back(state, budget_macs)
    return state.allocation()


def _give_back(state: _State, budget_macs: float) -> None:
    """The last step saved more than was needed: what fits comes back, the most costly first."""
    while True:
        offers = []
        for group in state.groups:
            level = state.level[group.name]
            if not level:
                continue
            counts = state.counts[group.name]
            chosen = slice(group.size - counts[level - 1], group.size - counts[level])
            ranking = state.rankings[group.name]
            atoms = [group.atoms[int(i)] for i in ranking.order[chosen]]
            state.gone[atoms] = False
            macs = state.model.macs_of(state.gone)
            state.gone[atoms] = True
            if macs <= budget_macs:
                offers.append((float(ranking.costs[chosen].sum()), group, atoms, macs))
        if not offers:
            return
        _, group, atoms, macs = max(offers, key=lambda offer: offer[0])
        state.gone[atoms] = False
        state.level[group.name] -= 1
        state.macs = macs
