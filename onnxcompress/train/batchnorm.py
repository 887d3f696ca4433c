"""Running statistics of BatchNormalization, estimated anew from data; no gradient.

After surgery on a graph, and after averaging or rounding its weights, the statistics in the file are those of another
network. Re-estimating them on a few hundred samples repairs most of that by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onnxcompress.errors import DataError
from onnxcompress.graph import is_op
from onnxcompress.train.torch_graph import TorchGraph

Feeds = Mapping[str, Tensor]
Statistics = tuple[str, str]  # names of a running mean and variance
SEQUENTIAL_BELOW = 16  # samples: a batch of fewer says too little to normalize with


@dataclass
class _Moments:
    """Count, mean and sum of squared deviations per channel, in float64, merged batch by batch (Chan et al. 1979)."""

    count: int = 0
    mean: Tensor | None = None
    deviations: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """(n, channels, ...)."""
        flat = values.detach().transpose(0, 1).reshape(values.shape[1], -1)
        variance, mean = (part.double() for part in torch.var_mean(flat, dim=1, correction=0))
        count = flat.shape[1]
        if self.mean is None or self.deviations is None:
            self.count, self.mean, self.deviations = count, mean, variance * count
            return
        total, shift = self.count + count, mean - self.mean
        self.deviations = self.deviations + variance * count + shift.square() * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total


def reestimate_batchnorm(
    twin: TorchGraph, batches: Callable[[], Iterable[Feeds]] | Iterable[Feeds], *, sequential: bool = False
) -> list[str]:
    """Set running means and variances to those of all values that pass, as population statistics.

    Args:
        twin: Changed in place; left in the mode it was in.
        batches: Feeds; a callable gives them anew at each call, which ``sequential`` needs.
        sequential: One pass for each BatchNormalization, those before it already using their new statistics: exact at
            any batch size. By default one pass for all, each normalizing with the statistics of the batch at hand,
            which is good for batches of some dozens.

    Returns:
        The nodes that were updated: BatchNormalization whose statistics are initializers.

    Raises:
        DataError: There is no batch, or a statistic is NaN or infinite.
    """
    readers = running_statistics(twin)
    give = batches if callable(batches) else lambda: batches
    was_training = twin.training
    try:
        with torch.no_grad():
            for part in [{pair: names} for pair, names in readers.items()] if sequential else [readers]:
                twin.train(not sequential)
                wanted = list(dict.fromkeys(name for names in part.values() for name in names))
                set_statistics(twin, part, (twin(feeds, wanted) for feeds in give()))
    finally:
        twin.train(was_training)
    return [norm.node for norm in twin.batch_normalizations if norm.mean and norm.variance]


def settle_statistics(twin: TorchGraph, calibration: Sequence[Feeds]) -> None:
    """Estimate BatchNormalization anew, where there is any; in the way that goes with the size of the batches."""
    if running_statistics(twin):
        reestimate_batchnorm(twin, lambda: calibration, sequential=is_sequential(calibration))


def is_sequential(calibration: Sequence[Feeds]) -> bool:
    """Whether batches are too small to normalize with, so that each BatchNormalization needs a pass of its own."""
    smallest = min(len(value) if value.dim() else 1 for feeds in calibration for value in feeds.values())
    return smallest < SEQUENTIAL_BELOW


def running_statistics(twin: TorchGraph) -> dict[Statistics, list[str]]:
    """What each pair of running statistics is of: the tensors that BatchNormalization reads, in order of execution.

    Nodes that share their statistics pool what they see.
    """
    inputs = {
        str(node.name or node.outputs[0].name): str(node.inputs[0].name)
        for graph in twin.graph.walk()
        for node in graph.nodes
        if is_op(node, "BatchNormalization")
    }
    readers: dict[Statistics, list[str]] = {}
    for norm in twin.batch_normalizations:
        if norm.mean and norm.variance:
            readers.setdefault((norm.mean, norm.variance), []).append(inputs[norm.node])
    return readers


def set_statistics(
    twin: TorchGraph, readers: Mapping[Statistics, Sequence[str]], passing: Iterable[Mapping[str, Tensor]]
) -> None:
    """Set running statistics to those of the tensors that pass.

    Args:
        twin: Its buffers are changed once all has passed.
        readers: Of ``running_statistics``.
        passing: By batch what the readers name.

    Raises:
        DataError: There is no batch, or a statistic is NaN or infinite.
    """
    moments = {pair: _Moments() for pair in readers}
    for found in passing:
        for pair, names in readers.items():
            for name in names:
                moments[pair].add(found[name])
        del found
    for (mean, variance), seen in moments.items():
        if seen.mean is None or seen.deviations is None:
            raise DataError("no sample was given to estimate the statistics of BatchNormalization from")
        if not (torch.isfinite(seen.mean).all() and torch.isfinite(seen.deviations).all()):
            raise DataError(f"the statistics {mean!r} come out as NaN or infinite on this data")
        twin.get_buffer(mean).copy_(seen.mean)
        twin.get_buffer(variance).copy_(seen.deviations / seen.count)
