"""Chains of Conv nodes with nothing between them, and the segments of a chain that pay as one Conv."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from onnxcompress.cost import GROWTH_ALLOWANCE_BYTES, CostModel, OperatorSpec, why_not_pay
from onnxcompress.graph import Graph, Node, is_op
from onnxcompress.linear import ConvOp
from onnxcompress.linear.chain import ChainGeometry, Merged, Plan
from onnxcompress.linear.nodes import read_conv, spatial_sizes
from onnxcompress.merging.partition import SegmentPrice, fastest_partition
from onnxcompress.merging.paths import (
    Path,
    kept_bytes,
    looks_linear,
    nominal_shape,
    path_specs,
    plan_specs,
    read_path,
    why_not_merge,
)

LONGEST_SEGMENT = 8


@dataclass(frozen=True, eq=False)
class Segment:
    """Nodes of a chain that become one convolution, and what both cost."""

    nodes: tuple[Node, ...]
    plan: Plan
    merged: Merged
    before: tuple[OperatorSpec, ...]
    after: tuple[OperatorSpec, ...]


def chain_from(graph: Graph, node: Node) -> list[Node]:
    """The maximal chain that starts at ``node``, each node read by the next alone; empty if none starts there."""
    if not is_link(node):
        return []
    maker = graph.producer(node.inputs[0])
    if maker is not None and is_link(maker) and graph.feeds_only(node.inputs[0], node):
        return []
    nodes = [node]
    while True:
        reader = graph.only_reader(nodes[-1].outputs[0])
        if reader is None or not is_link(reader):
            return nodes
        nodes.append(reader)


def is_link(node: Node) -> bool:
    """Whether the node can be part of a chain: a Conv, or an AveragePool that is one, with constant numbers."""
    return is_op(node, "Conv", "AveragePool") and looks_linear(node)


def readable_runs(nodes: Sequence[Node]) -> list[list[Node]]:
    """Parts of a chain of two nodes and more, with a Conv, whose numbers are known."""
    runs: list[list[Node]] = [[]]
    for node in nodes:
        if is_op(node, "Conv") and isinstance(read_conv(node), str):
            runs.append([])
        else:
            runs[-1].append(node)
    return [run for run in runs if len(run) > 1 and any(node.op == "Conv" for node in run)]


def segments_that_pay(
    graph: Graph, nodes: Sequence[Node], cost: CostModel, *, approximate: bool = False
) -> list[Segment] | str:
    """The segments of the fastest partition of a chain, or the reason why it stays as it is.

    A segment must pay on its own; the partition may not grow the file. With ``approximate`` class 4 takes part.
    """
    source = nodes[0].inputs[0]
    ops = read_path(graph, Path(source, tuple(nodes)))
    if isinstance(ops, str):
        return ops
    try:
        geometry = ChainGeometry(ops, spatial_sizes(source, ops[0]), approximate=approximate)
    except ValueError as error:
        return str(error)
    prices = _SegmentPrices(nodes, ops, geometry, cost)
    while True:
        best = fastest_partition(len(ops), prices.price, growth_bytes=GROWTH_ALLOWANCE_BYTES, longest=LONGEST_SEGMENT)
        if not best.merged:
            return prices.reason
        segments = [prices.merge(start, stop) for start, stop in best.merged]
        if None not in segments:  # else without those whose values do not fit the dtype
            return [segment for segment in segments if segment is not None]


class _SegmentPrices:
    """The plans of the segments of one chain, and the reason nearest to paying of those that do not."""

    def __init__(self, nodes: Sequence[Node], ops: Sequence[ConvOp], geometry: ChainGeometry, cost: CostModel) -> None:
        self.nodes, self.geometry, self.cost = tuple(nodes), geometry, cost
        self.specs = path_specs(nodes, ops, nominal_shape(nodes[0].inputs[0], ops[0].spatial_rank))
        self.plans: dict[tuple[int, int], Plan] = {}
        self.prices: dict[tuple[int, int], SegmentPrice | None] = {}
        self.reason, self._distance = "", math.inf

    def price(self, start: int, stop: int) -> SegmentPrice | None:
        if (start, stop) not in self.prices:
            self.prices[start, stop] = self._price(start, stop)
        return self.prices[start, stop]

    def _price(self, start: int, stop: int) -> SegmentPrice | None:
        before = self.specs[start:stop]
        old = self.cost.price(before)
        if stop - start == 1:
            return SegmentPrice(old.latency_ms, 0)
        if not any(node.op == "Conv" for node in self.nodes[start:stop]):
            return None
        plan = self.geometry.plan(start, stop)
        if isinstance(plan, str):
            self._refuse(plan, math.inf)
            return None
        self.plans[start, stop] = plan
        after = self._after(start, stop)
        new = self.cost.price(after)
        reason = why_not_merge(self.cost, before, after, self.nodes[start:stop])
        if reason is not None:
            self._refuse(reason, new.latency_ms / max(old.latency_ms, 1e-12))
        # Growth alone does not rule a segment out: another may save as much.
        if why_not_pay(self.cost, before, after, growth_bytes=new.weight_bytes) is not None:
            return None
        growth = new.weight_bytes - old.weight_bytes + kept_bytes(self.nodes[start:stop])
        return SegmentPrice(new.latency_ms, growth)

    def merge(self, start: int, stop: int) -> Segment | None:
        plan = self.plans[start, stop]
        try:
            merged = plan.merge()
        except OverflowError as error:
            self._refuse(str(error), 0.0)
            self.prices[start, stop] = None
            return None
        before, after = self.specs[start:stop], self._after(start, stop)
        return Segment(self.nodes[start:stop], plan, merged, tuple(before), tuple(after))

    def _after(self, start: int, stop: int) -> list[OperatorSpec]:
        shape = self.specs[start].input_shape
        return plan_specs(self.plans[start, stop], (shape[0], *shape[2:]))

    def _refuse(self, reason: str, distance: float) -> None:
        if not self.reason or distance < self._distance:
            self.reason, self._distance = reason, distance
