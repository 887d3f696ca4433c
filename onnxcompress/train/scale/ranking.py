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

import torch

from onnxcompress.cost import count
from onnxcompress.errors import DataError, RecipeError
from onnxcompress.graph import Graph
from onnxcompress.train.cached_runs import CachedRuns
from onnxcompress.train.depth.blocks import Block, find_blocks, without_overlaps
from onnxcompress.train.depth.fitting import fit_outputs, fitted_at_outputs
from onnxcompress.train.depth.supernet import build_supernet
from onnxcompress.train.depth.training import Lambdas
from onnxcompress.train.scale.axes import in_order
from onnxcompress.train.scale.given import Given
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
    front = CachedRuns(twin, given.calibration, settle=given.settles)
    order: list[Block] = []
    left, error = list(blocks), 0.0
    while left and len(order) < needed:
        errors = {}
        gone = [block.name for block in order]
        ahead = in_order(given.graph, left)
        runs = front
        for index, block in enumerate(ahead):
            say(f"block {len(order) + 1} of {needed} to go: {index + 1} of {len(left)} tried")
            lambdas.prune(gone)
            later = [supernet.lambdas[other.name] for other in ahead[index:]]
            runs.keep([*later, *fitted_at_outputs(twin)])  # tries share what is in front of their block
            if runs is front:
                runs = front.fork()  # and rounds what is in front of the first that is left
            lambdas.prune([*gone, block.name])
            errors[block.name] = _error(runs.fork(), given.original_runs)
            twin.load_state_dict(start)
        left.sort(key=lambda block: (errors[block.name] - error) / max(block.macs, 1))
        if len(blocks) > GREEDY_BLOCKS:
            return [*order, *left]
        best = left.pop(0)
        error = errors[best.name]
        logger.info("block %s goes as number %d, relative error %.3g", best.name, len(order) + 1, error)
        order.append(best)
    return order


def _error(runs: CachedRuns, original: CachedRuns) -> float:
    """Relative squared error of the outputs once the last linear operators have made up for it."""
    errors = []
    for fit in fit_outputs(runs, original):
        if math.isfinite(fit.after):
            errors.append(fit.after**2)
            continue
        runs.settle([fit.name])
        found, wanted = (torch.cat([one[fit.name].flatten() for one in of([fit.name])]) for of in (runs, original))
        errors.append(float((found - wanted).square().mean() / wanted.var(correction=0).clamp(min=1e-30)))
    return sum(errors) / len(errors)
