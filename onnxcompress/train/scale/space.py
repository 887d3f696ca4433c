"""What can be chosen from: all triples of levels of a model, what each costs, and which keep a goal."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxcompress.channels.options import Goal
from onnxcompress.cost import count
from onnxcompress.errors import RecipeError
from onnxcompress.graph import Graph
from onnxcompress.train.depth.costs import merge
from onnxcompress.train.depth.offers import BudgetError
from onnxcompress.train.scale.axes import Ladders, count_all, structure
from onnxcompress.train.scale.estimating import Measurements, MergedMacs
from onnxcompress.train.scale.finishing import compare
from onnxcompress.train.scale.given import Given
from onnxcompress.train.scale.options import Point
from onnxcompress.train.scale.predictor import AXES
from onnxcompress.train.scale.solving import Levels, last_level
from onnxcompress.train.scale.timing import LatencyTable

logger = logging.getLogger(__name__)

TRIALS = 16  # triples that are built or timed before the goal is given up


class Space:
    """The triples of one model.

    Args:
        given: Model and samples.
        ladders: Of its prepared graph.
        goal: What is to be kept.
        folder: Where measurements are kept.
        say: Told what is being done.

    Attributes:
        table: Multiply-accumulates or milliseconds of every triple once it is merged, estimated.
        limit: What a triple may cost.
    """

    def __init__(self, given: Given, ladders: Ladders, goal: Goal, folder: Path, say: Callable[[str], None]) -> None:
        self.given, self.ladders, self.goal = given, ladders, goal
        counted = count_all(given.graph, ladders, float(given.figures.macs))
        run = hashlib.sha256(json.dumps([given.identity(), ladders.as_dict()], sort_keys=True).encode()).hexdigest()
        kept = Measurements(folder / f"{goal.kind}.json", run, resume=given.options.resume)
        self._costs: LatencyTable | MergedMacs
        if goal.kind == "latency":
            self._costs = LatencyTable(counted, self.merged, lambda path: compare(given, path), kept, say)
        else:
            self._costs = MergedMacs(counted, lambda levels: count(self.merged(levels)).macs, kept, say)
        self.table = self._costs.table
        self.limit = goal.limit(self.table.original)

    @property
    def axes(self) -> list[str]:
        """Those with more than one level."""
        return [axis for number, axis in enumerate(AXES) if self.table.costs.shape[number] > 1]

    def ends(self) -> dict[str, int]:
        """By axis the level at which it alone keeps the goal: merged, a graph may have more MACs than are counted."""
        found = {}
        for number, axis in enumerate(AXES):
            alone = self.table.alone(number)
            level = last_level(alone, self.limit)
            for deeper in range(level, min(len(alone), level + TRIALS)):
                d, w, r = (deeper if number == other else 0 for other in range(3))
                if alone[deeper] <= self.limit and self.is_within((d, w, r)):
                    level = deeper
                    break
            found[axis] = level
        return found

    def last(self, points: Mapping[str, Sequence[Point]]) -> dict[str, int]:
        """By axis the last level that is measured."""
        return {axis: max(p.levels[AXES.index(axis)] for p in found) for axis, found in points.items() if found}

    def triples(self, points: Mapping[str, Sequence[Point]]) -> list[Levels]:
        """Triples within the goal, as far as the points on the axes go.

        Raises:
            BudgetError: There is none.
            RecipeError: The goal is reached without pruning.
        """
        if self.table.cost((0, 0, 0)) <= self.limit:
            raise RecipeError(f"{self.goal.text} is reached without pruning: onnxcompress optimize does it")
        last = self.last(points)
        ends = [last.get(axis, 0) for axis in AXES]
        found = self.table.within(self.limit, last=ends)
        if not found:
            end: Any = tuple(ends)
            least = float(self.table.costs[end])
            raise BudgetError(
                f"{self.goal.text} is out of reach: with all that can go from {', '.join(last) or 'no axis'}, "
                f"{self.goal.kind} is {least / self.table.original:.3f}x, allowed "
                f"{self.limit / self.table.original:.3f}x; lower --min-keep or --round-to"
            )
        return found

    def coordinates(self, triples: Sequence[Levels]) -> tuple[np.ndarray, np.ndarray]:
        """(n, 3) sizes and (n, 3) places of triples."""
        sizes = np.array([self.table.size(levels) for levels in triples])
        return sizes, np.array([self.table.place(levels, self.limit) for levels in triples])

    def real_cost(self, levels: Levels) -> float:
        """What the merged graph at a triple costs, counted or timed."""
        found = self._costs.measured(levels)
        logger.info("levels %s: %s %.4g, %.4g by the table", levels, self.goal.kind, found, self.table.cost(levels))
        return found

    def is_within(self, levels: Levels) -> bool:
        """Whether the real graph at a triple keeps the goal."""
        return self.real_cost(levels) <= self.limit

    def without(self, triples: Sequence[Levels], levels: Levels) -> list[Levels]:
        """Triples that may keep the goal although one of them does not.

        What is merged where blocks have gone may have more multiply-accumulates than are counted, and has so at other
        widths and resolutions as well.
        """
        cost = self.table.cost(levels) * self.limit / self.real_cost(levels)
        return [
            one
            for one in triples
            if one != levels and self.table.cost(one) <= (cost if one[0] == levels[0] else self.limit)
        ]

    def merged(self, levels: Levels) -> Graph:
        """The structure at a triple, merged; with the weights of the original."""
        return merge(structure(self.given.graph, self.ladders, levels), runtime=self.given.runtime)
