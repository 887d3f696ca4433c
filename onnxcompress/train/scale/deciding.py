"""Choose a triple: networks along each axis and a few off them, a predictor of all the others, and a race."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxcompress.train.depth.offers import BudgetError
from onnxcompress.train.scale.collecting import Collector, axis_points, point_at
from onnxcompress.train.scale.options import Decision, Point, Progress
from onnxcompress.train.scale.predictor import AXES, Predictor, corrected, fit_axis
from onnxcompress.train.scale.racing import candidates, in_order, neighbours
from onnxcompress.train.scale.solving import Levels, cross_check
from onnxcompress.train.scale.space import TRIALS, Space
from onnxcompress.train.supervision import Supervision
from onnxcompress.train.torch_graph import TorchGraph

HOPE = 1.0  # standard deviations that a candidate is credited with
_NEIGHBOURS = 2  # of the best candidate that are trained before it is looked at again


class Decider:
    """The way from a space of triples to the ones that are worth a whole training.

    Args:
        space: Of the model.
        folder: For the points.
        told: Where the run stands.

    Attributes:
        predictor: What the decision was made by.
    """

    def __init__(self, space: Space, folder: Path, told: Callable[[Progress], None]) -> None:
        self.space, self.given, self.table = space, space.given, space.table
        self.options, self.folder, self._told = space.given.options, folder, told
        self.predictor: Predictor | None = None

    def decide(self) -> Decision:
        """Collect points, fit, and choose."""
        start = time.monotonic()
        options, given = self.options, self.given
        points = axis_points(self.table, self.space.ends(), options)
        self.space.triples(points)  # before anything is trained
        several = len([axis for axis in points if points[axis]]) > 1
        total = sum(map(len, points.values())) + (options.mixed + options.candidates if several else 0)
        identity = given.identity() | {"mixed": options.mixed}
        with Collector(given, self.space.ladders, self.folder, identity, total, self._told) as collector:
            measured: dict[str, list[Point]] = {axis: [] for axis in points}
            for number in range(max(map(len, points.values()), default=0)):
                wanted = [
                    (found[number], found[number - 1] if number else None, options.round_epochs)
                    for found in points.values()
                    if number < len(found)
                ]
                for point in collector.collect(wanted):
                    measured[point.axis].append(point)
            supervision = given.supervise(TorchGraph(given.graph))
            base = supervision.figure(given.original, given.judged, given.device)
            mixed: list[Point] = []
            predictor = self._predictor(supervision, base, measured, mixed)
            for _ in range(options.mixed if several else 0):
                levels = self._next(predictor, measured, mixed)
                if levels is None:
                    break
                epochs = options.round_epochs * options.rounds
                mixed += collector.collect([(point_at(self.table, "mixed", levels), None, epochs)])
                predictor = self._predictor(supervision, base, measured, mixed)
            self.predictor = predictor
            chosen = self._choose(predictor, points)
            raced: list[Point] = []
            if several and options.candidates > 1:
                raced = self._race(collector, predictor, chosen, measured, mixed)
            if raced:
                chosen = raced[0].levels
        return self._decision(supervision, predictor, measured, mixed, raced, chosen, time.monotonic() - start)

    def _race(
        self,
        collector: Collector,
        predictor: Predictor,
        best: Levels,
        measured: Mapping[str, Sequence[Point]],
        mixed: Sequence[Point],
    ) -> list[Point]:
        """The most promising triples, trained for a while; the best one first."""
        everything = [*itertools.chain.from_iterable(measured.values()), *mixed]
        triples = self.table.largest(self.space.triples(measured))
        count, epochs = self.options.candidates, self.options.round_epochs * self.options.rounds
        chosen = candidates(count, best, everything, triples, predictor, self.space.coordinates, self.space.is_within)
        there = {point.levels: point for point in mixed}
        raced = [there[one] for one in chosen if one in there]
        wanted = [one for one in chosen if one not in there]
        before: Levels | None = None
        while True:
            collector.total = len(everything) + sum(point.axis == "candidate" for point in raced) + len(wanted)
            raced += collector.collect([(point_at(self.table, "candidate", one), None, epochs) for one in wanted])
            raced = in_order(raced, higher_is_better=predictor.higher_is_better)
            triples = self.table.largest(self.space.triples(measured))  # timed triples move the others
            wanted = [] if raced[0].levels == before else self._near(raced, triples, predictor)
            if not wanted:
                return raced
            before = raced[0].levels

    def _near(self, raced: Sequence[Point], triples: Sequence[Levels], predictor: Predictor) -> list[Levels]:
        """The most promising neighbours of the best candidate that are not raced yet."""
        known = {point.levels for point in raced}
        near = [one for one in neighbours(raced[0].levels, triples, self.space.coordinates) if one not in known]
        found: list[Levels] = []
        while near and len(found) < _NEIGHBOURS:
            levels = near.pop(predictor.best(*self.space.coordinates(near)))
            if self.space.is_within(levels):
                found.append(levels)
        return found

    def _predictor(
        self,
        supervision: Supervision,
        base: float,
        measured: Mapping[str, Sequence[Point]],
        mixed: Sequence[Point],
    ) -> Predictor:
        assert supervision.metric is not None
        fits = {
            axis: fit_axis(
                axis,
                [1.0, *(point.sizes[AXES.index(axis)] for point in found)],
                [base, *(point.figure for point in found)],
            )
            for axis, found in measured.items()
            if found
        }
        predictor = Predictor(base, fits, supervision.metric.higher_is_better)
        everything = [*itertools.chain.from_iterable(measured.values()), *mixed]
        if not everything:
            return predictor
        figures, samples = np.array([point.figure for point in everything]), len(self.given.judged.dataset)
        chance = 0.0
        if supervision.metric.higher_is_better and (figures >= 0).all() and (figures <= 1).all():
            # Of a share of samples; other figures say themselves, by the fits, how much chance there is in them.
            share = float(figures.mean())
            chance = math.sqrt(max(share * (1 - share), 0.25 / samples) / samples)
        sizes, places = self.space.coordinates([point.levels for point in everything])
        return corrected(predictor, sizes, places, figures, noise=chance)

    def _next(
        self,
        predictor: Predictor,
        measured: Mapping[str, Sequence[Point]],
        mixed: Sequence[Point],
    ) -> Levels | None:
        """The next triple to measure off the axes: the equal split, then the most promising ones."""
        known = {point.levels for found in (*measured.values(), mixed) for point in found}
        largest = self.table.largest(self.space.triples(measured))
        free = [levels for levels in largest if levels not in known and sum(map(bool, levels)) > 1]
        if not free:
            return None
        if not mixed:
            return self.table.nearest(
                free, [1.0 if axis in self.space.axes else 0.0 for axis in AXES], self.space.limit
            )
        return free[predictor.best(*self.space.coordinates(free), hope=HOPE)]

    def _choose(self, predictor: Predictor, points: Mapping[str, Sequence[Point]]) -> Levels:
        """The best triple whose real graph keeps the goal."""
        left = self.space.triples(points)
        for _ in range(TRIALS):
            largest = self.table.largest(left)  # to prune more than is needed is never better
            best = largest[predictor.best(*self.space.coordinates(largest))]
            if self.space.is_within(best):
                return best
            left = self.space.without(left, best)
            if not left:
                break
        raise BudgetError(f"{self.space.goal.text}: no triple whose pruned graph keeps it was found in {TRIALS} trials")

    def settled(self, decision: Decision, chosen: Levels) -> Decision:
        """The decision with another triple."""
        assert self.predictor is not None
        measured = {axis: [point for point in decision.points if point.axis == axis] for axis in AXES}
        return replace(decision, **self._at(self.predictor, measured, chosen))

    def _at(self, predictor: Predictor, measured: Mapping[str, Sequence[Point]], chosen: Levels) -> dict[str, Any]:
        """What a decision says of its triple."""
        sizes, places = self.space.coordinates([chosen])
        value, deviation = predictor.predict(sizes, places)
        return {
            "chosen": chosen,
            "sizes": self.table.size(chosen),
            "predicted": float(value[0]),
            "deviation": float(deviation[0]),
            "product": float(predictor.product(sizes)[0]),
            "cost": self.table.cost(chosen) / self.table.original,
            "check": cross_check(self.table, predictor, chosen, self.space.limit, self.space.last(measured)),
        }

    def _decision(
        self,
        supervision: Supervision,
        predictor: Predictor,
        measured: Mapping[str, Sequence[Point]],
        mixed: Sequence[Point],
        raced: Sequence[Point],
        chosen: Levels,
        seconds: float,
    ) -> Decision:
        assert supervision.metric is not None
        off = None
        if mixed:
            there, _ = self.space.coordinates([point.levels for point in mixed])
            errors = np.array([point.figure for point in mixed]) - predictor.product(there)
            off = float(np.sqrt(np.mean(errors**2)))
        return Decision(
            metric=supervision.metric.name,
            higher_is_better=supervision.metric.higher_is_better,
            samples=len(self.given.judged.dataset),
            base=predictor.base,
            form=predictor.form,
            fits=dict(predictor.fits),
            points=[*itertools.chain.from_iterable(measured.values()), *mixed],
            candidates=list(raced),
            off_axis_error=off,
            limit=self.space.limit / self.table.original,
            triples=len(self.space.triples(measured)),
            refusals=dict(self.space.ladders.refusals),
            seconds=seconds,
            **self._at(predictor, measured, chosen),
        )
