"""Merge a 1x1 Conv into the ConvTranspose before or after it.

    before   y = Conv(ConvTranspose(x, W, b), V, c)          V 1x1
    after    y = ConvTranspose(x, W', V b + c)               W'[i, o, u] = sum_m W[i, m, u] V[o, m]
    before   y = ConvTranspose(Conv(x, V), W, b)             V 1x1, without a bias
    after    y = ConvTranspose(x, W', b)                     W'[i, o, u] = sum_m V[m, i] W[m, o, u]

Exact for any strides, pads, dilations and groups. A bias before a ConvTranspose would become a map with the period of
the strides, other at the border: such a pair stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcompress.cost import OperatorSpec
from onnxcompress.graph import Graph, Node, Tensor, constant_value, is_op, optional_input
from onnxcompress.linear import (
    ConvOp,
    ConvTransposeOp,
    compose_transpose,
    why_not_compose_transpose,
    why_not_pointwise,
)
from onnxcompress.linear.chain import has_bias
from onnxcompress.linear.conv import compose
from onnxcompress.linear.nodes import FLOATS, conv_spec_at, read_conv
from onnxcompress.merging.paths import change_in_macs, nominal_shape, why_not_merge
from onnxcompress.rewrite import Miss, RewritePass


@dataclass(frozen=True, eq=False)
class Site:
    """``first`` and ``second`` go; ``transpose`` is the one of them whose attributes the new node has."""

    first: Node
    second: Node
    transpose: Node
    merged: ConvTransposeOp
    macs: str


class FuseConvIntoConvTranspose(RewritePass[Site]):
    name = "fuse-conv-into-conv-transpose"
    ops = ("ConvTranspose",)
    is_merge = True

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        refused: Miss | None = None
        before, after = graph.producer(node.inputs[0]), graph.only_reader(node.outputs[0])
        for first, second in ((node, after), (before, node)):
            conv = second if first is node else first
            if first is None or second is None or not is_op(conv, "Conv") or second.inputs[0] is not first.outputs[0]:
                continue
            found = self.pair(graph, first, second)
            if isinstance(found, Site):
                return found
            refused = Miss(node.name, found)
        return refused

    def pair(self, graph: Graph, first: Node, second: Node) -> Site | str:
        if not graph.feeds_only(first.outputs[0], second):
            return f"the {first.op} output is read elsewhere"
        node, other = (first, second) if first.op == "ConvTranspose" else (second, first)
        transpose, conv = read_transpose(node), read_conv(other)
        if isinstance(transpose, str) or isinstance(conv, str):
            return transpose if isinstance(transpose, str) else str(conv)
        reason = why_not_compose_transpose(transpose, conv) if node is first else why_not_before(conv, transpose)
        if reason is not None:
            return reason
        specs, merged_spec = self.specs(first, node, transpose, conv)
        reason = why_not_merge(self.settings.cost, specs, [merged_spec], [first, second])
        if reason is not None:
            return reason
        try:
            merged = compose_transpose(transpose, conv) if node is first else compose_before(conv, transpose)
        except OverflowError as error:
            return str(error)
        return Site(first, second, node, merged, change_in_macs(specs, [merged_spec]))

    def specs(
        self, first: Node, node: Node, transpose: ConvTransposeOp, conv: ConvOp
    ) -> tuple[list[OperatorSpec], OperatorSpec]:
        """What the pair costs, and what it would as one ConvTranspose."""
        at = nominal_shape(first.inputs[0], conv.spatial_rank)
        group = math.gcd(transpose.group, conv.group)
        ends = (
            (transpose.in_channels, conv.out_channels) if node is first else (conv.in_channels, transpose.out_channels)
        )
        shape = (ends[0], ends[1] // group, *transpose.weight.shape[2:])
        bias = (node is first and has_bias(conv)) or transpose.bias is not None
        zero = np.zeros((), transpose.weight.dtype)
        after = ConvTransposeOp(np.broadcast_to(zero, shape), np.broadcast_to(zero, ends[1:]) if bias else None, group)
        old = transpose_spec(node, transpose, at)
        here = (at[0], *old.output_shape[2:]) if node is first else at
        return [old, conv_spec_at(conv, here)], transpose_spec(node, after, at)

    def rewrite(self, graph: Graph, site: Site) -> None:
        node, merged = site.transpose, site.merged
        name = node.name or "conv_transpose"
        inputs: list[Tensor] = [site.first.inputs[0], graph.new_constant(f"{name}.weight", merged.weight)]
        if merged.bias is not None:
            inputs.append(graph.new_constant(f"{name}.bias", merged.bias))
        attrs = {**node.attrs, "group": merged.group}
        graph.insert("ConvTranspose", inputs, [site.second.outputs[0]], attrs, before=site.second, name=name)
        graph.remove(site.second, site.first)

    def detail(self, site: Site) -> str:
        return f"{site.first.op}, {site.second.op} -> ConvTranspose, {site.macs}"


def read_transpose(node: Node) -> ConvTransposeOp | str:
    """A ConvTranspose node's numbers, or the reason why they are not known."""
    weight, bias_tensor = constant_value(node.inputs[1]), optional_input(node, 2)
    bias = constant_value(bias_tensor)
    if weight is None or (bias_tensor is not None and bias is None):
        return "a weight or a bias is not a constant"
    if weight.dtype.name not in FLOATS:
        return f"the weight is {weight.dtype.name}, not floating point"
    if not np.isfinite(weight).all() or (bias is not None and not np.isfinite(bias).all()):
        return "a weight is not finite"
    return ConvTransposeOp(weight, bias, int(node.attrs.get("group", 1)))


