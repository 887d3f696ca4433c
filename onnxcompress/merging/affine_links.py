"""Gemm, and MatMul with a constant matrix and the row that is added to it, as affine maps that can be merged.

A ``Link`` is what the matrix merges read and replace: y = x @ matrix + bias along the last axis. It is written back as
one Gemm where x has two axes, and as MatMul and Add otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxcompress.cost import GROWTH_ALLOWANCE_BYTES, CostModel, OperatorSpec, known_shape, why_not_pay
from onnxcompress.graph import Graph, Node, Tensor, constant_value, is_constant, is_op, rank, static_shape
from onnxcompress.linear import Affine
from onnxcompress.linear.nodes import other_operand, read_affine
from onnxcompress.merging.paths import change_in_macs, kept_bytes


@dataclass(frozen=True, eq=False)
class Link:
    """A linear map of a graph.

    Attributes:
        nodes: A Gemm; or a MatMul, with the Add of a constant row behind it where there is one.
        source: x, with any number of axes.
        output: y.
        affine: Matrix (K, N) and bias (N,).
    """

    nodes: tuple[Node, ...]
    source: Tensor
    output: Tensor
    affine: Affine

    @property
    def head(self) -> Node:
        """The node that reads the source."""
        return self.nodes[0]


def looks_affine(node: Node | None) -> bool:
    """Whether the node is a Gemm or MatMul with a constant right operand, by its form."""
    return (
        node is not None
        and is_op(node, "Gemm", "MatMul")
        and is_constant(node.inputs[1])
        and not is_constant(node.inputs[0])
    )


def read_link(graph: Graph, head: Node) -> Link | str:
    """The linear map that starts at a Gemm or MatMul, or the reason why its numbers are not known."""
    affine = read_affine(head)
    if isinstance(affine, str):
        return affine
    if head.op == "MatMul":
        add = graph.only_reader(head.outputs[0])
        row = None if add is None else _row(add, head.outputs[0], affine.matrix.shape[1])
        if add is not None and row is not None and row.dtype == affine.matrix.dtype:
            return Link((head, add), head.inputs[0], add.outputs[0], Affine(affine.matrix, row))
    return Link((head,), head.inputs[0], head.outputs[0], affine)


def _row(add: Node, product: Tensor, columns: int) -> np.ndarray | None:
    """The constant that an Add adds to every row of ``product``, (columns,); None when it does another thing."""
    operands = other_operand(add) if is_op(add, "Add") else None
    if operands is None or operands[0] is not product:
        return None
    shape, axes = static_shape(operands[1]), rank(product)
    if shape is None or int(np.prod(shape, dtype=np.int64)) != columns or (columns > 1 and shape[-1:] != (columns,)):
        return None
    if len(shape) > (axes if axes is not None else 1):
        return None
    values = constant_value(operands[1])
    if values is None or not np.isfinite(values).all():
        return None
    return values.reshape(columns)


def link_to(graph: Graph, tensor: Tensor, reader: Node) -> Link | None:
    """The linear map whose result is ``tensor``, which ``reader`` alone reads; None where there is none."""
    if not graph.feeds_only(tensor, reader):
        return None
    node = graph.producer(tensor)
    if is_op(node, "Add"):
        assert node is not None
        operands = other_operand(node)
        node = None if operands is None else graph.producer(operands[0])
        if node is None or node.op != "MatMul":
            return None
    if node is None or not looks_affine(node):
        return None
    link = read_link(graph, node)
    return link if isinstance(link, Link) and link.output is tensor else None


def affine_specs(matrix_shape: tuple[int, int], has_bias: bool, source: Tensor, dtype: str) -> list[OperatorSpec]:
    """What a linear map of ``source`` costs: a Gemm for two axes, else MatMul and Add."""
    shape, _ = known_shape(source)
    rows = shape[:-1] if shape is not None and len(shape) > 1 else (1,)
    inputs, columns = (*rows, matrix_shape[0]), matrix_shape[1]
    if rank(source) == 2:
        weights: tuple[tuple[int, ...], ...] = (matrix_shape, (columns,)) if has_bias else (matrix_shape,)
        return [OperatorSpec("Gemm", inputs, weights, dtype=dtype)]
    product = OperatorSpec("MatMul", inputs, (matrix_shape,), dtype=dtype)
    return [product, OperatorSpec("Add", (*rows, columns), ((columns,),), dtype=dtype)] if has_bias else [product]


def link_specs(link: Link, source: Tensor | None = None) -> list[OperatorSpec]:
    """What a link costs as it stands."""
    affine = link.affine
    return affine_specs(affine.matrix.shape, affine.bias is not None, source or link.source, affine.matrix.dtype.name)


def sum_specs(link: Link, terms: int = 1) -> list[OperatorSpec]:
    """What the Adds of ``terms`` further tensors to the result of a link cost."""
    out = link_specs(link)[0].output_shape
    return [OperatorSpec("Add", out, dtype=link.affine.matrix.dtype.name, live_shapes=(out,))] * terms


def why_not_merge(
    cost: CostModel, replaced: Sequence[Node], before: Sequence[OperatorSpec], after: Sequence[OperatorSpec]
) -> str | None:
    """The reason why the operators of ``after`` should not take the place of ``replaced``."""
    return why_not_pay(cost, before, after, growth_bytes=GROWTH_ALLOWANCE_BYTES - kept_bytes(replaced))


def insert_affine(graph: Graph, affine: Affine, source: Tensor, output: Tensor, *, before: Node, name: str) -> None:
    """Make the nodes of ``affine`` in front of ``before``; they produce ``output`` itself."""
    matrix = graph.new_constant(f"{name}.weight", affine.matrix)
    bias = None if affine.bias is None else graph.new_constant(f"{name}.bias", affine.bias)
    if rank(source) == 2:
        inputs = [source, matrix] if bias is None else [source, matrix, bias]
        graph.insert("Gemm" if bias is not None else "MatMul", inputs, [output], before=before, name=name)
    elif bias is None:
        graph.insert("MatMul", [source, matrix], [output], before=before, name=name)
    else:
        shape = None if output.shape is None else list(output.shape)
        product = graph.new_variable(f"{name}.product", output, shape=shape)
        graph.insert("MatMul", [source, matrix], [product], before=before, name=name)
        graph.insert("Add", [product, bias], [output], before=before, name=f"{name}.add")


def replace_by(graph: Graph, affine: Affine, source: Tensor, output: Tensor, replaced: Sequence[Node]) -> None:
    """Put one linear map of ``source`` in the place of nodes, readers first, of which the first makes ``output``."""
    last = replaced[0]
    insert_affine(graph, affine, source, output, before=last, name=last.name or "gemm")
    graph.remove(*replaced)


def merge_text(links: Sequence[Link], what: str, before: Sequence[OperatorSpec], after: Sequence[OperatorSpec]) -> str:
    """``Gemm 4x8 + Gemm 8x4 -> Gemm 4x4, 64 -> 16 MACs`` for the report."""
    parts = " + ".join("x".join(map(str, link.affine.matrix.shape)) for link in links)
    return f"{what} {parts} -> {'x'.join(map(str, after[0].weight_shapes[0]))}, {change_in_macs(before, after)}"
