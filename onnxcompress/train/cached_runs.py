"""Runs of a network on the same samples, of which less and less still changes.

Fits go through a network from front to back, and none changes anything in front of it. So the tensors at the border
between what has settled and what may still change are kept, and only what is behind them runs again: all fits together
take one pass through the network, where each of them took one.

    runs = CachedRuns(twin, samples, settle=True)
    runs.keep(moving=["conv7.weight", "conv9.weight"])  # what depends on neither is run, and kept
    runs.settle(["conv7.out"])                          # BatchNormalization behind it, as far as it is needed
    for found in runs(["conv7.in", "conv7.out"]): ...
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

import torch
from torch import Tensor

from onnxcompress.graph import Tensor as GraphTensor
from onnxcompress.graph import is_op
from onnxcompress.train.batchnorm import Feeds, Statistics, is_sequential, running_statistics, set_statistics
from onnxcompress.train.planning import needed_nodes, reads_of
from onnxcompress.train.torch_graph import TorchGraph

MOST_BYTES = 1 << 30  # kept at a border in one mode; one that takes more stays where it was


class CachedRuns:
    """A network and the samples that it runs on.

    Args:
        network: In evaluation mode. Edits of tensors that depend on the samples have no place in it.
        samples: Feeds of its inputs, in batches.
        settle: Whether BatchNormalization is estimated on the samples, as ``batchnorm.settle_statistics`` does: what is
            kept is kept with these statistics.
    """

    def __init__(self, network: TorchGraph, samples: Sequence[Feeds], *, settle: bool = False) -> None:
        self.network, self.samples = network, list(samples)
        everything = [tensor for node in network.graph.nodes for tensor in node.outputs]
        self._nodes = needed_nodes(network.graph, everything, set())  # sorted
        self._unsettled = running_statistics(network) if settle else {}
        self._sequential = bool(self._unsettled) and is_sequential(self.samples)
        self._moving: set[GraphTensor] | None = None
        self._border: tuple[str, ...] = ()
        self._kept: list[Feeds] = [{} for _ in self.samples]
        self._kept_training: list[Feeds] = self._kept  # likewise, of batches that normalize with their own statistics

    def __call__(self, outputs: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Tensors by name for each batch of the samples, without gradients."""
        return self._run(self._kept, outputs)

    def fork(self) -> CachedRuns:
        """The same, to go on from here without moving this one's border."""
        return copy.copy(self)

    def keep(self, moving: Iterable[str]) -> None:
        """Run all that depends on none of these tensors, and keep what the rest reads of it.

        Args:
            moving: Initializers whose numbers may still change, or any tensors: what makes them counts as changing.
                Nothing that was not moving before may be among them.

        Raises:
            ModelError: There is no such tensor.
            ValueError: One was not moving before.
        """
        moved = self._moved(moving)
        if self._moving is not None and not moved <= self._moving:
            first = min(str(tensor.name) for tensor in moved - self._moving)
            raise ValueError(f"{first!r} is in front of what was kept")
        self._moving = moved
        border = self._border_of(moved)
        if border == self._border:
            return
        settled = {pair: names for pair, names in self._unsettled.items() if self.network.find(pair[0]) not in moved}
        kept_training: list[Feeds] | None = self._kept_training
        if self._sequential:
            self._settle_in_turn(settled)
        elif self._unsettled:
            kept_training = self._settle(settled, border)
        kept = None if kept_training is None else self._collect(border)
        if kept is None or kept_training is None:
            return
        self._border, self._kept, self._kept_training = border, kept, kept_training
        self._unsettled = {pair: names for pair, names in self._unsettled.items() if pair not in settled}

    def settle(self, outputs: Sequence[str] | None = None) -> None:
        """Estimate BatchNormalization behind the border anew.

        Args:
            outputs: As far as these tensors depend on it; all of it when None.

        Raises:
            DataError: A statistic is NaN or infinite.
        """
        pairs = self._unsettled
        if outputs is not None:
            find = self.network.find
            stop = {find(name) for name in (*self._border, *self.network.input_names)}
            nodes = needed_nodes(self.network.graph, [find(name) for name in outputs], stop)
            read = {tensor for node in nodes for tensor in reads_of(node)}
            pairs = {pair: names for pair, names in pairs.items() if find(pair[0]) in read}
        if self._sequential:
            self._settle_in_turn(pairs)
        elif pairs:
            self._settle(pairs, ())

    # -- passes --------------------------------------------------------------------------------------------------------

    def _run(self, kept: Sequence[Feeds], outputs: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        for feeds, more in zip(self.samples, kept, strict=True):
            with torch.no_grad():
                found = self.network({**feeds, **more}, outputs)
            yield found

    def _settle_in_turn(self, pairs: Mapping[Statistics, Sequence[str]]) -> None:
        for pair, names in pairs.items():
            set_statistics(self.network, {pair: names}, self(names))

    def _settle(self, pairs: Mapping[Statistics, Sequence[str]], border: Sequence[str]) -> list[Feeds] | None:
        """One pass in which batches normalize with their own statistics; what it makes at a border."""
        wanted = list(dict.fromkeys([*(name for names in pairs.values() for name in names), *border]))
        at_border = _Kept(border, MOST_BYTES)
        self.network.train()
        try:
            passing = map(at_border.take, self._run(self._kept_training, wanted))
            set_statistics(self.network, pairs, passing)
        finally:
            self.network.eval()
        return at_border.found

    def _collect(self, border: Sequence[str]) -> list[Feeds] | None:
        at_border = _Kept(border, MOST_BYTES)
        for found in self(border):
            at_border.take(found)
            if at_border.found is None:
                break
        return at_border.found

    # -- the border ----------------------------------------------------------------------------------------------------

    def _moved(self, moving: Iterable[str]) -> set[GraphTensor]:
        """These tensors and all that depends on them."""
        moved = {self.network.find(name) for name in moving}
        before = -1
        while before < len(moved):  # once more where statistics are shared by nodes that lie apart
            before = len(moved)
            for node in self._nodes:
                if moved.isdisjoint(reads_of(node)) and moved.isdisjoint(node.outputs):
                    continue
                moved.update(node.outputs)
                if is_op(node, "BatchNormalization") and self._unsettled and node.inputs[0] in moved:
                    moved.update(node.inputs[3:5])
        return moved

    def _border_of(self, moved: Set[GraphTensor]) -> tuple[str, ...]:
        """What depends on the samples and on nothing that moves, and is read by what moves, or is an output."""
        given = {self.network.find(name) for feeds in self.samples[:1] for name in feeds}
        fed = set(given)
        read = set(self.network.graph.outputs)
        for node in self._nodes:
            reads = reads_of(node)
            if not fed.isdisjoint(reads):
                fed.update(node.outputs)
            if not moved.isdisjoint(node.outputs):
                read.update(reads)
        wanted = read & (fed - given)
        return tuple(str(t.name) for node in self._nodes for t in node.outputs if t in wanted and t not in moved)


class _Kept:
    """What a pass makes at a border; None once it takes too much."""

    def __init__(self, border: Sequence[str], most_bytes: int) -> None:
        self.border, self.left = border, most_bytes
        self.found: list[Feeds] | None = []

    def take(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.found is not None:
            part = {name: found[name] for name in self.border}
            self.left -= sum(tensor.nbytes for tensor in part.values())
            self.found.append(part)
            if self.left < 0:
                self.found = None
        return found
