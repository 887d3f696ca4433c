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

import itertools
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onnxcompress.channels.allocation import Limits
from onnxcompress.channels.compensation import rank_by_data
from onnxcompress.channels.groups import find_channels
from onnxcompress.channels.ranking import magnitudes
from onnxcompress.codebook.workers import processors
from onnxcompress.cost import count
from onnxcompress.errors import OnnxCompressError, RecipeError
from onnxcompress.graph import Graph
from onnxcompress.optimizer import check_target
from onnxcompress.train.checkpoint import difference
from onnxcompress.train.depth.costs import merge
from onnxcompress.train.depth.offers import BudgetError
from onnxcompress.train.depth.search import write_whole
from onnxcompress.train.scale.axes import Ladders, count_all, pixel_ladder, structure, width_ladder
from onnxcompress.train.scale.collecting import WAY_OUT, Collector, axis_points, point_at
from onnxcompress.train.scale.finishing import Finisher, StepSay, compare
from onnxcompress.train.scale.given import Given
from onnxcompress.train.scale.options import Decision, Point, Progress, ScaleOptions, ScalePlan, ScaleResult
from onnxcompress.train.scale.predictor import AXES, Predictor, corrected, fit_axis
from onnxcompress.train.scale.racing import candidates, in_order, neighbours
from onnxcompress.train.scale.ranking import rank_blocks, residual_blocks
from onnxcompress.train.scale.solving import Levels, cross_check, last_level
from onnxcompress.train.scale.timing import LatencyTable
from onnxcompress.train.supervision import Supervision
from onnxcompress.train.torch_graph import TorchGraph

logger = logging.getLogger(__name__)

