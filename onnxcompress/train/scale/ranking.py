"""The order in which residual blocks go.

fits     block by block, each time the one without which the outputs change least, once the blocks that stay were
         fitted alone to what they gave; no labels are needed
probes   by what a linear probe on the features gains by a block, see ``probes``
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np

from onnxcompress.errors import DataError, RecipeError
from onnxcompress.graph import Graph
from onnxcompress.train.batches import Batch
from onnxcompress.train.depth.blocks import Block, find_blocks, without_overlaps
from onnxcompress.train.depth.fitting import fit_supernet
from onnxcompress.train.depth.supernet import build_supernet
from onnxcompress.train.depth.training import Lambdas
from onnxcompress.train.scale.given import Given
from onnxcompress.train.supervision import logits_of, predict
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


def rank_blocks(given: Given, blocks: Sequence[Block], say: Callable[[str], None]) -> list[Block]:
    """The blocks, the first to go first."""
    if len(blocks) < 2:
        return list(blocks)
    if given.options.depth_ranking == "probes":
        return _by_probes(given, blocks)
    return _by_fits(given, blocks, say)


def _by_probes(given: Given, blocks: Sequence[Block]) -> list[Block]:
    from onnxcompress.train.scale.probes import rank_by_probes

    labels = given.batches.labels
    if labels is None or labels.dim() != 1:
        raise DataError(f"{given.training.source} has no class for each sample, which probes need: take fits")
    importance = rank_by_probes(
        given.graph, blocks, given.training.samples, labels.numpy(), seed=given.options.training.seed
    )
    return sorted(blocks, key=lambda block: importance[block.name])


def _by_fits(given: Given, blocks: Sequence[Block], say: Callable[[str], None]) -> list[Block]:
    say(f"fitting {len(blocks)} blocks")
    supernet = build_supernet(given.graph, blocks)
    supernet, _ = fit_supernet(supernet, given.original, given.calibration, settle=given.settle, device=given.device)
    twin = TorchGraph(supernet.graph).to(given.device).eval()
    lambdas = Lambdas(twin, supernet.lambdas)
    output = logits_of(given.graph, given.options.wishes.output or twin.output_names[0])
    wanted = predict(given.original, map(Batch, given.calibration), output)
    order: list[Block] = []
    left = list(blocks)
    while left:
        errors = {}
        for number, block in enumerate(left, 1):
            say(f"block {len(order) + 1} of {len(blocks)} to go: {number} of {len(left)} tried")
            lambdas.prune([other.name for other in (*order, block)])
            given.settle(twin)
            found = predict(twin, map(Batch, given.calibration), output)
            errors[block.name] = float(np.mean((found - wanted) ** 2))
        if len(blocks) > GREEDY_BLOCKS:
            return [*order, *sorted(left, key=lambda block: errors[block.name])]
        best = min(left, key=lambda block: errors[block.name])
        logger.info("block %s goes as number %d, squared error %.3g", best.name, len(order) + 1, errors[best.name])
        order.append(best)
        left.remove(best)
    return order
