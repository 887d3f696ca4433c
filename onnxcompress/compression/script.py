"""Steps that a user wrote, in their order, or those of an earlier run."""

from __future__ import annotations

from collections.abc import Sequence

from onnxcompress.compression.attempts import Attempt, Attempts
from onnxcompress.compression.goal import Goal
from onnxcompress.compression.point import allowed_share, reached
from onnxcompress.compression.recipe import Step
from onnxcompress.compression.settings import GOALS
from onnxcompress.compression.strategy import brings
from onnxcompress.compression.wording import too_much_text
from onnxcompress.errors import OnnxCompressError, RecipeError


class StepError(OnnxCompressError):
    """A step that was written down cannot be done, and there is no goal that could be reached without it."""

    exit_code = 1


class Script:
    """Does the steps that a user wrote, in their order; those that cost more than they bring are backed out.

    Args:
        attempts: Does and measures steps.
        goal: Ends the run where it is reached; None runs all.
        steps: What to do.
    """

    def __init__(self, attempts: Attempts, goal: Goal | None, steps: Sequence[Step]) -> None:
        self.attempts, self.goal, self.steps = attempts, goal, steps
        self.original = attempts.original

    def run(self) -> Attempt:
        """The last attempt that was kept."""
        current = base = self.original
        for number, step in enumerate(self.steps, 1):
            if self.goal is not None and self.goal.limits and reached(self.goal, current.found, self.original.found):
                break
            base = base if step.verb == "finetune" else current
            found = self.attempts.attempt(
                self._with_goal(step, base, number), base, f"step {number} of the recipe", planned=False
            )
            if found.point is None and self.goal is None:
                raise StepError(f"step {number}, {step.text}: {found.failure}")
            base = found if found.point is not None else current
            if found.point is not None and self._keeps(found, current):
                current = found
        return current

    def _keeps(self, found: Attempt, current: Attempt) -> bool:
        """Whether a step stays; one that loses too much may be followed by training, which is judged with it."""
        drop = None if self.goal is None else self.goal.drop
        if not found.found.within(drop):
            assert drop is not None
            found.verdict = too_much_text(found.found, drop)
            return False
        if not brings(current.found, found.found, self.goal) and not wins_back(current, found, self.goal):
            found.verdict = "it brings nothing of what is wished"
            return False
        return True

    def _with_goal(self, step: Step, current: Attempt, number: int) -> Step:
        """A step without a goal gets what the goal of the recipe still needs."""
        if not GOALS[step.verb] or any(key in step.settings for key in GOALS[step.verb]):
            return step
        original = self.original.found
        for limit in [] if self.goal is None else self.goal.limits:
            if limit.key not in GOALS[step.verb] or current.found.meets(limit, original):
                continue
            if limit.key == "latency":
                share = allowed_share(limit, current.found) / current.found.latency_share
                return Step(step.verb, {**step.settings, "latency": f"{share:.4f}x"})
            return Step(step.verb, {**step.settings, limit.key: str(int(limit.allowed(original.figure(limit.key))))})
        if step.verb == "quantize" and self.goal is not None and self.goal.is_smallest:
            return Step(step.verb, {**step.settings, "max-drop": f"{self.goal.drop:g}"})
        if step.verb == "quantize":
            return step  # the smallest whose outputs are predicted to be off by 10 %
        names = " or ".join(GOALS[step.verb])
        raise RecipeError(f"step {number}, {step.verb}: nothing says how far: give it {names}, or the recipe a goal")


def wins_back(before: Attempt, found: Attempt, goal: Goal | None) -> bool:
    """Whether training lost less than there was before; without a goal, no more."""
    if found.step.verb != "finetune":
        return False
    if goal is None and found.found.drop is not None and before.found.drop is not None:
        return found.found.drop <= before.found.drop
    return found.found.loss < before.found.loss
