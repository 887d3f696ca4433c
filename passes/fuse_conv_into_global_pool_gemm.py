"""Merge a 1x1 Conv and the Gemm behind a global mean: the mean commutes with the Conv, which then is a matrix.

    before   y = Gemm(Flatten(GlobalAveragePool(Conv(x, W, b))), V, c)
    after    y = Gemm(Flatten(GlobalAveragePool(x)), W^T V, b V + c)

The mean may be a ReduceMean over all spatial axes, the Flatten a Reshape or a Squeeze, the Gemm a MatMul. Exact for any
size of x; the Conv, which ran at every position, is gone.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnxcompress.cost import OperatorSpec
from onnxcompress.graph import Graph, Node
from onnxcompress.linear import Affine, ConvOp, fold_global_average_pool, why_not_pointwise
from onnxcompress.linear.nodes import conv_spec_at, read_affine, read_conv
from onnxcompress.merging.gemm_heads import Head, flat_head, is_global_mean, keeps_axes, replace_head
from onnxcompress.merging.paths import change_in_macs, looks_linear, nominal_shape, why_not_merge
from onnxcompress.rewrite import Miss, RewritePass


@dataclass(frozen=True, eq=False)
class Site:
    conv: Node
    mean: Node
    head: Head
    affine: Affine
    macs: str


class FuseConvIntoGlobalPoolGemm(RewritePass[Site]):
    name = "fuse-conv-into-global-pool-gemm"
    ops = ("Conv",)
    is_merge = True

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        mean = graph.only_reader(node.outputs[0])
        axes = len(node.inputs[1].shape or ())
        if mean is None or not looks_linear(node) or not is_global_mean(mean, axes):
            return None
        channels = int(node.inputs[1].shape[0])
        head = flat_head(graph, mean.outputs[0], [channels, *[1] * (axes - 2)] if keeps_axes(mean) else [channels])
        if head is None:
            return None
        conv = read_conv(node)
        if isinstance(head, str) or isinstance(conv, str):
            return Miss(node.name, head if isinstance(head, str) else str(conv))
        if conv.weight.dtype != head.gemm.inputs[1].dtype:
            return Miss(node.name, "Conv and Gemm have different dtypes")
        reason = why_not_pointwise(conv)
        if reason is not None:
            return Miss(node.name, reason)
        before, after, kept = self.specs(node, conv, head)
        reason = why_not_merge(self.settings.cost, before, after, [node, head.gemm])
        if reason is None and self.settings.cost.price(kept).latency_ms < self.settings.cost.price(after).latency_ms:
            reason = "the Conv is cheaper kept, behind the mean"
        affine = read_affine(head.gemm)
        if reason is not None or isinstance(affine, str):
            return Miss(node.name, reason or str(affine))
        try:
            return Site(node, mean, head, fold_global_average_pool(conv, affine), change_in_macs(before, after))
        except OverflowError as error:
            return Miss(node.name, str(error))

    def specs(self, node: Node, conv: ConvOp, head: Head) -> tuple[list[OperatorSpec], ...]:
        """What it costs now, merged, and with the Conv behind the mean."""
        batch, *size = nominal_shape(node.inputs[0], conv.spatial_rank)
        dtype, ones = conv.weight.dtype.name, [1] * conv.spatial_rank
        narrow = OperatorSpec("GlobalAveragePool", (batch, conv.out_channels, *size), dtype=dtype)
        wide = OperatorSpec("GlobalAveragePool", (batch, conv.in_channels, *size), dtype=dtype)
        gemm = head.spec(conv.out_channels, batch)
        before = [conv_spec_at(conv, (batch, *size)), narrow, gemm]
        after = [wide, head.spec(conv.in_channels, batch)]
        return before, after, [wide, conv_spec_at(conv, (batch, *ones)), gemm]

    def rewrite(self, graph: Graph, site: Site) -> None:
        mean = pool_first(graph, site.mean, site.conv)
        replace_head(graph, site.head, mean.outputs[0], site.affine, flat=not keeps_axes(mean))
        graph.remove(site.mean, site.conv)

    def detail(self, site: Site) -> str:
        return f"Conv 1x1, {site.mean.op}, {site.head.gemm.op} -> {site.mean.op}, Gemm, {site.macs}"


def pool_first(graph: Graph, pool: Node, conv: Node) -> Node:
    """Make the pool of what ``conv`` reads, in front of ``pool``."""
    source, shape = conv.inputs[0], pool.outputs[0].shape
    made = graph.insert(pool.op, [source, *pool.inputs[1:]], None, dict(pool.attrs), before=pool, name=pool.name)
    if shape is not None and source.shape is not None:
        made.outputs[0].shape = [*shape[:1], source.shape[1], *shape[2:]]
    return made
