"""Fuse two Slices that follow each other.

    before   y = Slice(Slice(x, starts = [1], ends = [9], axes = [2]), starts = [0], ends = [4], axes = [3])
    after    y = Slice(x, starts = [1, 0], ends = [9, 4], axes = [2, 3])

Exact. On a shared axis both must take forward steps of 1 and count from the front.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxcompress.graph import Graph, Node, constant_value, is_op, optional_input, rank
from onnxcompress.rewrite import Miss, RewritePass


@dataclass(frozen=True)
class Cut:
    """start:end:step of one axis."""

    start: int
    end: int
    step: int = 1

    def then(self, other: Cut) -> Cut | None:
        """This cut followed by another of the same axis; None where that depends on the axis's size."""
        if self.step != 1 or other.step != 1 or min(self.start, self.end, other.start, other.end) < 0:
            return None
        return Cut(self.start + other.start, min(self.end, self.start + other.end))


@dataclass(frozen=True)
class Site:
    first: Node
    second: Node
    cuts: dict[int, Cut]


class FuseSliceChain(RewritePass[Site]):
    name = "fuse-slice-chain"
    ops = ("Slice",)

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        first = graph.producer(node.inputs[0])
        if first is None or not is_op(first, "Slice"):
            return None
        if not graph.feeds_only(first.outputs[0], node):
            return Miss(node.name, "the first Slice is read elsewhere")
        cuts, more = read_cuts(first), read_cuts(node)
        if cuts is None or more is None:
            return Miss(
                node.name, "the bounds are computed, or an axis counts from the end of an unknown number of axes"
            )
        for axis, cut in more.items():
            joined = cuts[axis].then(cut) if axis in cuts else cut
            if joined is None:
                return Miss(node.name, f"both slice axis {axis}, from its end or in steps")
            cuts[axis] = joined
        return Site(first, node, cuts)

    def rewrite(self, graph: Graph, site: Site) -> None:
        first, second = site.first, site.second
        axes = sorted(site.cuts)
        cuts = [site.cuts[axis] for axis in axes]
        source = first.inputs[0]
        if "starts" in second.attrs:
            second.inputs = [source]
            second.attrs.update(axes=axes, starts=[cut.start for cut in cuts], ends=[cut.end for cut in cuts])
        else:
            columns = {"starts": [c.start for c in cuts], "ends": [c.end for c in cuts], "axes": axes}
            if any(cut.step != 1 for cut in cuts):
                columns["steps"] = [cut.step for cut in cuts]
            label = second.name or "slice"
            made = [graph.new_constant(f"{label}.{key}", np.array(value, np.int64)) for key, value in columns.items()]
            second.inputs = [source, *made]
        graph.remove(first)
        graph.touch(second)


def read_cuts(node: Node) -> dict[int, Cut] | None:
    """What a Slice takes of which axis, axes counted from the front; None where that is not known."""
    if "starts" in node.attrs:
        columns = [node.attrs.get(name) for name in ("starts", "ends", "axes")] + [None]
    else:
        columns = []
        for index in (1, 2, 3, 4):
            tensor = optional_input(node, index)
            values = constant_value(tensor, limit=64)
            if values is None and tensor is not None:
                return None
            columns.append(None if values is None else values.reshape(-1).tolist())
    starts, ends, axes, steps = columns
    if starts is None or ends is None:
        return None
    count = rank(node.inputs[0])
    axes = range(len(starts)) if axes is None else axes
    if count is None and any(axis < 0 for axis in axes):
        return None
    steps = [1] * len(starts) if steps is None else steps
    places = [axis if axis >= 0 else axis + (count or 0) for axis in axes]
    if len(set(places)) != len(places):
        return None
    return {axis: Cut(*cut) for axis, *cut in zip(places, starts, ends, steps, strict=True)}
