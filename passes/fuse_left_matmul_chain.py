"""Merge matrix products with constant left operands in a row, where one is cheaper.

    before   y = C2 @ (C1 @ x)
    after    y = (C2 C1) @ x

Such products mix tokens or positions. They do not merge with products from the right, which mix channels. Computed in
float64 and rounded once: max|d| / max|y| was 4.6e-7 at worst over 500 random pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxcompress.cost import OperatorSpec, known_shape
from onnxcompress.graph import Graph, Node, Tensor, constant_value, is_constant, is_op, rank
from onnxcompress.linear.conv import cast
from onnxcompress.linear.nodes import FLOATS
from onnxcompress.merging.affine_links import why_not_merge
from onnxcompress.merging.paths import change_in_macs
from onnxcompress.rewrite import Miss, RewritePass


@dataclass(frozen=True, eq=False)
class Site:
    first: Node
    second: Node
    merged: np.ndarray
    detail: str


class FuseLeftMatMulChain(RewritePass[Site]):
    name = "fuse-left-matmul-chain"
    ops = ("MatMul",)
    is_merge = True

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        first = graph.producer(node.inputs[1])
        if first is None or not is_op(first, "MatMul") or not is_constant(node.inputs[0]):
            return None
        if not is_constant(first.inputs[0]) or is_constant(first.inputs[1]):
            return None
        if not graph.feeds_only(first.outputs[0], node):
            return Miss(node.name, "the inner product is read elsewhere")
        if rank(node.inputs[0]) != 2 or rank(first.inputs[0]) != 2:
            return Miss(node.name, "a constant has not two axes")
        left, right = constant_value(node.inputs[0]), constant_value(first.inputs[0])
        assert left is not None and right is not None
        if left.dtype != right.dtype or left.dtype.name not in FLOATS:
            return Miss(node.name, f"the constants are {left.dtype} and {right.dtype}")
        before = [_spec(right.shape, first.inputs[1], left.dtype), _spec(left.shape, first.inputs[1], left.dtype)]
        after = [_spec((left.shape[0], right.shape[1]), first.inputs[1], left.dtype)]
        reason = why_not_merge(self.settings.cost, [first, node], before, after)
        if reason is not None:
            return Miss(node.name, reason)
        try:
            merged = cast(left.astype(np.float64) @ right.astype(np.float64), left.dtype)
        except OverflowError as error:
            return Miss(node.name, str(error))
        return Site(first, node, merged, change_in_macs(before, after))

    def rewrite(self, graph: Graph, site: Site) -> None:
        source = site.first.inputs[1]
        site.second.inputs = [graph.new_constant(f"{site.second.name or 'matmul'}.weight", site.merged), source]
        graph.touch(site.second)
        graph.remove(site.first)

    def detail(self, site: Site) -> str:
        return f"two constant left operands, {site.detail}"


def _spec(matrix: tuple[int, ...], source: Tensor, dtype: np.dtype) -> OperatorSpec:
    """A product from the left as the one from the right that has the same size."""
    shape, _ = known_shape(source)
    columns = shape[-1] if shape is not None and len(shape) > 1 else 1
    batch = shape[:-2] if shape is not None else ()
    return OperatorSpec("MatMul", (*batch, columns, matrix[1]), ((matrix[1], matrix[0]),), dtype=dtype.name)
