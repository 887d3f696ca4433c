"""What is to be reached, and what may be lost: ``size=10x, drop=1%``.

size=10x      original bytes over the result's; or 5M, 800K, 43000: at most so many bytes
latency=0.5x  of the original's, measured here in turns; or 3ms
macs=0.5x     of the original's multiply-accumulates; or 300M
drop=1%       of the metric on labelled samples, else of the agreement with the original

A drop alone asks for the smallest file that loses no more.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from onnxcompress.errors import RecipeError

Key = Literal["size", "latency", "macs"]
KEYS = ("size", "latency", "macs", "drop")
EXAMPLES = {"size": "10x or 5M", "latency": "0.5x or 3ms", "macs": "0.5x or 300M", "drop": "1% or 0.01"}
_UNITS: dict[str, dict[str, float]] = {
    "size": {"": 1, "b": 1, "k": 1 << 10, "kb": 1 << 10, "m": 1 << 20, "mb": 1 << 20, "g": 1 << 30, "gb": 1 << 30},
    "latency": {"ms": 1, "us": 1e-3, "s": 1e3},
    "macs": {"": 1, "k": 1e3, "m": 1e6, "g": 1e9},
}
_NUMBER = re.compile(r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(x|%|[a-z]*)")


def closest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'drop'?`` where something known is near, else what there is."""
    names = list(known)
    found = difflib.get_close_matches(name.replace("_", "-"), names, n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else f"; there are {', '.join(names)}"


@dataclass(frozen=True)
class Limit:
    """What a figure may be at most.

    Attributes:
        key: The figure.
        amount: Bytes, milliseconds, multiply-accumulates, or a share of the original's.
        relative: Whether it is such a share; of a size 10x it is 0.1.
        text: As it was given.
    """

    key: Key
    amount: float
    relative: bool
    text: str

    def allowed(self, original: float) -> float:
        """In the figure's own unit."""
        return self.amount * original if self.relative else self.amount


@dataclass(frozen=True)
class Goal:
    """What is wished of a file; None is no wish.

    Attributes:
        size: Bytes.
        latency: Milliseconds.
        macs: Multiply-accumulates.
        drop: Largest drop.
    """

    size: Limit | None = None
    latency: Limit | None = None
    macs: Limit | None = None
    drop: float | None = None

    @property
    def limits(self) -> list[Limit]:
        """Those that are set, speed before size."""
        return [limit for limit in (self.macs, self.latency, self.size) if limit is not None]

    @property
    def is_smallest(self) -> bool:
        """Whether the smallest file within the drop is asked for."""
        return not self.limits

    @property
    def text(self) -> str:
        """As ``parse_goal`` reads it."""
        parts = [f"{limit.key}={limit.text}" for limit in (self.size, self.latency, self.macs) if limit is not None]
        return ", ".join(parts if self.drop is None else [*parts, f"drop={100 * self.drop:g}%"])


def parse_goal(text: str) -> Goal:
    """Read ``size=10x, drop=1%``.

    Raises:
        RecipeError: It is none; says what was meant.
    """
    given: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise RecipeError(f"goal {part!r}: expected KEY=VALUE as in size=10x{closest(key, KEYS)}")
        if key in given:
            raise RecipeError(f"goal {text!r}: {key} is given twice")
        given[key] = value
    return goal_of(given)


def goal_of(given: Mapping[str, Any]) -> Goal:
    """The same of a table.

    Raises:
        RecipeError: A key or a value is none.
    """
    unknown = next((key for key in given if key not in KEYS), None)
    if unknown is not None:
        raise RecipeError(f"goal: unknown key {unknown!r}{closest(unknown, KEYS)}")
    limits = {key: _limit(key, str(given[key])) for key in ("size", "latency", "macs") if key in given}
    drop = _drop(str(given["drop"])) if "drop" in given else None
    if not limits and drop is None:
        raise RecipeError("the goal says nothing to reach: size=10x, latency=0.5x or macs=0.5x, within drop=1%")
    return Goal(**limits, drop=drop)


def _limit(key: Any, text: str) -> Limit:
    wrong = f"{key}={text}: expected {EXAMPLES[key]}"
    found = _NUMBER.fullmatch(text.strip().lower())
    if not found:
        raise RecipeError(wrong)
    number, unit = float(found[1]), found[2]
    if unit != "x":
        factor = _UNITS[key].get(unit)
        if factor is None or not 0 < number * factor < math.inf:
            raise RecipeError(f"{wrong}{'' if factor is None else ', more than 0'}")
        return Limit(key, number * factor, False, text.strip())
    if key == "size":
        if number < 1:
            meant = f"; did you mean size={1 / number:g}x?" if number else ""
            raise RecipeError(f"size={text}: a ratio is original / result, at least 1{meant}")
        return Limit(key, 1 / number, True, text.strip())
    if not 0 < number <= 1:
        meant = f"; did you mean {key}={1 / number:g}x?" if number else ""
        raise RecipeError(f"{key}={text}: what is left of the original's, above 0 and at most 1x{meant}")
    return Limit(key, number, True, text.strip())


def _drop(text: str) -> float:
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(%?)", text.strip())
    share = float(found[1]) / (100 if found[2] else 1) if found else math.nan
    if not 0 <= share <= 1:
        meant = f"; did you mean drop={text}%?" if found and not found[2] else ""
        raise RecipeError(f"drop={text}: expected {EXAMPLES['drop']}, within 0 and 1{meant}")
    return share
