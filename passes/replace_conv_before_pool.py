"""Pool first, then apply the 1x1 Conv: both orders give the same, and the Conv then runs at fewer positions.

    before   y = GlobalAveragePool(Conv(x, W, b))               or AveragePool, or ReduceMean over all spatial axes
    after    y = Conv(GlobalAveragePool(x), W, b)

A mean over positions and a matrix over channels commute, and the bias passes a mean unchanged. An AveragePool that
counts its padding shrinks it at the border: there it must be zero. Strides and windows of any size will do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxcompress.cost import OperatorSpec
from onnxcompress.graph import Graph, Node, is_op
from onnxcompress.linear import ConvOp, why_not_pointwise
from onnxcompress.linear.chain import has_bias
from onnxcompress.linear.nodes import conv_spec_at, explicit_pads, read_conv
from onnxcompress.merging.gemm_heads import is_global_mean, keeps_axes
from onnxcompress.merging.paths import change_in_macs, looks_linear, nominal_shape, why_not_merge
from onnxcompress.passes.fuse_conv_into_global_pool_gemm import pool_first
from onnxcompress.rewrite import Miss, RewritePass


@dataclass(frozen=True, eq=False)
class Site:
    node: Node
    conv: ConvOp
    pool: Node
    macs: str


class ReplaceConvBeforePool(RewritePass[Site]):
    name = "replace-conv-before-pool"
    ops = ("Conv",)
    is_merge = True

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        pool = graph.only_reader(node.outputs[0])
        axes = len(node.inputs[1].shape or ())
        if pool is None or not looks_linear(node) or not (is_op(pool, "AveragePool") or is_global_mean(pool, axes)):
            return None
        conv = read_conv(node)
        if isinstance(conv, str):
            return Miss(node.name, conv)
        reason = why_not_pointwise(conv) or why_not_commute(pool, conv)
        if reason is not None:
            return Miss(node.name, reason)
        at = nominal_shape(node.inputs[0], conv.spatial_rank)
        wide, narrow = pool_spec(pool, conv.in_channels, at, conv), pool_spec(pool, conv.out_channels, at, conv)
        before = [conv_spec_at(conv, at), narrow]
        after = [wide, conv_spec_at(conv, (at[0], *wide.output_shape[2:]))]
        reason = why_not_merge(self.settings.cost, before, after, [])
        if reason is not None:
            return Miss(node.name, reason)
        return Site(node, conv, pool, change_in_macs(before, after))

    def rewrite(self, graph: Graph, site: Site) -> None:
        node, pool, conv = site.node, site.pool, site.conv
        pooled = pool_first(graph, pool, node).outputs[0]
        output, weights = pool.outputs[0], list(node.inputs[1:])
        if keeps_axes(pool):
            graph.insert("Conv", [pooled, *weights], [output], dict(node.attrs), before=pool, name=node.name)
        else:
            matrix = conv.dense_weight().reshape(conv.out_channels, -1)
            bias = np.zeros(conv.out_channels, matrix.dtype) if conv.bias is None else conv.bias
            name = node.name or "conv"
            inputs = [pooled, graph.new_constant(f"{name}.weight", matrix), graph.new_constant(f"{name}.bias", bias)]
            graph.insert("Gemm", inputs, [output], {"transB": 1}, before=pool, name=name)
        graph.remove(pool, node)

    def detail(self, site: Site) -> str:
        return f"Conv 1x1, {site.pool.op} -> {site.pool.op}, Conv 1x1, {site.macs}"


def why_not_commute(pool: Node, conv: ConvOp) -> str | None:
    """The reason why a pool changes a constant, and the Conv has one to change."""
    if not is_op(pool, "AveragePool") or not pool.attrs.get("count_include_pad", 0) or not has_bias(conv):
        return None
    pads = explicit_pads(pool, pool.attrs["kernel_shape"])
    if pads is None or any(pads) or pool.attrs.get("ceil_mode", 0):
        return "the pool counts its padding, so the bias shrinks at the border"
    return None


def pool_spec(pool: Node, channels: int, batch_and_size: tuple[int, ...], conv: ConvOp) -> OperatorSpec:
    """What the pool costs on this many channels."""
    shape, dtype = (batch_and_size[0], channels, *batch_and_size[1:]), conv.weight.dtype.name
    if not is_op(pool, "AveragePool"):
        return OperatorSpec("GlobalAveragePool", shape, dtype=dtype)
    kernel = tuple(pool.attrs["kernel_shape"])
    pads = explicit_pads(pool, kernel) or [0] * 2 * len(kernel)
    strides = tuple(pool.attrs.get("strides") or [1] * len(kernel))
    attrs = (("kernel_shape", kernel), ("pads", tuple(pads)), ("strides", strides))
    return OperatorSpec("AveragePool", shape, attrs=attrs, dtype=dtype)
