"""What merged graphs cost: measured on each axis, put together as a product, and measured again where it counts.

To merge, let alone to time, all triples would take hours. A few levels of each axis are measured and the others lie
between them; what two axes do together is taken for the product. Whatever is then chosen is measured itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from onnxcompress.errors import RecipeError
from onnxcompress.train.depth.search import write_whole
from onnxcompress.train.scale.collecting import WAY_OUT
from onnxcompress.train.scale.predictor import AXES
from onnxcompress.train.scale.solving import CostTable, Levels

MEASURED_LEVELS = 4  # of an axis, beside the original
COUNTED_DEPTHS = 16  # what is merged where a block has gone does not lie between its neighbours


class Measurements:
    """Figures that are measured once in a run, kept in a file: a resumed run has the same.

    Args:
        path: Of the file.
        run: Names what is measured; figures of something else are left aside.
        resume: Whether those that are there are taken up.

    Raises:
        RecipeError: The file cannot be read.
    """

    def __init__(self, path: Path, run: str, *, resume: bool) -> None:
        self._path, self._run = path, run
        self.held: dict[str, float] = {}
        if resume and path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                figures = {str(name): float(figure) for name, figure in found["figures"].items()}
                self.held = figures if found["run"] == run else {}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise RecipeError(f"the measurements {path} cannot be read ({error}): {WAY_OUT}") from error

    def at(self, levels: Levels, measure: Callable[[], float]) -> float:
        """The figure of a triple."""
        name = "-".join(map(str, levels))
        if name not in self.held:
            self.held[name] = measure()
            write_whole(self._path, json.dumps({"run": self._run, "figures": self.held}))
        return self.held[name]


def estimate(macs: CostTable, most: Sequence[int], measure: Callable[[Levels], float]) -> np.ndarray:
    """A figure of every triple, (depths, widths, resolutions).

    Args:
        macs: Multiply-accumulates of the triples: between two measured levels of an axis the logarithm of the figure
            goes along theirs.
        most: Levels of each axis to measure, beside the original.
        measure: The figure of a triple, more than 0.
    """
    logs = []
    for number, levels in enumerate(most):
        count = macs.costs.shape[number]
        measured = sorted({0, *np.linspace(0, count - 1, min(levels + 1, count)).round().astype(int).tolist()})
        found = []
        for level in measured:
            d, w, r = (level if number == other else 0 for other in range(len(AXES)))
            found.append(measure((d, w, r)))
        alone = -np.log(macs.alone(number) / macs.costs[0, 0, 0])
        logs.append(np.interp(alone, alone[measured], np.log(found)))
    first = logs[0][0]  # the merged original
    total = first + (logs[0] - first)[:, None, None] + (logs[1] - first)[None, :, None] + (logs[2] - first)
    return np.asarray(np.exp(total))


class MergedMacs:
    """Multiply-accumulates of every triple once it is merged.

    Merging changes what is counted on the pruned graph: a 1x1 convolution goes behind the pooling that it stood before,
    convolutions that have become neighbours are made one, with fewer operators and sometimes more to multiply.

    Args:
        counted: Multiply-accumulates of the triples as they are pruned.
        count: Those of the merged graph at a triple.
        kept: Counts of this run.
        say: Told what is being done.

    Attributes:
        table: The estimates.
    """

    def __init__(
        self,
        counted: CostTable,
        count: Callable[[Levels], int],
        kept: Measurements,
        say: Callable[[str], None],
    ) -> None:
        self._kept, self._count = kept, count

        def ratio(levels: Levels) -> float:
            say(f"merging and counting at levels {levels}")
            return max(self.measured(levels), 1.0) / max(counted.cost(levels), 1.0)

        ratios = estimate(counted, (COUNTED_DEPTHS, MEASURED_LEVELS, MEASURED_LEVELS), ratio)
        self.table = CostTable(counted.sizes, np.round(counted.costs * ratios), counted.original)

    def measured(self, levels: Levels) -> float:
        """Those of one triple."""
        return self._kept.at(levels, lambda: float(self._count(levels)))
