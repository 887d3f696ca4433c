"""Latency of triples: measured on each axis, put together as a product, and measured again for the triples that count.

Timing all triples would take hours. A few levels of each axis are timed, in turns with the original, and the others lie
between them; what two axes do together is taken for the product. Whatever is then chosen is timed itself, and where it
is slower than expected all estimates go up by as much.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from onnxcompress.graph import Graph
from onnxcompress.measure import LatencyFigures
from onnxcompress.model_io import save
from onnxcompress.train.depth.search import write_whole
from onnxcompress.train.scale.predictor import AXES
from onnxcompress.train.scale.solving import CostTable, Levels

TIMED_LEVELS = 4  # of each axis
MARGIN = 0.02  # a later measurement has to meet the goal, too


class LatencyTable:
    """Milliseconds of every triple, estimated.

    Args:
        macs: Multiply-accumulates of every triple.
        merged: The merged structure at a triple.
        compare: Times a file and the original, in turns.
        path: Where measurements are kept.
        resume: Whether those that are there are taken up.
        say: Told what is being done.
    """

    def __init__(
        self,
        macs: CostTable,
        merged: Callable[[Levels], Graph],
        compare: Callable[[Path], LatencyFigures],
        path: Path,
        *,
        resume: bool,
        say: Callable[[str], None],
    ) -> None:
        self._compare, self._path = compare, path
        self._held: dict[str, float] = {}
        if resume and path.exists():
            self._held = dict(json.loads(path.read_text(encoding="utf-8")))
        self.original_ms = self._held.get("original_ms", 0.0)
        logs = []
        for number, axis in enumerate(AXES):
            count = macs.costs.shape[number]
            timed = sorted({0, *np.linspace(0, count - 1, min(TIMED_LEVELS + 1, count)).round().astype(int).tolist()})
            found = []
            for level in timed:
                d, w, r = (level if number == other else 0 for other in range(3))
                say(f"timing {axis} at level {level} of {count - 1}")
                found.append(self.share((d, w, r), merged((d, w, r))))
            # Between timed levels along the logarithm of the MACs, which falls.
            alone = -np.log(macs.alone(number) / macs.costs[0, 0, 0])
            logs.append(np.interp(alone, alone[timed], np.log(found)))
        first = logs[0][0]  # the merged original
        total = first + (logs[0] - logs[0][0])[:, None, None] + (logs[1] - logs[1][0])[None, :, None]
        total = total + (logs[2] - logs[2][0])[None, None, :]
        self.table = CostTable(macs.sizes, self.original_ms * np.exp(total) * (1 + MARGIN), self.original_ms)

    def share(self, levels: Levels, graph: Graph) -> float:
        """Measured latency as a share of the original's; measured once in a run, so that a resumed one has the same."""
        name = "-".join(map(str, levels))
        if name not in self._held:
            with tempfile.TemporaryDirectory(prefix="onnxcompress-") as folder:
                path = Path(folder) / "model.onnx"
                save(graph, path)
                latency = self._compare(path)
            if not self.original_ms:
                self.original_ms = self._held["original_ms"] = latency.original_ms
            self._held[name] = 1 / latency.ratio
            write_whole(self._path, json.dumps(self._held))
        return self._held[name]

    def measured(self, levels: Levels, graph: Graph) -> float:
        """Milliseconds of a triple, timed, with the margin; the estimates of all move with it where they were low."""
        found = self.share(levels, graph) * self.original_ms * (1 + MARGIN)
        expected = self.table.cost(levels)
        if found > expected:
            self.table.costs[...] *= found / expected
        return found
