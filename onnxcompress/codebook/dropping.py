"""Look for the smallest file whose quality drops by no more than is allowed.

A drop grows about as the root of the damage that a plan is made for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from onnxcompress.codebook.options import DEFAULT_ERROR

MAX_TRIALS = 6  # files made on the way
NEAR_ENOUGH = 0.7  # of the drop that is allowed, used up
CLOSE = 1.3  # factor between a damage that is allowed and one that is not, from which on the search ends


@dataclass
class DropSearch:
    """Which damage to try next.

    Attributes:
        limit: The drop that is allowed.
        damage: To plan for now.
        good: The largest damage that was allowed.
        bad: The smallest that was not.
        trials: How many were tried.
    """

    limit: float
    damage: float = DEFAULT_ERROR**2
    good: float = 0.0
    bad: float = math.inf
    trials: int = 0
    done: bool = False

    def tell(self, drop: float) -> bool:
        """Take in what the drop was at this damage; returns whether it is allowed."""
        self.trials += 1
        allowed = drop <= self.limit
        if allowed:
            self.good = self.damage
            self.done = drop >= NEAR_ENOUGH * self.limit and drop > 0
        else:
            self.bad = self.damage
        self.done = self.done or self.bad <= self.good * CLOSE or self.trials >= MAX_TRIALS
        self.damage = next_damage(self.damage, drop, self.limit, self.good, self.bad)
        return allowed


def next_damage(damage: float, drop: float, limit: float, good: float, bad: float) -> float:
    """The damage to try next: by the root law, kept inside of what is known."""
    factor = (limit / drop) ** 2 if drop > 0 else 16.0
    wanted = damage * min(max(factor, 1 / 64), 16.0)
    if bad < math.inf and good > 0:
        return math.sqrt(good * bad)
    if bad < math.inf:
        return min(wanted, bad / 2)
    return max(wanted, good * 2)
