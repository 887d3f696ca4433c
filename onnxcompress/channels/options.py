"""What the user of ``prune-width`` can wish."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onnxcompress.errors import RecipeError

DEFAULT_LIMIT = 256
UNITS = {"k": 1e3, "m": 1e6, "g": 1e9}


@dataclass(frozen=True)
class Goal:
    """How much of something is left: a share of the original, or an amount."""

    kind: Literal["macs", "latency"]
    amount: float
    relative: bool

    def limit(self, original: float) -> float:
        return self.amount * original if self.relative else self.amount

    @property
    def text(self) -> str:
        unit = "x" if self.relative else " ms" if self.kind == "latency" else " MACs"
        return f"{self.amount:g}{unit} of the {self.kind}" if self.relative else f"{self.amount:g}{unit}"


def parse_goal(kind: Literal["macs", "latency"], text: str) -> Goal:
    """Read ``0.7x``, ``300M`` (MACs) or ``3.5ms`` (latency).

    Raises:
        RecipeError: It is none.
    """
    example = "0.7x or 300M" if kind == "macs" else "0.7x or 3.5ms"
    plain = text.strip().lower()
    relative = plain.endswith("x")
    factor = 1.0
    if relative:
        plain = plain[:-1]
    elif kind == "latency":
        if not plain.endswith("ms"):
            raise RecipeError(f"--latency {text!r}: expected {example}")
        plain = plain[:-2]
    elif plain[-1:] in UNITS:
        factor, plain = UNITS[plain[-1]], plain[:-1]
    try:
        amount = float(plain) * factor
    except ValueError:
        raise RecipeError(f"--{kind} {text!r}: expected {example}") from None
    if not 0 < amount < math.inf or (relative and amount >= 1):
        raise RecipeError(f"--{kind} {text!r}: expected {example}, more than 0{' and below 1x' if relative else ''}")
    return Goal(kind, amount, relative)


@dataclass(frozen=True)
class WidthOptions:
    """The user's wishes.

    Args:
        goal: What is to be reached; None only lists groups.
        data: Calibration samples, without labels; None ranks by weights.
        ranking: "data" or "magnitude"; auto takes data where there is any.
        compensate: Fit the weights that stay on the samples.
        round_to: Multiple of which the numbers of channels are.
        min_keep: Share of a group's channels that stays at least.
        skip: Patterns of groups, or of nodes that make their channels, which stay.
        only: The same of those that may go; all when empty.
        val: Labelled samples to measure on.
        metric: Figure on ``val``.
        optimize: Run the passes of ``optimize`` on the result.
        limit: Samples of ``data`` at most.
        batch: Samples in a run.
        preprocess: How images become inputs.
        threads: For timing.
        custom_ops: Shared library with custom operators.
        seed: Same seed, same result.
    """

    goal: Goal | None = None
    data: str | None = None
    ranking: Literal["auto", "data", "magnitude"] = "auto"
    compensate: bool = True
    round_to: int = 8
    min_keep: float = 0.1
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    val: str | None = None
    metric: str | None = None
    optimize: bool = True
    limit: int | None = None
    batch: int | None = None
    preprocess: str | None = None
    threads: int = 1
    custom_ops: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ranking == "data" and self.data is None:
            raise RecipeError("--ranking data needs --data")
        if self.metric is not None and self.val is None:
            raise RecipeError(f"--metric {self.metric} needs --val: labelled samples to measure it on")
        if self.round_to < 1:
            raise RecipeError(f"--round-to {self.round_to}: expected 1 or more")
        if not 0 <= self.min_keep < 1:
            raise RecipeError(f"--min-keep {self.min_keep:g}: expected 0 or more and below 1")

    @property
    def ranks_by_data(self) -> bool:
        return self.data is not None and self.ranking != "magnitude"