HOPE = 1.0  # standard deviations that a candidate is credited with
_SLACK = 0.95  # of the MACs of a goal: merged, a graph may have more than are counted
_NEIGHBOURS = 2  # of the best candidate that are trained before it is looked at again
_TRIALS = 8  # triples that are built or timed before the goal is given up

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
    """

    def __init__(self, given: Given, folder: Path, progress: Say | None = None, steps: StepSay | None = None) -> None:
        self.given, self.folder, self.steps = given, folder, steps
        self.start = time.monotonic()
        self._told = progress or (lambda now: None)
        options = given.options
        assert options.goal is not None
        self.options, self.goal = options, options.goal
        if options.threads:
            torch.set_num_threads(options.threads)
        self.say("reading the model")
        self.ladders = self._ladders()
        self.table = count_all(given.graph, self.ladders, float(given.figures.macs))
        self._macs: dict[Levels, int] = {}
        self.predictor: Predictor | None = None  # what a decision was made by
        self.latency: LatencyTable | None = None
        if self.goal.kind == "latency":
            self.latency = LatencyTable(
                self.table,
                self.merged,
                lambda path: compare(given, path),
                self.folder / "latency.json",
                resume=options.resume,
                say=self.say,
            )
            self.table = self.latency.table
        self.limit = self.goal.limit(self.table.original)

    def say(self, text: str) -> None:
        self._told(Progress(text, 0, 0, None))

    def run(self, output: Path, chosen: Levels | None = None) -> ScaleResult:
        """Choose, train and write; with ``chosen`` that triple."""
        finisher = Finisher(self.given, self.ladders, self.limit, self.folder, self.say, self.steps)
        if chosen is not None:
            found = finisher.finish(output, finisher.race([point_at(self.table, "finalist", chosen)]), None)
        else:
            decision = self.decide()
            trained = finisher.race(self.finalists(decision))
            found = finisher.finish(output, trained, self.settled(decision, trained.levels))
        return replace(found, seconds=time.monotonic() - self.start)

    def finalists(self, decision: Decision) -> list[Point]:
        """Networks to train to the end."""
        triples = [point.levels for point in decision.candidates[: self.options.finalists]] or [decision.chosen]
        return [point_at(self.table, "finalist", levels) for levels in triples]

    # -- ladders -------------------------------------------------------------------------------------------------------

    def _ladders(self) -> Ladders:
        """Of an earlier run of the same settings, or made now."""
        path = self.folder / "ladders.json"
        identity = json.loads(json.dumps(self.given.identity()))
        if self.options.resume and path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                theirs, ladders = found["identity"], Ladders.from_dict(found["ladders"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise RecipeError(f"the ladders {path} cannot be read ({error}): {WAY_OUT}") from error
            changed = difference(theirs, identity)
            if changed:
                raise RecipeError(f"the ladders {path} are of another run: {changed}; {WAY_OUT}")
            return ladders
        ladders = self._make_ladders()
        write_whole(path, json.dumps({"identity": identity, "ladders": ladders.as_dict()}))
        return ladders

    def _make_ladders(self) -> Ladders:
        options, graph = self.options, self.given.graph
        refusals: dict[str, str] = {}
        ladders = Ladders()
        # An axis alone has to reach the goal, merged: further levels are of no use. Latency falls less than MACs do.
        share = self.goal.amount if self.goal.relative else self.goal.amount / self.given.figures.macs
        least = (_SLACK * share if self.goal.kind == "macs" else 0.5 * share) * self.given.figures.macs
        if "depth" in options.axes:
            blocks, whole = residual_blocks(graph, only=options.only, skip=options.skip)
            if blocks:
                order = rank_blocks(self.given, blocks, least, self.say)
                ladders = replace(ladders, blocks=tuple(order), block_count=whole)
            else:
                refusals["depth"] = f"none of {whole} residual blocks can be deleted"
        if "width" in options.axes:
            self.say("ranking channels")
            channels = find_channels(graph)
            if options.width_ranking == "data":
                samples = self.given.samples
                rankings = rank_by_data(
                    channels, samples, self.given.runtime, judged=samples[-1:], seed=options.training.seed
                )
            else:
                rankings = magnitudes(channels)
            limits = Limits(options.round_to, options.min_keep)
            orders, widths, sizes = width_ladder(channels, rankings, limits, least)
            if len(widths) > 1:
                ladders = replace(ladders, orders=orders, widths=tuple(widths), width_sizes=tuple(sizes))
            else:
                kept = [group.frozen or group.approximate for group in channels.groups]
                why = next(filter(None, kept), "there is none")
                refusals["width"] = f"no channel group can be pruned: {why}"
        if "resolution" in options.axes:
            self.say("scaling the resolution")
            try:
                ladders = replace(ladders, pixels=tuple(pixel_ladder(graph, least)))
            except OnnxCompressError as error:
                refusals["resolution"] = str(error)
        if set(options.axes) <= set(refusals):
            raise RecipeError(f"there is nothing to prune: {'; '.join(refusals.values())}")
        for axis, reason in refusals.items():
            logger.warning("%s is not pruned: %s", axis, reason)
        return replace(ladders, refusals=refusals)

    # -- the choice ----------------------------------------------------------------------------------------------------

    @property
    def _axes(self) -> list[str]:
        """Axes with more than one level."""
        return [axis for number, axis in enumerate(AXES) if self.table.costs.shape[number] > 1]

    def _ends(self) -> dict[str, int]:
        """By axis the level at which it alone keeps the goal: merged, a graph may have more MACs than are counted."""
        found = {}
        for number, axis in enumerate(AXES):
            alone = self.table.alone(number)
            level = last_level(alone, self.limit)
            for deeper in range(level, min(len(alone), level + _TRIALS)):
                d, w, r = (deeper if number == other else 0 for other in range(3))
                if alone[deeper] <= self.limit and self.is_within((d, w, r)):
                    level = deeper
                    break
            found[axis] = level
        return found

    def _last(self, points: Mapping[str, Sequence[Point]]) -> dict[str, int]:
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
        last = self._last(points)
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

    def decide(self) -> Decision:
        """Collect points, fit, and choose."""
        start = time.monotonic()
        options, given = self.options, self.given
        points = axis_points(self.table, self._ends(), options)
        self.triples(points)  # before anything is trained
        several = len([axis for axis in points if points[axis]]) > 1
        total = sum(map(len, points.values())) + (options.mixed + options.candidates if several else 0)
        identity = given.identity() | {"mixed": options.mixed}
        with Collector(given, self.ladders, self.folder, identity, total, self._told) as collector:
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
        triples = self.table.largest(self.triples(measured))
        count, epochs = self.options.candidates, self.options.round_epochs * self.options.rounds
        chosen = candidates(count, best, everything, triples, predictor, self.coordinates, self.is_within)
        there = {point.levels: point for point in mixed}
        raced = [there[one] for one in chosen if one in there]
        wanted = [one for one in chosen if one not in there]
        before: Levels | None = None
        while True:
            collector.total = len(everything) + sum(point.axis == "candidate" for point in raced) + len(wanted)
            raced += collector.collect([(point_at(self.table, "candidate", one), None, epochs) for one in wanted])
            raced = in_order(raced, higher_is_better=predictor.higher_is_better)
            wanted = [] if raced[0].levels == before else self._near(raced, triples, predictor)
            if not wanted:
                return raced
            before = raced[0].levels

    def _near(self, raced: Sequence[Point], triples: Sequence[Levels], predictor: Predictor) -> list[Levels]:
        """The most promising neighbours of the best candidate that are not raced yet."""
        known = {point.levels for point in raced}
        near = [one for one in neighbours(raced[0].levels, triples, self.coordinates) if one not in known]
        found: list[Levels] = []
        while near and len(found) < _NEIGHBOURS:
            levels = near.pop(predictor.best(*self.coordinates(near)))
            if self.is_within(levels):
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
        sizes, places = self.coordinates([point.levels for point in everything])
        return corrected(predictor, sizes, places, figures, noise=chance)

    def coordinates(self, triples: Sequence[Levels]) -> tuple[np.ndarray, np.ndarray]:
        """(n, 3) sizes and (n, 3) places of triples."""
        sizes = np.array([self.table.size(levels) for levels in triples])
        return sizes, np.array([self.table.place(levels, self.limit) for levels in triples])

    def _next(
        self,
        predictor: Predictor,
        measured: Mapping[str, Sequence[Point]],
        mixed: Sequence[Point],
    ) -> Levels | None:
        """The next triple to measure off the axes: the equal split, then the most promising ones."""
        known = {point.levels for found in (*measured.values(), mixed) for point in found}
        largest = self.table.largest(self.triples(measured))
        free = [levels for levels in largest if levels not in known and sum(map(bool, levels)) > 1]
        if not free:
            return None
        if not mixed:
            return self.table.nearest(free, [1.0 if axis in self._axes else 0.0 for axis in AXES], self.limit)
        return free[predictor.best(*self.coordinates(free), hope=HOPE)]

    def _choose(self, predictor: Predictor, points: Mapping[str, Sequence[Point]]) -> Levels:
        """The best triple whose real graph keeps the goal."""
        left = self.triples(points)
        for _ in range(_TRIALS):
            largest = self.table.largest(left)  # to prune more than is needed is never better
            best = largest[predictor.best(*self.coordinates(largest))]
            if self.is_within(best):
                return best
            # Estimates of latency have moved; an exact count that is off is so for others as well.
            left = [levels for levels in left if self.table.cost(levels) <= self.limit and levels != best]
            if not left:
                break
        raise BudgetError(f"{self.goal.text}: no triple whose pruned graph keeps it was found in {_TRIALS} trials")

    def is_within(self, levels: Levels) -> bool:
        """Whether the real graph at a triple keeps the goal."""
        if self.latency is not None:
            return self.latency.measured(levels, self.merged(levels)) <= self.limit
        if levels not in self._macs:
            self._macs[levels] = count(self.merged(levels)).macs
            logger.info("levels %s: %d MACs, %.0f by the table", levels, self._macs[levels], self.table.cost(levels))
        return self._macs[levels] <= self.limit

    def merged(self, levels: Levels) -> Graph:
        """The structure at a triple, merged; with the weights of the original."""
        return merge(structure(self.given.graph, self.ladders, levels), runtime=self.given.runtime)

    def settled(self, decision: Decision, chosen: Levels) -> Decision:
        """The decision with another triple."""
        assert self.predictor is not None
        measured = {axis: [point for point in decision.points if point.axis == axis] for axis in AXES}
        return replace(decision, **self._at(self.predictor, measured, chosen))

    def _at(self, predictor: Predictor, measured: Mapping[str, Sequence[Point]], chosen: Levels) -> dict[str, Any]:
        """What a decision says of its triple."""
        sizes, places = self.coordinates([chosen])
        value, deviation = predictor.predict(sizes, places)
        return {
            "chosen": chosen,
            "sizes": self.table.size(chosen),
            "predicted": float(value[0]),
            "deviation": float(deviation[0]),
            "product": float(predictor.product(sizes)[0]),
            "cost": self.table.cost(chosen) / self.table.original,
            "check": cross_check(self.table, predictor, chosen, self.limit, self._last(measured)),
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
            there, _ = self.coordinates([point.levels for point in mixed])
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
            limit=self.limit / self.table.original,
            triples=len(self.triples(measured)),
            refusals=dict(self.ladders.refusals),
            seconds=seconds,
            **self._at(predictor, measured, chosen),
        )

    def plan(self) -> ScalePlan:
        points = axis_points(self.table, self._ends(), self.options)
        triples = self.triples(points)
        several = len([axis for axis in points if points[axis]]) > 1
        options = self.options
        mixed, raced = (options.mixed, options.candidates) if several else (0, 1)
        axes: dict[str, dict[str, Any]] = {}
        for number, axis in enumerate(AXES):
            if axis in self.options.axes:
                axes[axis] = {
                    "levels": int(self.table.costs.shape[number]),
                    "least_size": self.table.sizes[number][-1],
                    "least_cost": float(self.table.alone(number).min() / self.table.original),
                    "refusal": self.ladders.refusals.get(axis, ""),
                }
        return ScalePlan(
            source=str(self.given.source),
            goal=self.goal.text,
            original_macs=self.given.figures.macs,
            points=[point for found in points.values() for point in found],
            mixed=mixed,
            candidates=raced,
            finalists=min(raced, options.finalists),
            axes=axes,
            triples=len(triples),
            seconds=self._expected_seconds(sum(map(len, points.values())), mixed, raced),
        )

    def _expected_seconds(self, points: int, mixed: int, raced: int) -> dict[str, float]:
        """From the time of a step and of a fit of the original."""
        options, given = self.options, self.given
        self.say("timing a step and a fit")
        twin = TorchGraph(given.graph)
        supervision = given.supervise(twin)
        twin.to(given.device)
        assert supervision.objective is not None
        objective = supervision.objective
        batch = next(given.batches.at(0)).to(given.device)

        def step() -> float:
            start = time.monotonic()
            objective(twin.train(), batch).backward()  # type: ignore[no-untyped-call]  # torch's
            return (time.monotonic() - start) * given.batches.accumulate

        step()
        each = min(step() for _ in range(2))
        start = time.monotonic()
        given.settle(twin.eval())
        supervision.figure(twin, given.judged, given.device)
        judging = time.monotonic() - start
        every = given.batches.steps_per_epoch
        per_round = each * max(1, round(options.round_epochs * every)) + judging * (1 + options.round_epochs)
        jobs = options.jobs or processors()
        whole = options.training.total_steps(every)
        return {
            "points": points * per_round / min(jobs, max(1, len(self._axes))),
            "mixed": mixed * per_round * options.rounds,
            "race": max(0, raced - 1 - mixed) * per_round * options.rounds / min(jobs, max(1, raced)),
            "train": min(raced, options.finalists) * (each * whole + judging * whole / every),
        }
