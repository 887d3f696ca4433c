"""``prune-scale``: prune depth, width and resolution of an .onnx file together.

    ladders    in which order blocks and channels go, and how many pixels can; the MACs of every triple
    collect    networks pruned along each axis alone, in rounds, and a few that are pruned along several
    predict    the figure of every triple, by a product of three fits and what the others say of it
    race       the most promising triples within the goal, each trained for a while
    train      the original pruned to the best of them, fitted, trained with distillation; the better one stays
    merge      the ordinary passes; onnxruntime confirms the result

Ladders, points and the training are kept in the checkpoint folder: a run that was stopped goes on with the same
command.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from onnxcompress.optimizer import check_target
from onnxcompress.train.scale.collecting import point_at
from onnxcompress.train.scale.deciding import Decider
from onnxcompress.train.scale.finishing import Finisher, StepSay
from onnxcompress.train.scale.forecasting import forecast
from onnxcompress.train.scale.given import Given
from onnxcompress.train.scale.laddering import kept_ladders
from onnxcompress.train.scale.options import Decision, Point, Progress, ScaleOptions, ScalePlan, ScaleResult
from onnxcompress.train.scale.solving import Levels
from onnxcompress.train.scale.space import Space

Say = Callable[[Progress], None]


def prune_scale(
    source: Path,
    output: Path,
    options: ScaleOptions,
    *,
    chosen: Levels | None = None,
    progress: Say | None = None,
    steps: StepSay | None = None,
) -> ScaleResult:
    """Prune a model file along several axes.

    Args:
        source: The model.
        output: Where the result goes; may be ``source``.
        options: How.
        chosen: A triple of levels to prune to, without looking for one.
        progress: Told where the run stands.
        steps: Called after each step of the last training.

    Raises:
        RecipeError: The settings conflict with each other, the model or a checkpoint.
        DataError: The data does not fit the model, or there is none.
        ModelError: The model cannot be read, or holds an operator that cannot be trained through.
        BudgetError: The goal is out of reach.
        TrainingError: The loss is no number any more.
        EquivalenceError: onnxruntime does not confirm the result.
    """
    check_target(output)
    folder = options.checkpoint or output.with_name(f"{output.name}.checkpoint")
    with Given(source, options) as given:
        return Job(given, folder, progress, steps).run(output, chosen)


def plan_scale(source: Path, options: ScaleOptions, *, progress: Say | None = None) -> ScalePlan:
    """What ``prune_scale`` would do; nothing is written."""
    with tempfile.TemporaryDirectory(prefix="onnxcompress-") as folder, Given(source, options) as given:
        return Job(given, Path(folder), progress).plan()


class Job:
    """One model on its way.

    Args:
        given: Model and samples.
        folder: For the state of the run.
        progress: Told where the run stands.
        steps: Called after each step of the last training.

    Attributes:
        space: The triples that can be chosen.
        decider: Chooses one.
    """

    def __init__(self, given: Given, folder: Path, progress: Say | None = None, steps: StepSay | None = None) -> None:
        self.given, self.folder, self.steps = given, folder, steps
        self.start = time.monotonic()
        self._told = progress or (lambda now: None)
        goal = given.options.goal
        assert goal is not None
        if given.options.threads:
            torch.set_num_threads(given.options.threads)
        self.say("reading the model")
        self.ladders = kept_ladders(given, goal, folder / "ladders.json", self.say)
        self.space = Space(given, self.ladders, goal, folder, self.say)
        self.decider = Decider(self.space, folder, self._told)

    def say(self, text: str) -> None:
        self._told(Progress(text, 0, 0, None))

    def run(self, output: Path, chosen: Levels | None = None) -> ScaleResult:
        """Choose, train and write; with ``chosen`` that triple."""
        finisher = Finisher(self.given, self.ladders, self.space.limit, self.folder, self.say, self.steps)
        if chosen is not None:
            found = finisher.finish(output, finisher.race([point_at(self.space.table, "finalist", chosen)]), None)
        else:
            decision = self.decide()
            trained = finisher.race(self.finalists(decision))
            found = finisher.finish(output, trained, self.decider.settled(decision, trained.levels))
        return replace(found, seconds=time.monotonic() - self.start)

    def decide(self) -> Decision:
        """Collect points, fit, and choose."""
        return self.decider.decide()

    def finalists(self, decision: Decision) -> list[Point]:
        """Networks to train to the end."""
        triples = [point.levels for point in decision.candidates[: self.given.options.finalists]] or [decision.chosen]
        return [point_at(self.space.table, "finalist", levels) for levels in triples]

    def plan(self) -> ScalePlan:
        """What a run would do."""
        self.say("timing a step and a fit")
        return forecast(self.space)
