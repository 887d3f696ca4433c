"""Prune and train the networks that the predictor is fed with; each is kept as soon as it is made.

The networks of a round are made at the same time, in processes of their own. A run that was stopped takes up those that
are there, and the same settings give the same ones.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxcompress.codebook.workers import Workers
from onnxcompress.errors import RecipeError
from onnxcompress.model_io import load, save
from onnxcompress.train.checkpoint import difference
from onnxcompress.train.depth.options import finite
from onnxcompress.train.depth.search import write_whole
from onnxcompress.train.scale.axes import Ladders
from onnxcompress.train.scale.given import Given
from onnxcompress.train.scale.making import NOTHING, Outcome, make_at, make_point
from onnxcompress.train.scale.options import Point, Progress, ScaleOptions
from onnxcompress.train.scale.predictor import AXES
from onnxcompress.train.scale.solving import CostTable, Levels, step_levels

WAY_OUT = "--no-resume starts anew, --checkpoint names another folder"


def axis_points(table: CostTable, ends: Mapping[str, int], options: ScaleOptions) -> dict[str, list[Point]]:
    """The points on each axis, from the first round to its last level; none for an axis that has no levels."""
    found: dict[str, list[Point]] = {}
    for number, axis in enumerate(AXES):
        if axis not in options.axes:
            continue
        points = []
        for level in step_levels(table.alone(number), ends[axis], options.rounds):
            d, w, r = (level if number == other else 0 for other in range(3))
            points.append(point_at(table, axis, (d, w, r)))
        found[axis] = points
    return found


def point_at(table: CostTable, axis: str, levels: Levels) -> Point:
    """A point that is still to be made."""
    return Point(axis, levels, table.size(levels), table.macs(levels), table.cost(levels) / table.original)


class Collector:
    """The points of a run, and the folder in which they are kept.

    Args:
        given: Model and samples.
        ladders: Of its prepared graph.
        folder: For the points.
        identity: What makes them these points.
        total: Points that are wanted in all.
        progress: Told after each.
    """

    def __init__(
        self,
        given: Given,
        ladders: Ladders,
        folder: Path,
        identity: Mapping[str, Any],
        total: int,
        progress: Callable[[Progress], None],
    ) -> None:
        options = given.options
        self.given, self.ladders, self.folder = given, ladders, folder
        self.identity = json.loads(json.dumps(dict(identity)))
        self.total, self.progress = total, progress
        self.points: dict[str, Point] = {}
        self._fresh: list[float] = []
        self._start = time.monotonic()
        on_gpu = options.training.torch_device().type != "cpu"
        self.workers = Workers(1 if on_gpu else options.jobs, None if on_gpu else options.dask)
        self.alone = on_gpu or (options.dask is None and self.workers.jobs == 1)
        if options.resume:
            self._read()

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *error: object) -> None:
        kind, value, trace = error
        self.workers.__exit__(kind, value, trace)  # type: ignore[arg-type]  # what the interpreter gives

    @property
    def _list(self) -> Path:
        return self.folder / "points.json"

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.onnx"

    def collect(self, wanted: Sequence[tuple[Point, Point | None, float]]) -> list[Point]:
        """Make points, at the same time.

        Args:
            wanted: Each with the point to go on from, None for the original, and the epochs of its training.
        """
        missing = [entry for entry in wanted if entry[0].name not in self.points]
        if not missing:
            return [self.points[point.name] for point, _, _ in wanted]
        self._say(f"pruning and training {', '.join(point.name for point, _, _ in missing)}")

        def done(number: int, found: Outcome) -> None:
            model, fitted, figure, loss, seconds = found
            point = replace(missing[number][0], fitted=fitted, figure=figure, loss=loss, seconds=seconds)
            save(load(model.tobytes()), self._file(point.name))
            self.points[point.name] = point
            self._fresh.append(seconds)
            self._write()
            self._say(f"{point.name}: {point.fitted:.4g} fitted, {point.figure:.4g} trained")

        tasks = [self._task(*entry) for entry in missing]
        if self.alone:
            for number, (_, _, _, *rest) in enumerate(tasks):
                done(number, make_at(self.given, self.ladders, *rest))
        else:
            self.workers.map(make_point, tasks, done)
        return [self.points[point.name] for point, _, _ in wanted]

    def _task(self, point: Point, before: Point | None, epochs: float) -> tuple[Any, ...]:
        start = np.empty(0, np.uint8) if before is None else np.fromfile(self._file(before.name), np.uint8)
        at = NOTHING if before is None else before.levels
        given = self.given
        return str(given.source.resolve()), given.options, self.ladders.as_dict(), point.levels, at, epochs, start

    def _say(self, text: str) -> None:
        left = max(0, self.total - len(self.points))
        spent = time.monotonic() - self._start
        seconds = spent / len(self._fresh) * left if self._fresh else None
        self.progress(Progress(text, min(len(self.points), self.total), self.total, seconds))

    def _write(self) -> None:
        plain = {"identity": self.identity, "points": [dataclasses.asdict(point) for point in self.points.values()]}
        write_whole(self._list, json.dumps(finite(plain), indent=1))

    def _read(self) -> None:
        """Take up what an earlier run of the same identity has made.

        Raises:
            RecipeError: It is of another run, or cannot be read.
        """
        if not self._list.exists():
            return
        try:
            found = json.loads(self._list.read_text(encoding="utf-8"))
            theirs, points = found["identity"], [_point(plain) for plain in found["points"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"the points {self._list} cannot be read ({error}): {WAY_OUT}") from error
        changed = difference(theirs, self.identity)
        if changed:
            raise RecipeError(f"the points {self._list} are of another run: {changed}; {WAY_OUT}")
        self.points = {point.name: point for point in points if self._file(point.name).exists()}

    def remove(self) -> None:
        """Delete what was kept."""
        for point in self.points.values():
            self._file(point.name).unlink(missing_ok=True)
        self._list.unlink(missing_ok=True)


def _point(plain: Mapping[str, Any]) -> Point:
    named: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
    named |= {name: math.nan for name, value in named.items() if value is None}
    return Point(**named)
