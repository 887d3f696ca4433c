"""The wishes for a compression, and its result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxcompress.compression.attempts import Attempt
from onnxcompress.compression.goal import Goal, parse_goal
from onnxcompress.compression.point import Point
from onnxcompress.compression.recipe import Recipe, Step
from onnxcompress.errors import RecipeError


@dataclass(frozen=True)
class CompressOptions:
    """The user's wishes.

    Args:
        goal: To be reached; None runs ``steps`` as they are.
        data: Samples, see ``onnxcompress.data``; "none" goes without.
        val: Labelled samples to judge by; a part of ``data`` when None.
        metric: Figure on labelled samples; top1 when None.
        preprocess: How images become inputs.
        limit: At most so many samples of ``data``.
        train: Whether a step may train or tune, which takes minutes.
        settings: Of planned steps, by verb.
        steps: In this order; planned when empty.
        seed: Same seed, same result.
        threads: For timing.
        jobs: Processes; None for one a processor.
        custom_ops: Shared library with custom operators.
        nearest: Write the nearest point where the goal cannot be reached.
        resume: Go on with a run that was stopped.
    """

    goal: Goal | None = None
    data: str = "none"
    val: str | None = None
    metric: str | None = None
    preprocess: str | None = None
    limit: int | None = None
    train: bool = True
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    steps: Sequence[Step] = ()
    seed: int = 0
    threads: int = 1
    jobs: int | None = None
    custom_ops: Path | None = None
    nearest: bool = False
    resume: bool = True

    def __post_init__(self) -> None:
        if self.goal is None and not self.steps:
            raise RecipeError("there is nothing to reach: give --goal 'size=10x, drop=1%', or a recipe with steps")
        if self.goal is not None and self.goal.drop is not None and self.data == "none" and self.val is None:
            raise RecipeError(f"a drop of {self.goal.drop:g} needs samples to measure it on: give --data or --val")
        if self.metric is not None and self.data == "none" and self.val is None:
            raise RecipeError(f"metric {self.metric} needs labelled samples: give --val")

    @property
    def recipe(self) -> Recipe:
        """What a recipe file would say."""
        names = ("data", "val", "metric", "preprocess", "limit", "seed", "threads", "jobs", "train")
        wishes = {name: getattr(self, name) for name in names}
        if self.custom_ops is not None:
            wishes["custom-ops"] = str(self.custom_ops)
        return Recipe(self.goal, wishes, self.settings, self.steps)


def options_from(recipe: Recipe, goal: str | None = None, **wishes: Any) -> CompressOptions:
    """A recipe's options; what is given beside it and is not None wins."""
    found = {key.replace("-", "_"): value for key, value in recipe.wishes.items()}
    found |= {key: value for key, value in wishes.items() if value is not None}
    if found.get("custom_ops") is not None:
        found["custom_ops"] = Path(found["custom_ops"])
    chosen = recipe.goal if goal is None else parse_goal(goal)
    return CompressOptions(goal=chosen, settings=recipe.settings, steps=recipe.steps, **found)


@dataclass
class CompressResult:
    """What ``compress`` did.

    Attributes:
        source: Name of the input.
        output: Where the result is; None where none was written.
        goal: In words; "" without one.
        met: Whether it was reached.
        standing: Where the result stands in what was wished.
        original: Figures of the input.
        result: Figures of the result, or of the nearest point.
        attempts: All steps that were tried.
        chain: Those that the result stands on.
        samples: That judged.
        recipe: As a file that repeats the run.
        seconds: Wall time.
        notes: What the user should know.
    """

    source: str
    output: Path | None
    goal: str
    met: bool
    standing: str
    original: Point
    result: Point
    attempts: list[Attempt]
    chain: list[Attempt]
    samples: int
    recipe: str
    seconds: float
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has neither NaN nor infinity."""
        found = {
            "input": self.source,
            "output": None if self.output is None else str(self.output),
            "goal": self.goal,
            "goal_met": self.met,
            "standing": self.standing,
            "samples": self.samples,
            "before": self.original.as_dict(),
            "after": self.result.as_dict(),
            "size_ratio": round(self.original.size_bytes / self.result.size_bytes, 4),
            "steps": [attempt.number for attempt in self.chain],
            "attempts": [attempt.as_dict() for attempt in self.attempts],
            "recipe": self.recipe,
            "seconds": round(self.seconds, 3),
            "notes": self.notes,
        }
        plain: dict[str, Any] = _finite(found)
        return plain


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
