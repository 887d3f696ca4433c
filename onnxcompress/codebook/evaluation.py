"""How near a quantized file is to the original, on samples that no fit has used.

Both run on onnxruntime. Agreement is over the last axis of classifier outputs; with labels the metric is asked for as
``validate`` does, once with onnxruntime's own optimizations off and once as it runs for everybody.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcompress.codebook.damage import squared_error
from onnxcompress.data import Dataset
from onnxcompress.runtime import REFERENCE, RunOptions, Runtime
from onnxcompress.validation.equivalence import for_runtime, run_model
from onnxcompress.validation.judge import validate

MAX_CLASSES = 1_000_000
MIN_CLASSES = 2


@dataclass(frozen=True)
class OutputQuality:
    """One output of both models.

    Attributes:
        name: The output.
        error: |y - y'| / |y - mean y| over all samples, the mean that of each element; 1 is as bad as a constant.
        cosine: Mean cosine similarity of the samples.
        agreement: Share of rows with their largest value at the same place; None where the output has no such rows.
    """

    name: str
    error: float
    cosine: float
    agreement: float | None


@dataclass(frozen=True)
class Quality:
    """What a quantized file is worth.

    Attributes:
        samples: How many samples it was measured on.
        outputs: One entry for each floating-point output.
        metric: Name of the metric on labelled data, or None.
        before: The original's metric.
        after: The quantized file's.
        drop_of_metric: How much worse the file is, the larger of both ways of running.
    """

    samples: int
    outputs: list[OutputQuality]
    metric: str | None = None
    before: float | None = None
    after: float | None = None
    drop_of_metric: float | None = None

    @property
    def criterion(self) -> str:
        """What ``drop`` is a drop of."""
        if self.metric is not None:
            return self.metric
        return "agreement" if any(output.agreement is not None for output in self.outputs) else "cosine"

    @property
    def drop(self) -> float:
        """How much worse the file is: by the metric, else 1 - agreement, else 1 - cosine, of the worst output."""
        if self.drop_of_metric is not None:
            return self.drop_of_metric
        agreements = [output.agreement for output in self.outputs if output.agreement is not None]
        if agreements:
            return 1 - min(agreements)
        return 1 - min((output.cosine for output in self.outputs), default=1.0)

    @property
    def error(self) -> float:
        """Relative error of the worst output."""
        return max((output.error for output in self.outputs), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has neither NaN nor infinity."""
        found = {**asdict(self), "criterion": self.criterion, "drop": self.drop, "error": self.error}
        return {key: _finite(value) for key, value in found.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(one) for one in value]
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Judge:
    """Judges files against one original; the original runs once.

    Args:
        original: Its path.
        feeds: Held-out samples.
        runtime: Where models run.
        metric: Name of a metric, with ``labelled``.
        labelled: Samples with labels.
        custom_ops: Shared library with custom operators.
    """

    def __init__(
        self,
        original: Path,
        feeds: Sequence[Mapping[str, Any]],
        runtime: Runtime,
        *,
        metric: str | None = None,
        labelled: Dataset | None = None,
        custom_ops: Path | None = None,
    ) -> None:
        self.original, self.feeds, self.runtime = original, list(feeds), runtime
        self.metric, self.labelled, self.custom_ops = metric, labelled, custom_ops
        self.names = [info.name for info in runtime.interface(for_runtime(original), options=self._options)[1]]
        self._expected: list[list[Any]] | None = None

    @property
    def _options(self) -> RunOptions:
        return RunOptions(REFERENCE.optimization, custom_ops=self.custom_ops)

    def judge(self, candidate: Path) -> Quality:
        """Run a file and compare."""
        if self._expected is None:
            self._expected = self._run(self.original)
        found = self._run(candidate)
        outputs = []
        for index, name in enumerate(self.names):
            pairs = [(np.asarray(a[index]), np.asarray(b[index])) for a, b in zip(self._expected, found, strict=True)]
            if all(a.dtype.kind == "f" for a, _ in pairs):
                outputs.append(compare_output(name, pairs))
        quality = Quality(_samples(self.feeds), outputs)
        if self.metric is None or self.labelled is None:
            return quality
        figures = validate(
            self.original,
            candidate,
            data=self.labelled,
            metric=self.metric,
            custom_ops=self.custom_ops,
            runtime=self.runtime,
        ).metric
        if figures is None:
            return quality
        before, after = figures.plain
        return Quality(quality.samples, outputs, self.metric, before, after, figures.drop)

    def _run(self, path: Path) -> list[list[Any]]:
        return run_model(self.runtime, for_runtime(path), self.feeds, self._options)


def compare_output(name: str, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> OutputQuality:
    """Compare one output over all batches."""
    error = math.sqrt(squared_error(pairs))
    if any(a.shape != b.shape for a, b in pairs):
        return OutputQuality(name, math.inf, 0.0, 0.0)
    cosines, agreements = [], []
    for a, b in pairs:
        wide, other = a.astype(np.float64), b.astype(np.float64)
        if a.size:
            cosines.append(_cosines(wide, other))
        if a.ndim >= 2 and MIN_CLASSES <= a.shape[-1] <= MAX_CLASSES and a.size:
            agreements.append((wide.argmax(axis=-1) == other.argmax(axis=-1)).reshape(-1))
    cosine = float(np.concatenate(cosines).mean()) if cosines else 1.0
    agreement = float(np.concatenate(agreements).mean()) if agreements else None
    return OutputQuality(name, error, cosine if math.isfinite(cosine) else 0.0, agreement)


def _cosines(y: np.ndarray, other: np.ndarray) -> np.ndarray:
    rows, others = (array.reshape(len(array) if array.ndim > 1 else 1, -1) for array in (y, other))
    norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(others, axis=1)
    same = (rows == others).all(axis=1)
    return np.where(same, 1.0, (rows * others).sum(axis=1) / np.where(norms == 0, 1.0, norms))


def _samples(feeds: Sequence[Mapping[str, Any]]) -> int:
    """How many samples are in batches; a feed without a batch axis counts as one."""
    return sum(max((np.shape(value)[0] for value in feed.values() if np.ndim(value)), default=1) for feed in feeds)