def why_not_before(first: ConvOp, second: ConvTransposeOp) -> str | None:
    """Why a Conv before a ConvTranspose is not one ConvTranspose, or None where it is."""
    if first.weight.ndim != second.weight.ndim or first.weight.dtype != second.weight.dtype:
        return "dtype or number of spatial axes differs"
    if first.out_channels != second.in_channels:
        return f"the first gives {first.out_channels} channels, the second takes {second.in_channels}"
    if has_bias(first):
        return "the bias of the Conv would become a map that the ConvTranspose repeats with its strides"
    return why_not_pointwise(first)


def compose_before(first: ConvOp, second: ConvTransposeOp) -> ConvTransposeOp:
    """1x1 Conv -> ConvTranspose as one ConvTranspose of the geometry of ``second``; the group is the gcd of both."""
    # Read from output to input both are convolutions: that of the ConvTranspose, then that of the Conv, transposed.
    kernel, ones, zeros = second.weight.shape[2:], (1,) * first.spatial_rank, (0,) * first.spatial_rank
    rows, columns = first.out_channels // first.group, first.weight.shape[1]
    turned = first.weight.reshape(first.group, rows, columns).swapaxes(1, 2).reshape(-1, rows, *ones)
    backward = compose(
        ConvOp(second.weight, None, ones, ones, zeros, zeros, second.group),
        ConvOp(turned, None, ones, ones, zeros, zeros, first.group),
    )
    return ConvTransposeOp(backward.weight.reshape(first.in_channels, -1, *kernel), second.bias, backward.group)


def transpose_spec(node: Node, op: ConvTransposeOp, batch_and_size: tuple[int, ...]) -> OperatorSpec:
    """What ``op`` costs with the geometry of ``node``; for auto_pad and output_shape, about."""
    weights: list[tuple[int, ...]] = [tuple(op.weight.shape)]
    if op.bias is not None:
        weights.append(tuple(op.bias.shape))
    names = ("strides", "dilations", "output_padding", "pads")
    attrs: list[tuple[str, Any]] = [
        ("group", op.group),
        *((name, tuple(node.attrs[name])) for name in names if name in node.attrs),
    ]
    shape = (batch_and_size[0], op.in_channels, *batch_and_size[1:])
    return OperatorSpec("ConvTranspose", shape, tuple(weights), tuple(attrs), dtype=op.weight.dtype.name)
