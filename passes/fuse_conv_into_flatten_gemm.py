"""Merge a Conv into the Gemm that reads all of its output flattened, for a feature map of known size.

    before   y = Gemm(Flatten(Conv(x, W, b)), V, c)
    after    y = Gemm(Flatten(x), V', c')

A Conv of one size of x is a matrix M, mostly zeros; V' = M V is what the transposed convolution makes of the rows of V,
and M itself is never formed. V' has a row per element of x, so that this pays where the Conv widens its input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np

from onnxcompress.graph import Graph, Node
from onnxcompress.linear import Affine, ConvOp
from onnxcompress.linear.conv import cast
from onnxcompress.linear.nodes import conv_spec_at, read_affine, read_conv, spatial_sizes
from onnxcompress.merging.gemm_heads import Head, flat_head, replace_head
from onnxcompress.merging.paths import change_in_macs, kernel_text, looks_linear, nominal_shape, why_not_merge
from onnxcompress.rewrite import Miss, RewritePass


@dataclass(frozen=True, eq=False)
class Site:
    node: Node
    head: Head
    affine: Affine
    detail: str


class FuseConvIntoFlattenGemm(RewritePass[Site]):
    name = "fuse-conv-into-flatten-gemm"
    ops = ("Conv",)
    is_merge = True

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        shape, reader = node.outputs[0].shape, graph.only_reader(node.outputs[0])
        if (
            shape is None
            or reader is None
            or reader.op not in ("Flatten", "Reshape", "Squeeze")
            or not looks_linear(node)
        ):
            return None
        if not all(isinstance(dim, (int, np.integer)) for dim in shape[1:]):
            return self.why_not_static(graph, node, reader)
        head = flat_head(graph, node.outputs[0], shape[1:])
        if head is None:
            return None
        conv = read_conv(node)
        if isinstance(head, str) or isinstance(conv, str):
            return Miss(node.name, head if isinstance(head, str) else str(conv))
        if conv.weight.dtype != head.gemm.inputs[1].dtype:
            return Miss(node.name, "Conv and Gemm have different dtypes")
        sizes = [size for size in spatial_sizes(node.inputs[0], conv) if size is not None]
        if len(sizes) < conv.spatial_rank:
            return Miss(node.name, "the input size of the Conv is dynamic")
        at = nominal_shape(node.inputs[0], conv.spatial_rank)
        before = [conv_spec_at(conv, at), head.spec(head.rows, at[0])]
        after = [head.spec(conv.in_channels * math.prod(sizes), at[0])]
        reason = why_not_merge(self.settings.cost, before, after, [node, head.gemm])
        affine = read_affine(head.gemm) if reason is None else None
        if affine is None or isinstance(affine, str):
            return Miss(node.name, reason or str(affine))
        try:
            merged = through(conv, sizes, affine)
        except OverflowError as error:
            return Miss(node.name, str(error))
        return Site(node, head, merged, f"Conv {kernel_text(conv)}, Gemm -> Gemm, {change_in_macs(before, after)}")

    def why_not_static(self, graph: Graph, node: Node, reader: Node) -> Miss | None:
        behind = graph.only_reader(reader.outputs[0])
        if behind is None or behind.op not in ("Gemm", "MatMul"):
            return None
        return Miss(node.name, "the size of what is flattened is dynamic")

    def rewrite(self, graph: Graph, site: Site) -> None:
        replace_head(graph, site.head, site.node.inputs[0], site.affine, flat=False)
        graph.remove(site.node)

    def detail(self, site: Site) -> str:
        return site.detail


def through(conv: ConvOp, sizes: list[int], affine: Affine) -> Affine:
    """``affine`` of the flattened output of ``conv`` as an affine map of its flattened input."""
    out, columns = conv.output_size(sizes), affine.matrix.shape[1]
    heads = affine.matrix.astype(np.float64).reshape(conv.group, conv.out_channels // conv.group, *out, columns)
    weight = conv.weight.astype(np.float64).reshape(conv.group, -1, *conv.weight.shape[1:])
    room = [n + b + e for n, b, e in zip(sizes, conv.pads_begin, conv.pads_end, strict=True)]
    total = np.zeros((conv.group, weight.shape[2], *room, columns))
    for taps in product(*map(range, conv.kernel)):
        places = tuple(
            slice(d * u, d * u + s * (n - 1) + 1, s)
            for d, u, s, n in zip(conv.dilations, taps, conv.strides, out, strict=True)
        )
        index: tuple[slice | int, ...] = (slice(None), slice(None), slice(None), *taps)
        window: tuple[slice, ...] = (slice(None), slice(None), *places)
        moved = weight[index].swapaxes(1, 2) @ heads.reshape(*heads.shape[:2], -1)
        total[window] += moved.reshape(conv.group, -1, *heads.shape[2:])
    inner: tuple[slice, ...] = tuple(slice(b, b + n) for b, n in zip(conv.pads_begin, sizes, strict=True))
    kept: tuple[slice, ...] = (slice(None), slice(None), *inner)
    matrix = cast(total[kept].reshape(-1, columns), affine.matrix.dtype)
    if conv.bias is None:
        return Affine(matrix, affine.bias)
    sums = heads.reshape(conv.out_channels, -1, columns).sum(axis=1)
    start = 0.0 if affine.bias is None else affine.bias.astype(np.float64)
    return Affine(matrix, cast(conv.bias.astype(np.float64) @ sums + start, affine.matrix.dtype))
