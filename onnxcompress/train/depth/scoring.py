"""Score subnets: lambdas set, BatchNormalization estimated anew, and the metric on the validation data.

Subnets are independent, so they are scored in several processes: here by joblib's loky, or on a Dask cluster. Each
computes with one thread, also where there is only one process: a score does not depend on how many there are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from onnxcompress.codebook.workers import Workers
from onnxcompress.model_io import load, to_proto
from onnxcompress.train.batches import Batch
from onnxcompress.train.batchnorm import Feeds, settle_statistics
from onnxcompress.train.depth.training import Lambdas
from onnxcompress.train.supervision import predict
from onnxcompress.train.torch_graph import TorchGraph
from onnxcompress.validation.metrics import Metric

LARGEST_CHUNK = 16  # subnets whose scores reach the disk together

Report = Callable[[Mapping[str, float]], None]


@dataclass(frozen=True)
class Judge:
    """What subnets are scored by.

    Args:
        metric: The figure of merit; where lower is better, the score is its negative.
        output: That it is taken of.
        expected: (n, ...) what the validation samples should give.
    """

    metric: Metric
    output: str
    expected: np.ndarray

    def score(self, twin: TorchGraph, validation: Sequence[Feeds]) -> float:
        found = predict(twin, (Batch(feeds) for feeds in validation), self.output)
        figure = self.metric.measure(self.expected, found)
        return figure if self.metric.higher_is_better else -figure


class SubnetScorer:
    """Scores the subnets of a trained supernet.

    Args:
        twin: Of the supernet; where it lies on a GPU, it scores there, and alone.
        names: The scalar initializer of each block, in the order of the bits.
        calibration: Feeds that BatchNormalization is estimated from.
        validation: Feeds in the order of what the judge expects.
        judge: The figure of merit.
        jobs: Processes on this machine; None for one a processor.
        dask: Address of a Dask scheduler to use instead.
    """

    def __init__(
        self,
        twin: TorchGraph,
        names: Mapping[str, str],
        calibration: Sequence[Feeds],
        validation: Sequence[Feeds],
        judge: Judge,
        *,
        jobs: int | None = None,
        dask: str | None = None,
    ) -> None:
        self.twin, self.names, self.judge = twin, dict(names), judge
        self.calibration, self.validation = list(calibration), list(validation)
        on_gpu = any(buffer.is_cuda for buffer in twin.buffers())
        self.workers = Workers(1 if on_gpu else jobs, None if on_gpu else dask)
        self.alone = on_gpu or (dask is None and self.workers.jobs == 1)

    def __enter__(self) -> SubnetScorer:
        return self

    def __exit__(self, *error: object) -> None:
        kind, value, trace = error
        self.workers.__exit__(kind, value, trace)  # type: ignore[arg-type]  # what the interpreter gives

    def __call__(self, wanted: Sequence[str], report: Report) -> None:
        """Score subnets, and report each as soon as its score is known."""
        if self.alone:
            lambdas = Lambdas(self.twin, self.names)
            for bits in wanted:
                report({bits: _score(self.twin, lambdas, self.calibration, self.validation, self.judge, bits)})
            return
        size = max(1, min(LARGEST_CHUNK, math.ceil(len(wanted) / (2 * self.workers.jobs))))
        chunks = [tuple(wanted[start : start + size]) for start in range(0, len(wanted), size)]
        self.twin.write_back()
        model = np.frombuffer(to_proto(self.twin.graph).SerializeToString(), np.uint8)
        layout = [[list(feeds) for feeds in part] for part in (self.calibration, self.validation)]
        arrays = [value.numpy() for part in (self.calibration, self.validation) for f in part for value in f.values()]
        judge = self.judge
        tasks = [
            (chunk, tuple(self.names.items()), judge.metric, judge.output, judge.expected, layout, model, *arrays)
            for chunk in chunks
        ]
        self.workers.map(
            score_subnets, tasks, lambda number, scores: report(dict(zip(chunks[number], scores, strict=True)))
        )


_held: dict[str, TorchGraph] = {}  # the last twin of this process: chunks of a search share it


def score_subnets(
    chunk: Sequence[str],
    names: Sequence[tuple[str, str]],
    metric: Metric,
    output: str,
    expected: np.ndarray,
    layout: Sequence[Sequence[Sequence[str]]],
    model: np.ndarray,
    *arrays: np.ndarray,
) -> list[float]:
    """Score subnets in a process of their own.

    Args:
        chunk: Bit strings.
        names: Blocks and their scalar initializers.
        metric: The figure of merit.
        output: That it is taken of.
        expected: What it should be.
        layout: Input names of each feed, of those for calibration and those for validation.
        model: The supernet, serialized.
        arrays: All feeds, one after the other.
    """
    key = hashlib.sha256(model.tobytes()).hexdigest()
    if key not in _held:
        _held.clear()
        _held[key] = TorchGraph(load(model.tobytes()), trainable=lambda name: False)
    twin = _held[key]
    left = iter(arrays)
    calibration, validation = (
        [{name: torch.from_numpy(np.array(next(left))) for name in feed} for feed in part] for part in layout
    )
    lambdas = Lambdas(twin, dict(names))
    judge = Judge(metric, output, expected)
    return [_score(twin, lambdas, calibration, validation, judge, bits) for bits in chunk]


def _score(
    twin: TorchGraph,
    lambdas: Lambdas,
    calibration: Sequence[Feeds],
    validation: Sequence[Feeds],
    judge: Judge,
    bits: str,
) -> float:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        lambdas.set_bits(bits)
        twin.eval()
        settle_statistics(twin, calibration)
        return judge.score(twin, validation)
    finally:
        torch.set_num_threads(threads)
