"""The ladders of a model: in which order blocks and channels go, and how many pixels can. Made once, and kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from onnxcompress.channels.allocation import Limits
from onnxcompress.channels.compensation import rank_by_data
from onnxcompress.channels.groups import find_channels
from onnxcompress.channels.options import Goal
from onnxcompress.channels.ranking import magnitudes
from onnxcompress.errors import OnnxCompressError, RecipeError
from onnxcompress.train.checkpoint import difference
from onnxcompress.train.depth.search import write_whole
from onnxcompress.train.scale.axes import Ladders, pixel_ladder, width_ladder
from onnxcompress.train.scale.collecting import WAY_OUT
from onnxcompress.train.scale.given import Given
from onnxcompress.train.scale.ranking import rank_blocks, residual_blocks

logger = logging.getLogger(__name__)

_SLACK = 0.95  # of the MACs of a goal: merged, a graph may have more than are counted

Say = Callable[[str], None]


def kept_ladders(given: Given, goal: Goal, path: Path, say: Say) -> Ladders:
    """Of an earlier run of the same settings, or made now and written.

    Args:
        given: Model and samples.
        goal: To which each axis alone should reach.
        path: Where they are kept.
        say: Told what is being done.

    Raises:
        RecipeError: There is nothing to prune, or the file is of another run.
    """
    identity = json.loads(json.dumps(given.identity()))
    if given.options.resume and path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            theirs, ladders = found["identity"], Ladders.from_dict(found["ladders"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"the ladders {path} cannot be read ({error}): {WAY_OUT}") from error
        changed = difference(theirs, identity)
        if changed:
            raise RecipeError(f"the ladders {path} are of another run: {changed}; {WAY_OUT}")
        return ladders
    ladders = make_ladders(given, goal, say)
    write_whole(path, json.dumps({"identity": identity, "ladders": ladders.as_dict()}))
    return ladders


def make_ladders(given: Given, goal: Goal, say: Say) -> Ladders:
    """The ladders of a model, as far as an axis alone has to go for a goal."""
    options, graph = given.options, given.graph
    refusals: dict[str, str] = {}
    ladders = Ladders()
    # An axis alone has to reach the goal, merged: further levels are of no use. Latency falls less than MACs do.
    share = goal.amount if goal.relative else goal.amount / given.figures.macs
    least = (_SLACK if goal.kind == "macs" else 0.5) * share * given.figures.macs
    if "depth" in options.axes:
        blocks, whole = residual_blocks(graph, only=options.only, skip=options.skip)
        if blocks:
            order = rank_blocks(given, blocks, least, say)
            ladders = replace(ladders, blocks=tuple(order), block_count=whole)
        else:
            refusals["depth"] = f"none of {whole} residual blocks can be deleted"
    if "width" in options.axes:
        say("ranking channels")
        channels = find_channels(graph)
        if options.width_ranking == "data":
            samples = given.samples
            rankings = rank_by_data(channels, samples, given.runtime, judged=samples[-1:], seed=options.training.seed)
        else:
            rankings = magnitudes(channels)
        limits = Limits(options.round_to, options.min_keep)
        orders, widths, sizes = width_ladder(channels, rankings, limits, least)
        if len(widths) > 1:
            ladders = replace(ladders, orders=orders, widths=tuple(widths), width_sizes=tuple(sizes))
        else:
            kept = [group.frozen or group.approximate for group in channels.groups]
            why = next(filter(None, kept), "there is none")
            refusals["width"] = f"no channel group can be pruned: {why}"
    if "resolution" in options.axes:
        say("scaling the resolution")
        try:
            ladders = replace(ladders, pixels=tuple(pixel_ladder(graph, least)))
        except OnnxCompressError as error:
            refusals["resolution"] = str(error)
    if set(options.axes) <= set(refusals):
        raise RecipeError(f"there is nothing to prune: {'; '.join(refusals.values())}")
    for axis, reason in refusals.items():
        logger.warning("%s is not pruned: %s", axis, reason)
    return replace(ladders, refusals=refusals)
