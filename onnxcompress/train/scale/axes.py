"""The three axes of a graph: which blocks go in which order, which channels, and how many pixels stay.

Each axis is a ladder of levels; level 0 is everything, and each further level takes more of the same: a triple of
levels is one pruned network, whatever way led to it.

    depth        residual blocks deleted, the least important first
    width        channels removed, each time those of the group that cost least for the MACs that they save
    resolution   the input made smaller, all sizes inside with it

A node's MACs are a product of its channels and of its places, and a block is there or not. So the MACs of every triple
follow exactly from those of the nodes on the three axes alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from onnxcompress.channels.allocation import Limits
from onnxcompress.channels.groups import Channels, Group, MacsModel, find_channels
from onnxcompress.channels.ranking import Ranking
from onnxcompress.channels.removing import remove_channels
from onnxcompress.cost import count, node_macs
from onnxcompress.graph import Graph
from onnxcompress.shapes import infer_shapes
from onnxcompress.train.depth.blocks import Block
from onnxcompress.train.depth.preparation import copy_graph
from onnxcompress.train.depth.supernet import delete_block
from onnxcompress.train.scale.solving import CostTable, Levels

MOST_WIDTHS = 48  # levels of an axis
MOST_RESOLUTIONS = 24
LEAST_RESOLUTION = 0.25


@dataclass(frozen=True)
class Ladders:
    """What goes at each level of each axis.

    Attributes:
        blocks: In the order in which they go; level i has the first i of them deleted.
        block_count: Residual blocks in all.
        orders: Channels of each group, the first to go first.
        widths: By level how many channels of each group go.
        width_sizes: By level the share of the channels that stays.
        pixels: By level the height of what the network computes on.
        refusals: Why an axis has no levels, by axis.
    """

    blocks: tuple[Block, ...] = ()
    block_count: int = 0
    orders: dict[str, list[int]] = field(default_factory=dict)
    widths: tuple[dict[str, int], ...] = ({},)
    width_sizes: tuple[float, ...] = (1.0,)
    pixels: tuple[int, ...] = (1,)
    refusals: dict[str, str] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[tuple[float, ...], ...]:
        """By axis what is left at each level."""
        whole = max(self.block_count, 1)
        depth = tuple(1.0 - level / whole for level in range(len(self.blocks) + 1))
        return depth, self.width_sizes, tuple(pixels / self.pixels[0] for pixels in self.pixels)

    def gone(self, start: int, end: int) -> dict[str, list[int]]:
        """Channels that go between two levels, numbered as they are after the first; of groups that lose any."""
        found = {}
        for name, taken in self.widths[end].items():
            before = self.widths[start].get(name, 0)
            if taken > before:
                order = self.orders[name]
                left = sorted(set(order) - set(order[:before]))
                place = {channel: index for index, channel in enumerate(left)}
                found[name] = sorted(place[channel] for channel in order[before:taken])
        return found

    def as_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = asdict(self)
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Ladders:
        """Read what ``as_dict`` gave, or JSON made of it."""

        def tuples(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

        named = {**tuples(plain), "blocks": tuple(Block(**tuples(block)) for block in plain["blocks"])}
        return cls(**named)


# -- ladders -----------------------------------------------------------------------------------------------------------


def width_ladder(
    channels: Channels, rankings: Mapping[str, Ranking], limits: Limits, least_macs: float
) -> tuple[dict[str, list[int]], list[dict[str, int]], list[float]]:
    """Orders, levels and sizes of the width axis.

    Groups that count otherwise than with zeros stay: rankings see one layer at a time, and little of what a stream
    under LayerNormalizations is to all of them: deit_mini on digits at 0.5x falls from 97 to 70 % with its stream
    pruned.

    Args:
        channels: Of the prepared graph.
        rankings: Of the groups that may be pruned.
        limits: How far groups may shrink.
        least_macs: Where to stop.

    Returns:
        As in ``Ladders``; one level where there is nothing to remove.
    """
    model = MacsModel(channels)
    groups = [g for g in channels.groups if not g.frozen and not g.approximate and g.name in rankings]
    counts = {group.name: limits.counts(group) for group in groups}
    place = dict.fromkeys(counts, 0)
    gone = np.zeros(channels.count + 1, bool)
    whole = sum(group.size * group.width for group in groups)
    left = whole
    macs = start = model.macs_of(gone)
    steps: list[tuple[float, dict[str, int], float]] = []
    while macs > least_macs:
        found = _cheapest(model, gone, groups, counts, place, rankings)
        if found is None:
            break
        group, chosen = found
        gone[[group.atoms[index] for index in chosen]] = True
        place[group.name] += 1
        left -= len(chosen) * group.width
        macs = model.macs_of(gone)
        taken = {g.name: g.size - counts[g.name][place[g.name]] for g in groups if place[g.name]}
        steps.append((macs, taken, left / whole))
    kept = _spread([macs for macs, _, _ in steps], start, MOST_WIDTHS - 1)
    orders = {group.name: [int(i) for i in rankings[group.name].order] for group in groups}
    return orders, [{}, *(steps[i][1] for i in kept)], [1.0, *(steps[i][2] for i in kept)]


def _cheapest(
    model: MacsModel,
    gone: np.ndarray,
    groups: Sequence[Group],
    counts: Mapping[str, Sequence[int]],
    place: Mapping[str, int],
    rankings: Mapping[str, Ranking],
) -> tuple[Group, list[int]] | None:
    """The next step that costs least for each MAC that it saves."""
    best: tuple[float, Group, list[int]] | None = None
    for group in groups:
        here, level = counts[group.name], place[group.name]
        if level + 1 >= len(here):
            continue
        ranking = rankings[group.name]
        part = slice(group.size - here[level], group.size - here[level + 1])
        chosen = [int(i) for i in ranking.order[part]]
        atoms = [group.atoms[i] for i in chosen]
        before = model.macs_near(gone, group)
        gone[atoms] = True
        saved = before - model.macs_near(gone, group)
        gone[atoms] = False
        cost = float(ranking.costs[part].sum())
        if saved > 0 and math.isfinite(cost) and (best is None or cost / saved < best[0]):
            best = cost / saved, group, chosen
    return None if best is None else best[1:]


def _spread(values: Sequence[float], start: float, most: int) -> list[int]:
    """Numbers of at most so many falling values, about evenly spaced, the last one among them."""
    if len(values) <= most:
        return list(range(len(values)))
    wanted = start + (values[-1] - start) * np.arange(1, most + 1) / most
    found = {int(np.argmin(np.abs(np.array(values) - value))) for value in wanted}
    return sorted(found | {len(values) - 1})


def pixel_ladder(graph: Graph, least_macs: float) -> list[int]:
    """Heights from all pixels down to where the MACs are few enough, or nearly nothing is left to see.

    Raises:
        OnnxCompressError: The graph cannot be scaled; says why.
    """
    from onnxcompress.resolution.scaling import admissible_ratios

    full = int(scale(copy_graph(graph), 1.0).old[0])
    step = 1
    while full * (1 - LEAST_RESOLUTION) / step > MOST_RESOLUTIONS:
        step *= 2
    heights = range(full - step, max(1, math.ceil(LEAST_RESOLUTION * full)) - 1, -step)
    ratios = admissible_ratios(copy_graph(graph), heights=heights)
    if len(ratios) < 2 and heights:
        scale(copy_graph(graph), heights[0] / full)  # says why
    found = [full]
    for ratio in sorted(ratios, reverse=True)[1:]:
        copied = copy_graph(graph)
        scale(copied, ratio)
        found.append(round(ratio * full))
        if count(copied).macs <= least_macs:
            break
    return found


def scale(graph: Graph, ratio: float, *, native: bool = False) -> Any:
    """Make a graph compute on a smaller image, in place."""
    from onnxcompress.resolution.scaling import scale_resolution

    found = scale_resolution(graph, ratio, native=native)
    infer_shapes(graph)
    return found


# -- structures --------------------------------------------------------------------------------------------------------


def structure(graph: Graph, ladders: Ladders, levels: Levels, *, native: bool = False) -> Graph:
    """A copy of the prepared graph at a triple of levels; the weights that stay are as they were."""
    depth, width, resolution = levels
    copied = copy_graph(graph)
    delete_blocks(copied, ladders.blocks[:depth])
    if depth:
        copied.sort()
        infer_shapes(copied)
    remove(copied, ladders.gone(0, width))
    if resolution:
        scale(copied, ladders.pixels[resolution] / ladders.pixels[0], native=native)
    return copied


def in_order(graph: Graph, blocks: Sequence[Block]) -> list[Block]:
    """Blocks in order of execution."""
    order = {node.name: i for i, node in enumerate(graph.nodes)}
    return sorted(blocks, key=lambda block: max(order[name] for name in (*block.nodes, block.add) if name))


def delete_blocks(graph: Graph, blocks: Sequence[Block]) -> None:
    """Delete blocks in place, the last one first: a block that reads what another gives is known by its name."""
    for block in reversed(in_order(graph, blocks)):
        delete_block(graph, block)


def remove(graph: Graph, gone: Mapping[str, Sequence[int]]) -> None:
    """Take channels out of the groups that are still there, in place."""
    if gone:
        channels = find_channels(graph)
        remove_channels(channels, {name: chosen for name, chosen in gone.items() if name in channels.by_name})


def count_all(graph: Graph, ladders: Ladders, original_macs: float) -> CostTable:
    """MACs of every triple.

    Args:
        graph: Prepared.
        ladders: Its levels.
        original_macs: Of the file, what a goal refers to.
    """
    total = count(graph).macs
    base = {node.name: float(node_macs(node)[0]) for node in graph.nodes}
    names = [name for name, macs in base.items() if macs]
    macs = np.array([base[name] for name in names])
    nested = total - macs.sum()

    there = np.ones((len(ladders.blocks) + 1, len(names)))
    for level in range(1, len(ladders.blocks) + 1):
        copied = copy_graph(graph)
        delete_blocks(copied, ladders.blocks[:level])
        left = {node.name for node in copied.nodes}
        there[level] = [name in left for name in names]

    model = MacsModel(find_channels(graph))
    wide = np.ones((len(ladders.widths), len(names)))
    for level in range(1, len(ladders.widths)):
        by_node = model.macs_by_node(ladders.gone(0, level))
        wide[level] = [by_node.get(name, base[name]) / base[name] for name in names]

    large = np.ones((len(ladders.pixels), len(names)))
    resizing = np.zeros(len(ladders.pixels))
    for level in range(1, len(ladders.pixels)):
        scaled = copy_graph(graph)
        scale(scaled, ladders.pixels[level] / ladders.pixels[0])
        found = {node.name: float(node_macs(node)[0]) for node in scaled.nodes}
        large[level] = [found.get(name, 0.0) / base[name] for name in names]
        resizing[level] = sum(macs for name, macs in found.items() if name not in base)
    costs = nested + np.einsum("n,dn,wn,rn->dwr", macs, there, wide, large) + resizing
    return CostTable(ladders.sizes, np.round(costs), original_macs)
