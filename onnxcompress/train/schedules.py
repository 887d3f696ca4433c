"""How the learning rate moves over a run: a factor of the base rate as a function of the step, and of nothing else.

cosine      up over the warm-up, then half a cosine down to 0 (Loshchilov & Hutter 2017)
linear      up over the warm-up, then straight down to 0
constant    up over the warm-up, then 1
onecycle    1/25 to 1 along a cosine over 30 % of the steps, then down to 1/250000 (Smith & Topin 2018); no warm-up
"""

from __future__ import annotations

import math
from collections.abc import Callable

from onnxcompress.errors import RecipeError

Schedule = Callable[[int], float]

NAMES = ("cosine", "linear", "constant", "onecycle")

_RISE = 0.3
_FIRST = 1 / 25
_LAST = 1 / 250_000


def make_schedule(name: str, total: int, warmup: float = 0.0) -> Schedule:
    """The factor for each step from 0 to ``total - 1``.

    Args:
        name: One of ``NAMES``.
        total: Number of steps.
        warmup: Share of the steps over which the factor climbs to 1 in equal strides; never 0, so that no step is void.

    Raises:
        RecipeError: There is no such schedule, or the share is not in [0, 1).
    """
    if name not in NAMES:
        raise RecipeError(f"schedule {name!r} is unknown: choose {', '.join(NAMES)}")
    if not 0 <= warmup < 1:
        raise RecipeError(f"warm-up {warmup:g}: expected a share of the steps, 0 or more and below 1")
    if name == "onecycle":
        rise = max(1, round(_RISE * total))
        return lambda step: _one_cycle(step, rise, total)
    climb = round(warmup * total)
    rest = max(1, total - climb)

    def factor(step: int) -> float:
        if step < climb:
            return (step + 1) / climb
        done = min(1.0, (step - climb) / rest)
        if name == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1 - done if name == "linear" else 1.0

    return factor


def _one_cycle(step: int, rise: int, total: int) -> float:
    low, high, done = (_FIRST, 1.0, step / rise) if step < rise else (1.0, _LAST, (step - rise) / max(1, total - rise))
    return low + (high - low) * 0.5 * (1 - math.cos(math.pi * min(1.0, done)))
