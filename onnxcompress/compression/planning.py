"""What a run would do, before it does it: steps, why, and what the verbs' own dry runs expect of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onnxcompress.compression.goal import Goal, Limit
from onnxcompress.compression.options import CompressOptions
from onnxcompress.compression.recipe import Step
from onnxcompress.compression.settings import Shared, options_of
from onnxcompress.compression.steps import needs_torch
from onnxcompress.compression.strategy import LEAST_TO_TRAIN, Means
from onnxcompress.errors import OnnxCompressError
from onnxcompress.runtime import Runtime

Say = Callable[[str], None]


@dataclass(frozen=True)
class Planned:
    """One step that may come.

    Attributes:
        step: What would be done.
        when: It comes, in words.
        why: It is planned.
        expected: By the verb's own dry run, or in words.
    """

    step: Step
    when: str
    why: str
    expected: str

    def as_dict(self) -> dict[str, Any]:
        return {"verb": self.step.verb, "settings": {**self.step.settings}, **_without_step(self)}


def _without_step(planned: Planned) -> dict[str, Any]:
    return {key: value for key, value in asdict(planned).items() if key != "step"}


@dataclass(frozen=True)
class Plan:
    """What would be done.

    Attributes:
        source: The input file.
        goal: In words.
        steps: In the order in which they would be tried; the run ends where the goal is reached.
        notes: What the user should know.
    """

    source: str
    goal: str
    steps: list[Planned]
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "input": self.source,
            "goal": self.goal,
            "steps": [planned.as_dict() for planned in self.steps],
            "notes": self.notes,
        }


def make_plan(path: Path, options: CompressOptions, means: Means, shared: Shared, runtime: Runtime, say: Say) -> Plan:
    """The plan for a model; nothing is written."""
    goal_text = "" if options.goal is None else options.goal.text
    if options.steps:
        written = [
            Planned(step, "in its turn", f"step {number} of the recipe", _torch_missing(step, means))
            for number, step in enumerate(options.steps, 1)
        ]
        return Plan(str(path), goal_text, written)
    assert options.goal is not None
    planner = _Planner(path, options.goal, options, means, shared, runtime, say)
    return Plan(str(path), goal_text, planner.steps(), planner.notes)


def _torch_missing(step: Step, means: Means) -> str:
    return "needs torch, which is not there" if needs_torch(step) and not means.torch else ""


class _Planner:
    def __init__(
        self,
        path: Path,
        goal: Goal,
        options: CompressOptions,
        means: Means,
        shared: Shared,
        runtime: Runtime,
        say: Say,
    ) -> None:
        self.path, self.goal, self.options, self.means, self.shared = path, goal, options, means, shared
        self.runtime, self.say = runtime, say
        self.notes: list[str] = []

    def steps(self) -> list[Planned]:
        found, before, after, latency = self._exact()
        for limit in (self.goal.macs, self.goal.latency):
            if limit is not None:
                if limit.key == "macs" and after.macs <= limit.allowed(before.macs):
                    continue
                if limit.key == "macs":
                    start = after.macs / max(before.macs, 1)
                else:
                    start = 1.0 if latency is None else min(1.0, 1 / latency.ratio)
                found += self._speed(limit, start)
        if self.goal.is_smallest:
            return found + self._smallest()
        size = self.goal.size
        if size is not None and after.size_bytes > size.allowed(before.size_bytes):
            found += self._size(int(size.allowed(before.size_bytes)))
        return found

    def _exact(self) -> tuple[list[Planned], Any, Any, Any]:
        from onnxcompress.optimizer import optimize

        step = self._step("optimize", {})
        self.say("optimizing, to see what exact rewrites bring")
        done = optimize(
            self.path, None, options=options_of("optimize", step.settings, self.shared), runtime=self.runtime
        )
        expected = (
            f"{done.before.size_bytes:,} -> {done.after.size_bytes:,} bytes, {done.before.macs:,} -> "
            f"{done.after.macs:,} MACs"
        )
        if done.latency is not None:
            expected += f", {1 / done.latency.ratio:.2f}x latency"
        return [Planned(step, "first", "exact rewrites lose nothing", expected)], done.before, done.after, done.latency

    def _speed(self, limit: Limit, start: float) -> list[Planned]:
        """Fewer MACs or less time; ``start`` is what exact rewrites leave."""
        if not self.means.data:
            self.notes.append(f"{limit.key}={limit.text} is left to exact rewrites: pruning needs samples (--data)")
            return []
        wish: dict[str, Any] = {limit.key: f"{limit.amount:g}x" if limit.relative else limit.text}
        halfway: dict[str, Any] = {limit.key: f"{math.sqrt(limit.amount * start):.3g}x"} if limit.relative else wish
        found = []
        when = f"if {limit.key} is above {limit.text} then"
        width = self._step("prune-width", wish)
        expected = (
            self._expected(self._width, width) if limit.key == "macs" else "MACs are lowered until it is measured"
        )
        found.append(Planned(width, when, "channels, fitted without training", expected))
        if self.means.torch:
            step = self._step("prune-depth", {**self.means.fits_alone, **wish})
            when = "beside it" if self.goal.drop is None else "if that loses too much"
            why = "blocks, likewise; of both the one that loses less is kept"
            found.append(Planned(step, when, why, self._expected(self._depth, step)))
        if self.goal.drop is not None:
            if self.means.torch:
                half = self._step("prune-depth", {**self.means.fits_alone, **halfway})
                found.append(
                    Planned(half, "if both lose too much", "half of the way by blocks, and channels for the rest", "")
                )
            if self.means.can_train:
                learning = {key: value for key, value in self.means.training.items() if key != "stages"}
                tuned = self._step("finetune", learning)
                found.append(Planned(tuned, "if that loses too much", "training wins back what fits cannot", ""))
                trained = self._step("prune-depth", {**wish, **self.means.training})
                found.append(Planned(trained, "if that does", "blocks, trained while they are still whole", ""))
                scaled = self._step("prune-scale", {**wish, **learning})
                together = "blocks, channels and pixels together"
                found.append(Planned(scaled, "if even that does", together, "takes longest"))
            elif self.means.torch and self.options.train:
                self.notes.append(f"no training is planned: {self.means.fitted} samples, it takes {LEAST_TO_TRAIN}")
        return found

    def _smallest(self) -> list[Planned]:
        assert self.goal.drop is not None
        step = self._step("quantize", {"max-drop": f"{self.goal.drop:g}"})
        found = [Planned(step, "then", "the smallest file within the drop", "files of several sizes are made")]
        if self._can_tune:
            tuned = self._step("quantize", {"size": "SIZE", "tune": "joint"})
            found.append(Planned(tuned, "then", "smaller ones, all codebooks tuned together", "about two minutes each"))
        return found

    @property
    def _can_tune(self) -> bool:
        told = self.options.settings.get("quantize", {})
        return self.means.data and self.means.torch and self.options.train and "tune" not in told

    def _size(self, size: int) -> list[Planned]:
        step = self._step("quantize", {"size": str(size)})
        expected = self._expected(self._quantize, step)
        found = [Planned(step, "then", "codebooks within the bytes that are wished", expected)]
        if self.means.data:
            narrow = self._step("prune-width", {"macs": "0.7x"})
            found.append(Planned(narrow, "if the size is out of reach", "fewer channels, then codebooks again", ""))
        if self.goal.drop is not None and self._can_tune:
            tuned = self._step("quantize", {"size": str(size), "tune": "joint"})
            found.append(Planned(tuned, "if that loses too much", "all codebooks tuned together", "about two minutes"))
        return found

    def _step(self, verb: str, settings: dict[str, Any]) -> Step:
        return Step(verb, {**settings, **self.options.settings.get(verb, {})})

    # -- dry runs ----------------------------------------------------------------------------------------------------

    def _expected(self, ask: Callable[[Step], str], step: Step) -> str:
        self.say(f"estimating what {step.verb} brings")
        try:
            return ask(step)
        except OnnxCompressError as error:
            return f"not to be had: {error}"

    def _quantize(self, step: Step) -> str:
        from onnxcompress.codebook.quantizer import quantize

        options = options_of("quantize", step.settings, self.shared, dry_run=True)
        found = quantize(self.path, None, options, runtime=self.runtime)
        return f"{found.after_bytes:,} bytes ({found.ratio:.2f}x), outputs off by {found.predicted_error:.2g}"

    def _width(self, step: Step) -> str:
        from onnxcompress.channels.pruning import prune_width

        found = prune_width(
            self.path, None, options_of("prune-width", step.settings, self.shared), runtime=self.runtime
        )
        return f"{found.macs[0]:,} -> {found.macs[1]:,} MACs"

    def _depth(self, step: Step) -> str:
        from onnxcompress.train.depth.pruning import plan_depth

        options = options_of("prune-depth", step.settings, self.shared)
        found = plan_depth(self.path, options)
        places = len({offer.block.add or offer.name for offer in found.offers})
        low, high = found.macs
        text = f"{places} blocks on offer, {low:,.0f} to {high:,.0f} MACs"
        if found.latency_ms is not None:
            text += f", {found.latency_ms[0]:.3f} to {found.latency_ms[1]:.3f} ms"
        return text
