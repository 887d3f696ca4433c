"""The order in which residual blocks go.

fits     block by block, each time the one without which the outputs change least for the MACs that it saves, once
         the last linear operators in front of them are fitted to make up for it; no labels are needed
probes   by what a linear probe on the features gains by a block, see ``probes``
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor

from onnxcompress.cost import count
from onnxcompress.errors import DataError, RecipeError
from onnxcompress.graph import Graph
from onnxcompress.train.batches import Batch
from onnxcompress.train.batchnorm import Feeds
from onnxcompress.train.depth.blocks import Block, find_blocks, without_overlaps
from onnxcompress.train.depth.fitting import fit_outputs
from onnxcompress.train.depth.supernet import build_supernet
from onnxcompress.train.depth.training import Lambdas
from onnxcompress.train.scale.given import Given
from onnxcompress.train.supervision import predict
from onnxcompress.train.torch_graph import TorchGraph

logger = logging.getLogger(__name__)

GREEDY_BLOCKS = 16  # with more of them each is looked at once only


def residual_blocks(graph: Graph, *, only: Sequence[str] = (), skip: Sequence[str] = ()) -> tuple[list[Block], int]:
    """The blocks that can be deleted, in order of execution, and the number of residual blocks.

    Raises:
        RecipeError: A pattern fits none.
    """
    found = [block for block in without_overlaps(find_blocks(graph)[0]) if block.add]

    def fits(block: Block, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(text, pattern) for pattern in patterns for text in (block.name, block.kind))

    for pattern in (*only, *skip):
        if not any(fits(block, [pattern]) for block in found):
            raise RecipeError(f"{pattern!r} is the name or kind of no residual block; there are {len(found)}")
    wanted = [block for block in found if (not only or fits(block, only)) and not fits(block, skip)]
    return [replace(block, kind="residual") for block in wanted if block.deletable], len(found)


def rank_blocks(given: Given, blocks: Sequence[Block], least_macs: float, say: Callable[[str], None]) -> list[Block]:
    """The blocks that go, the first to go first, until no more than ``least_macs`` are left."""
    left = float(count(given.graph).macs)
    needed = 0  # without more than so many of the smallest blocks it is not reached
    for block in sorted(blocks, key=lambda block: block.macs):
        if left <= least_macs:
            break
        left -= block.macs
        needed += 1
    if len(blocks) > 1 and given.options.depth_ranking == "probes":
        blocks = _by_probes(given, blocks)
    elif len(blocks) > 1:
        blocks = _by_fits(given, blocks, needed, say)
    left = float(count(given.graph).macs)
    order: list[Block] = []
    for block in blocks:
        if left <= least_macs:
            break
        left -= block.macs
        order.append(block)
    return order


def _by_probes(given: Given, blocks: Sequence[Block]) -> list[Block]:
    from onnxcompress.train.scale.probes import rank_by_probes

    labels = given.batches.labels
    if labels is None or labels.dim() != 1:
        raise DataError(f"{given.training.source} has no class for each sample, which probes need: take fits")
    importance = rank_by_probes(
        given.graph, blocks, given.training.samples, labels.numpy(), seed=given.options.training.seed
    )
    return sorted(blocks, key=lambda block: importance[block.name])


def _by_fits(given: Given, blocks: Sequence[Block], needed: int, say: Callable[[str], None]) -> list[Block]:
    """At least ``needed`` of the blocks."""
    supernet = build_supernet(given.graph, blocks)
    twin = TorchGraph(supernet.graph).to(given.device).eval()
    lambdas = Lambdas(twin, supernet.lambdas)
    start = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    original = _Once(given.original)
    order: list[Block] = []
    left, error = list(blocks), 0.0
    while left and len(order) < needed:
        errors = {}
        for number, block in enumerate(left, 1):
            say(f"block {len(order) + 1} of {needed} to go: {number} of {len(left)} tried")
            lambdas.prune([other.name for other in (*order, block)])
            errors[block.name] = _error(given, twin, original)
            twin.load_state_dict(start)
        left.sort(key=lambda block: (errors[block.name] - error) / max(block.macs, 1))
        if len(blocks) > GREEDY_BLOCKS:
            return [*order, *left]
        best = left.pop(0)
        error = errors[best.name]
        logger.info("block %s goes as number %d, relative error %.3g", best.name, len(order) + 1, error)
        order.append(best)
    return order


class _Once:
    """A network that runs once for each feeds and names; for outputs, which are small."""

    def __init__(self, network: TorchGraph) -> None:
        self.network = network
        self._known: dict[tuple[int, tuple[str, ...] | None], dict[str, Tensor]] = {}

    def __call__(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        key = id(feeds), None if outputs is None else tuple(outputs)  # the feeds of a run stay where they are
        if key not in self._known:
            with torch.no_grad():
                self._known[key] = self.network(feeds, outputs)
        return self._known[key]


def _error(given: Given, twin: TorchGraph, original: _Once) -> float:
    """Relative squared error of the outputs once statistics and the last linear operators have made up for it."""
    given.settle(twin)
    errors = []
    for fit in fit_outputs(twin, original, given.calibration):
        if math.isfinite(fit.after):
            errors.append(fit.after**2)
            continue
        found, wanted = (predict(net, map(Batch, given.calibration), fit.name) for net in (twin, original))
        errors.append(float(np.mean((found - wanted) ** 2) / max(np.var(wanted), 1e-30)))
    return float(np.mean(errors))
