"""Fold BatchNormalization and constants per channel into the Gemms and MatMuls behind them.

    before   y = Gemm(s * x + t, W, c)          BatchNormalization, Mul, Div, Add, Sub, Neg, and runs of them
    after    y = Gemm(x, W', c')                W' = diag(s) W,  c' = c + t W

    before   y = Gemm(Flatten(s * x + t), W, c)  per channel of x, with a Flatten, a Reshape to (N, C * H * W) or a
    after    y = Gemm(Flatten(x), W', c')        GlobalAveragePool between; each s and t counts for H * W rows of W

All readers must be such nodes and take it in together; a Shape reads x instead. A MatMul has no bias: t W joins the
constant of the Add behind it, or the MatMul of matrices becomes a Gemm, or a new Add is made where nodes are saved all
the same. Exact up to rounding: max|d| / max|y| was 5.0e-7 at worst over 2000 random layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxcompress.graph import Graph, Node, Tensor, constant_value, is_constant, is_op, rank, static_shape
from onnxcompress.merging.channel_affine import (
    AFFINE_OPS,
    ChannelAffine,
    extend_backward,
    live_operand,
    read_affine_node,
    why_not_same_shape,
)
from onnxcompress.merging.gemm_nodes import (
    GemmChange,
    MatMulChange,
    apply_change,
    change_matmul,
    scale_gemm_input,
    scale_matmul_input,
)
from onnxcompress.rewrite import Miss, RewritePass


@dataclass(frozen=True)
class Site:
    affine: ChannelAffine
    changes: tuple[tuple[Node, GemmChange | MatMulChange], ...]


@dataclass(frozen=True)
class Route:
    """How channels reach matrices: what reads them, through which nodes, and their axis in a tensor of which rank."""

    readers: list[Node]
    through: list[Node]
    axis: int
    rank: int


class FuseBatchNormIntoNextGemm(RewritePass[Site]):
    name = "fuse-batchnorm-into-next-gemm"
    ops = AFFINE_OPS

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        source = live_operand(node)
        if source is None or is_constant(source):
            return None
        route = find_route(graph, node.outputs[0])
        if route is None or isinstance(route, str):
            return None if route is None else Miss(node.name, route)
        found = self.fold(graph, node, route)
        return Miss(node.name, found) if isinstance(found, str) else found

    def fold(self, graph: Graph, node: Node, route: Route) -> Site | str | None:
        heights = {_height(reader) for reader in route.readers}
        rows = heights.pop() if len(heights) == 1 else None
        if rows is None:
            return "the matrices are not of one height"
        if rows == 1 and rank(node.outputs[0]) is None and any(reader.op == "MatMul" for reader in route.readers):
            return "the rank is not known"  # a constant of one axis may make a row of a scalar
        channels = _channels(node, route, rows)
        if rows % channels:
            return f"{rows} rows are not a multiple of {channels} channels"
        affine = read_affine_node(graph, node, channels, route.rank, route.axis)
        if affine is None or isinstance(affine, str):
            return affine
        reason = why_not_same_shape(affine, route.rank, route.axis) or _why_not_rows(node.outputs[0], route, rows)
        if reason is not None:
            return reason
        affine = extend_backward(graph, affine, route.rank, route.axis)
        scale, shift = (np.repeat(values, rows // channels) for values in (affine.scale, affine.shift))
        limit = self.settings.max_constant_bytes
        changes: list[tuple[Node, GemmChange | MatMulChange]] = []
        for reader in route.readers:
            change: GemmChange | MatMulChange | str
            if reader.op == "Gemm":
                change = scale_gemm_input(reader, scale, shift, limit)
            else:
                change = scale_matmul_input(graph, reader, scale, shift, limit)
            if isinstance(change, str):
                return change
            changes.append((reader, change))
        added = sum(isinstance(change, MatMulChange) and change.needs_add(reader) for reader, change in changes)
        if added >= len(affine.nodes):
            return f"{added} new Adds would stand for {len(affine.nodes)} nodes"
        return Site(affine, tuple(changes))

    def rewrite(self, graph: Graph, site: Site) -> None:
        affine = site.affine
        graph.redirect(affine.output, affine.source)
        for reader, change in site.changes:
            if isinstance(change, GemmChange):
                apply_change(graph, reader, change)
            else:
                change_matmul(graph, reader, change)
        graph.remove(*reversed(affine.nodes))


def find_route(graph: Graph, tensor: Tensor) -> Route | str | None:
    """How ``tensor`` reaches Gemms and MatMuls; None where it does not, and a reason where other nodes read it too."""
    through: list[Node] = []
    end = tensor
    while (step := graph.only_reader(end)) is not None and is_op(step, "Flatten", "Reshape", "GlobalAveragePool"):
        through.append(step)
        end = step.outputs[0]
    readers = [reader for reader in dict.fromkeys(end.outputs) if through or not _reads_shape(graph, reader)]
    if not any(_reads_rows(graph, reader, end) for reader in readers):
        return None
    if graph.is_output(end) or not all(_reads_rows(graph, reader, end) for reader in readers):
        return "what the matrices are applied to is read elsewhere"
    known = rank(tensor)
    if through:
        return "the rank is not known" if known is None else Route(readers, through, 1, known)
    if any(reader.op == "Gemm" for reader in readers):
        known = 2
    # Without a rank, something is known of the last axis alone.
    return Route(readers, through, (known or 1) - 1, known or 1)


def _reads_shape(graph: Graph, reader: Node) -> bool:
    return is_op(reader, "Shape") and reader.graph is graph


def _reads_rows(graph: Graph, reader: Node, tensor: Tensor) -> bool:
    """Whether ``reader`` multiplies ``tensor`` by a constant matrix from the right."""
    places = [i for i, other in enumerate(reader.inputs) if other is tensor]
    return reader.graph is graph and places == [0] and is_op(reader, "Gemm", "MatMul") and is_constant(reader.inputs[1])


def _height(reader: Node) -> int | None:
    """Rows of the constant matrix, more than none."""
    shape = static_shape(reader.inputs[1])
    if shape is None or len(shape) < 2:
        return None
    return (shape[-1] if reader.op == "Gemm" and reader.attrs.get("transB", 0) else shape[-2]) or None


def _channels(node: Node, route: Route, rows: int) -> int:
    """Channels of what ``node`` makes; 1 stands for an unknown number, with which scalars can do."""
    if not route.through:
        return rows
    if node.op == "BatchNormalization":
        return int(node.inputs[1].shape[0]) if is_constant(node.inputs[1]) else 1
    shape = node.outputs[0].shape
    known = shape[1] if shape is not None and len(shape) > 1 else None
    return int(known) if isinstance(known, (int, np.integer)) and known > 0 else 1


def _why_not_rows(tensor: Tensor, route: Route, rows: int) -> str | None:
    """The reason why the nodes on the way may not lay each sample, channel by channel, into one row, or None.

    They keep the order of the elements, so that it is enough to know that a row is as long as a sample, or that every
    node leaves the axis of samples alone.
    """
    sizes = list((tensor.shape or [None])[1:])
    for position, node in enumerate(route.through):
        if is_op(node, "GlobalAveragePool"):
            if position > 0:
                return "the channels are pooled after they were moved"
            sizes[1:] = [1] * len(sizes[1:])
    if all(isinstance(size, (int, np.integer)) for size in sizes) and int(np.prod(sizes)) == rows:
        return None
    for node in route.through:
        if is_op(node, "Flatten") and node.attrs.get("axis", 1) not in (1, 1 - (rank(node.inputs[0]) or 0)):
            return "the Flatten does not keep one row for each sample"
        if is_op(node, "Reshape"):
            wanted = constant_value(node.inputs[1])
            if wanted is None or len(wanted) != 2 or wanted[0] != 0 or node.attrs.get("allowzero", 0):
                return "the Reshape is not known to keep one row for each sample"
    return None
