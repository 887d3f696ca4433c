"""Latency of triples: estimated from a few of each axis, timed for those that count.

What does not get faster with the multiply-accumulates makes two axes together slower than their product says. Each
triple that is timed tells by how much, for itself and, the less the further away, for those around it: the estimates
move by a Gaussian process over the logarithms of what the axes save, as the figures of the predictor do.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from onnxcompress.graph import Graph
from onnxcompress.measure import LatencyFigures
from onnxcompress.model_io import save
from onnxcompress.train.scale.estimating import MEASURED_LEVELS, Measurements, estimate
from onnxcompress.train.scale.predictor import Residuals
from onnxcompress.train.scale.solving import CostTable, Levels

MARGIN = 0.02  # a later measurement has to meet the goal, too
_SPREAD, _NOISE = 0.15, 0.01  # of the logarithm: what the product is off by, and a ratio of medians
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

        self._seen: dict[Levels, float] = {}  # the logarithm of measured over product

        def timed(levels: Levels) -> float:
            say(f"timing at levels {levels}")
            self._seen[levels] = 0.0
            return self._share(levels)

        shares = estimate(macs, (MEASURED_LEVELS,) * 3, timed)
        self._product = self.original_ms * shares * (1 + MARGIN)
        self.table = CostTable(macs.sizes, self._product.copy(), self.original_ms, macs.costs)
        alone = np.meshgrid(*(np.log2(self.table.alone(axis)) for axis in range(3)), indexing="ij")
        self._places = np.log2(self.table.cost((0, 0, 0))) - np.stack(alone, axis=-1)  # a half is 1

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
        """Milliseconds of a triple, timed, with the margin; the estimates around it move with it."""
        found = self._share(levels) * self.original_ms * (1 + MARGIN)
        if levels not in self._seen:
            self._seen[levels] = math.log(found / self._product[levels])
            known = tuple(np.array(list(self._seen)).T)
            off = np.array(list(self._seen.values()))
            shift, _ = Residuals(self._places[known], off, _NOISE, _SPREAD).correction(self._places.reshape(-1, 3))
            self.table.costs[...] = self._product * np.exp(shift.reshape(self._product.shape))
            self.table.costs[known] = self._product[known] * np.exp(off)
        return found
