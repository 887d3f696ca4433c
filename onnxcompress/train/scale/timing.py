"""Latency of triples: estimated from a few of each axis, timed for those that count.

A triple that is slower than expected moves all estimates up by as much.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from onnxcompress.graph import Graph
from onnxcompress.measure import LatencyFigures
from onnxcompress.model_io import save
from onnxcompress.train.scale.estimating import MEASURED_LEVELS, Measurements, estimate
from onnxcompress.train.scale.solving import CostTable, Levels

MARGIN = 0.02  # a later measurement has to meet the goal, too
_ORIGINAL = "original_ms"


class LatencyTable:
    """Milliseconds of every triple, estimated.

    Args:
        macs: Multiply-accumulates of every triple.
        merged: The merged structure at a triple.
        compare: Times a file and the original, in turns.
        kept: Measurements of this run.
        say: Told what is being done.

    Attributes:
        table: The estimates.
        original_ms: Of the original, as first timed.
    """

    def __init__(
        self,
        macs: CostTable,
        merged: Callable[[Levels], Graph],
        compare: Callable[[Path], LatencyFigures],
        kept: Measurements,
        say: Callable[[str], None],
    ) -> None:
        self._merged, self._compare, self._kept = merged, compare, kept
        self.original_ms = self._kept.held.get(_ORIGINAL, 0.0)

        def timed(levels: Levels) -> float:
            say(f"timing at levels {levels}")
            return self._share(levels)

        shares = estimate(macs, (MEASURED_LEVELS,) * 3, timed)
        self.table = CostTable(macs.sizes, self.original_ms * shares * (1 + MARGIN), self.original_ms)

    def _share(self, levels: Levels) -> float:
        """Measured latency as a share of the original's."""

        def measure() -> float:
            with tempfile.TemporaryDirectory(prefix="onnxcompress-") as folder:
                path = Path(folder) / "model.onnx"
                save(self._merged(levels), path)
                latency = self._compare(path)
            if not self.original_ms:
                self.original_ms = self._kept.held[_ORIGINAL] = latency.original_ms
            return 1 / latency.ratio

        return self._kept.at(levels, measure)

    def measured(self, levels: Levels) -> float:
        """Milliseconds of a triple, timed, with the margin; the estimates of all move with it where they were low."""
        found = self._share(levels) * self.original_ms * (1 + MARGIN)
        expected = self.table.cost(levels)
        if found > expected:
            self.table.costs[...] *= found / expected
        return found
