"""Measure a file against the original: bytes, MACs, latency in turns, and the drop on samples that no step has seen."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxcompress.codebook.evaluation import compare_output
from onnxcompress.compression.goal import Limit
from onnxcompress.compression.parts import BATCH, Parts
from onnxcompress.compression.point import Point, allowed_share
from onnxcompress.cost import count
from onnxcompress.errors import DataError, OnnxCompressError, RuntimeFailure
from onnxcompress.graph import Graph
from onnxcompress.measure import LatencyFigures, compare_latency, size_on_disk
from onnxcompress.model_io import load, read_proto
from onnxcompress.optimizer import OptimizeOptions, optimize
from onnxcompress.runtime import DEPLOYED, REFERENCE, RunOptions, Runtime
from onnxcompress.samples import check_samples
from onnxcompress.shapes import infer_shapes
from onnxcompress.validation.equivalence import for_runtime, run_model
from onnxcompress.validation.metrics import find_metric

TIMING_S = 0.5
GOAL_TIMING_S = 2.0  # where latency decides
LAST_TIMING_S = 6.0  # where the interval of a measurement holds what is allowed
Rows = list[list[Any]]


class Meter:
    """Measures files against one original, which runs once.

    Args:
        original: Its path.
        parts: Samples; made-up ones show the error of the outputs where there are none.
        runtime: Where models run.
        metric: Name of the figure on labelled samples; top1 when None.
        latency: The wish about it; None times it in short.
        threads: For timing.
        custom_ops: Shared library with custom operators.
        seed: Of made-up inputs.
    """

    def __init__(
        self,
        original: Path,
        parts: Parts,
        runtime: Runtime,
        *,
        metric: str | None = None,
        latency: Limit | None = None,
        threads: int = 1,
        custom_ops: Path | None = None,
        seed: int = 0,
    ) -> None:
        self.original, self.runtime, self.wish = original, runtime, latency
        self.threads, self.custom_ops = threads, custom_ops
        judging = parts.judging
        self.labels = None if judging is None else judging.labels
        self.metric = None
        if self.labels is not None:
            self.metric = find_metric(metric or "top1")
        elif metric is not None:
            raise DataError(f"metric {metric} needs labels: give --val samples that have some")
        self.is_made_up = judging is None
        if judging is None:
            self.feeds = self._made_up(seed)
        else:
            self.feeds = [feed for feed, _ in judging.batches(min(BATCH, len(judging)))]
        self.single = next(feed for feed, _ in judging.batches(1)) if judging is not None else self.feeds[0]
        self.names = [info.name for info in runtime.interface(for_runtime(original), options=self._options())[1]]
        self._plain = self._run(original, self._options())
        self._deployed: Rows | None = None

    def measure(self, path: Path) -> Point:
        """All figures of a file."""
        graph = load(path)
        infer_shapes(graph)
        macs, macs_exact = self._macs(path, graph)
        found = self._plain if path == self.original else self._run(path, self._options())
        outputs = [
            compare_output(name, self._pairs(found, index))
            for index, name in enumerate(self.names)
            if all(np.asarray(row[index]).dtype.kind == "f" for row in self._plain)
        ]
        error = max((output.error for output in outputs), default=0.0)
        agreements = [output.agreement for output in outputs if output.agreement is not None]
        criterion, drop, before, after = "", None, None, None
        if self.metric is not None:
            criterion, (drop, before, after) = self.metric.name, self._metric_of(path, found)
        elif not self.is_made_up and outputs:
            criterion = "agreement" if agreements else "cosine"
            drop = 1 - min(agreements or [output.cosine for output in outputs])
        return Point(
            size_on_disk(path, graph), macs, self.time(path), criterion, drop, before, after, error, macs_exact
        )

    def _macs(self, path: Path, graph: Graph) -> tuple[int, bool]:
        """And whether they are exact. Shape arithmetic hides sizes of an original; they are plain once it is folded."""
        counted = count(graph)
        if path == self.original and not counted.exact:
            options = OptimizeOptions(check=False, measure_latency=False, custom_ops=self.custom_ops)
            with contextlib.suppress(OnnxCompressError):  # then it is counted with assumed sizes
                found = optimize(path, None, options=options, runtime=self.runtime).before
                return found.macs, found.macs_exact
        return counted.macs, counted.exact

    def time(self, path: Path) -> LatencyFigures | None:
        """A file and the original in turns; longer where what is allowed lies within the interval."""
        found = self._timed(path, TIMING_S if self.wish is None else GOAL_TIMING_S)
        if path == self.original and found is not None:  # against itself: it is as fast, whatever the clock says
            return LatencyFigures(found.original_ms, found.original_ms, 1.0, 1.0, 1.0, found.runs)
        if found is None or self.wish is None:
            return found
        point = Point(0, 0, found, "", None, None, None, None)
        if 1 / found.high <= allowed_share(self.wish, point) <= 1 / found.low:
            return self._timed(path, LAST_TIMING_S) or found
        return found

    # -- running -----------------------------------------------------------------------------------------------------

    def _options(self, base: RunOptions = REFERENCE) -> RunOptions:
        return replace(base, custom_ops=self.custom_ops)

    def _run(self, path: Path, options: RunOptions) -> Rows:
        return run_model(self.runtime, for_runtime(path), self.feeds, options, outputs=self.names)

    def _pairs(self, found: Rows, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        pairs = zip(self._plain, found, strict=True)
        return [(np.asarray(ours[index]), np.asarray(theirs[index])) for ours, theirs in pairs]

    def _metric_of(self, path: Path, plain: Rows) -> tuple[float, float, float]:
        """Drop, figure of the original and of the file: the larger drop of both ways of running."""
        assert self.metric is not None and self.labels is not None
        if self._deployed is None:
            self._deployed = self._run(self.original, self._options(DEPLOYED))
        deployed = self._deployed if path == self.original else self._run(path, self._options(DEPLOYED))
        figures = []
        for ours, theirs in ((self._plain, plain), (self._deployed, deployed)):
            before, after = (self.metric.measure(self.labels, _joined(rows, self.names[0])) for rows in (ours, theirs))
            figures.append((self.metric.drop(before, after, self.labels), before, after))
        return max(figures, key=lambda one: one[0])

    def _timed(self, path: Path, budget_s: float) -> LatencyFigures | None:
        try:
            return compare_latency(
                self.runtime,
                for_runtime(self.original),
                for_runtime(path),
                self.single,
                threads=self.threads,
                custom_ops=self.custom_ops,
                budget_s=budget_s,
                max_runs=1000,
            )
        except RuntimeFailure:
            if self.wish is not None:
                raise
            return None  # said to be not measured

    def _made_up(self, seed: int) -> list[Mapping[str, Any]]:
        def run(feed: Mapping[str, Any]) -> list[Any]:
            return run_model(self.runtime, for_runtime(self.original), [feed], self._options())[0]

        return list(check_samples(read_proto(self.original), run, seed=seed))


def _joined(rows: Sequence[Sequence[Any]], name: str) -> np.ndarray:
    try:
        return np.concatenate([np.atleast_1d(np.asarray(row[0])) for row in rows])
    except ValueError as error:
        raise DataError(f"output {name!r} changes its shape between batches: no metric can be taken of it") from error
