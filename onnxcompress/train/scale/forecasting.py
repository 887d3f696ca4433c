"""What a run would do, and how long it would take: points, candidates and finalists, before any is trained."""

from __future__ import annotations

import time
from typing import Any

from onnxcompress.codebook.workers import processors
from onnxcompress.train.scale.collecting import axis_points
from onnxcompress.train.scale.options import ScalePlan
from onnxcompress.train.scale.predictor import AXES
from onnxcompress.train.scale.space import Space
from onnxcompress.train.torch_graph import TorchGraph


def forecast(space: Space) -> ScalePlan:
    """The plan of a run."""
    given, options, table = space.given, space.given.options, space.table
    points = axis_points(table, space.ends(), options)
    triples = space.triples(points)
    several = len([axis for axis in points if points[axis]]) > 1
    mixed, raced = (options.mixed, options.candidates) if several else (0, 1)
    axes: dict[str, dict[str, Any]] = {}
    for number, axis in enumerate(AXES):
        if axis in options.axes:
            axes[axis] = {
                "levels": int(table.costs.shape[number]),
                "least_size": table.sizes[number][-1],
                "least_cost": float(table.alone(number).min() / table.original),
                "refusal": space.ladders.refusals.get(axis, ""),
            }
    return ScalePlan(
        source=str(given.source),
        goal=space.goal.text,
        original_macs=given.figures.macs,
        points=[point for found in points.values() for point in found],
        mixed=mixed,
        candidates=raced,
        finalists=min(raced, options.finalists),
        axes=axes,
        triples=len(triples),
        seconds=_expected_seconds(space, sum(map(len, points.values())), mixed, raced),
    )


def _expected_seconds(space: Space, points: int, mixed: int, raced: int) -> dict[str, float]:
    """From the time of a step and of a fit of the original."""
    given, options = space.given, space.given.options
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
        "points": points * per_round / min(jobs, max(1, len(space.axes))),
        "mixed": mixed * per_round * options.rounds,
        "race": max(0, raced - 1 - mixed) * per_round * options.rounds / min(jobs, max(1, raced)),
        "train": min(raced, options.finalists) * (each * whole + judging * whole / every),
    }
