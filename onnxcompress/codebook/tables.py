"""Embedding tables in a codebook: only the rows that are asked for are decoded, in every run, and none at load.

    ids -> Gather(W/indices) -> Cast int32 -> Gather(codewords) [-> Mul(Cast(Gather(W/scales, ids)))] -> Reshape -> y

A table is by far larger than what one run reads of it: decoded at load, it would take the memory that it took before.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import TensorProto, helper

from onnxcompress.codebook.codebook import QuantizedLayer
from onnxcompress.codebook.layers import Layer
from onnxcompress.codebook.recipes import PACKING_BYTES
from onnxcompress.codebook.views import remove_moves
from onnxcompress.graph import Constant, Graph, Node, Tensor, Variable, rank


def decodes_rows(graph: Graph, layer: Layer) -> bool:
    """Whether a layer is a table of which each reader picks rows by ids of known rank."""
    return all(
        use.kind == "Gather"
        and use.node.graph is graph
        and not use.origin.nodes
        and rank(use.node.inputs[1]) is not None
        for use in layer.uses
    )


def encode_rows(graph: Graph, layer: Layer, quantized: QuantizedLayer, name: str) -> None:
    """Put a codebook in the place of a table.

    Args:
        graph: The outermost graph; changed in place.
        layer: A table, see ``decodes_rows``.
        quantized: What to store.
        name: What the names of its constants begin with.
    """

    def constant(suffix: str, values: np.ndarray) -> Constant:
        return Constant(graph.scope.fresh(f"{name}/{suffix}"), np.ascontiguousarray(values), home=graph)

    rows = quantized.indices
    packs = quantized.choice.codewords <= 16 and rows.shape[1] % 2 == 0 and rows.size // 2 >= PACKING_BYTES
    if packs:
        high, low = np.split(rows, 2, axis=1)
        rows = (high * 16 + low).astype(np.uint8)
    indices = constant("indices", rows)
    codebook = constant("codebook", quantized.codebook)
    factors = None if quantized.codebook_scale is None else constant("codebook_scale", quantized.codebook_scale)
    scales = None if quantized.scales is None else constant("scales", quantized.scales.reshape(-1, 1, 1))
    sixteen = constant("16", np.array(16, np.int32))
    made = _Steps(graph)
    codewords = made.step("Cast", codebook, to=int(TensorProto.FLOAT))
    if factors is not None:
        codewords = made.step("Mul", codewords, factors)
    graph.nodes[_before(graph, layer) : _before(graph, layer)] = made.nodes
    for use in layer.uses:
        node, ids, output = use.node, use.node.inputs[1], use.node.outputs[0]
        made = _Steps(graph)
        picked = Variable(graph.scope.fresh("q"))
        numbers = made.step("Cast", picked, to=int(TensorProto.INT32))
        if packs:
            first = made.step("Div", numbers, sixteen)
            second = made.step("Sub", numbers, made.step("Mul", first, sixteen))
            numbers = made.step("Concat", first, second, axis=rank(ids) or 0)
        decoded = made.step("Gather", codewords, numbers)
        if scales is not None:
            of_rows = made.step("Cast", made.step("Gather", scales, ids), to=int(TensorProto.FLOAT))
            decoded = made.step("Mul", decoded, of_rows)
        kind = helper.np_dtype_to_tensor_dtype(use.origin.dtype)
        if kind != TensorProto.FLOAT:
            decoded = made.step("Cast", decoded, to=int(kind))
        target = [0] * (rank(ids) or 0) + [math.prod(use.view.shape[1:])]  # 0: as it is
        shape = graph.new_constant("x".join(map(str, target)), np.array(target, np.int64))
        made.nodes.append(Node("Reshape", "", {}, [decoded, shape], []))
        node.inputs = [indices, ids]
        node.outputs = [picked]
        made.nodes[-1].outputs = [output]
        place = graph.nodes.index(node) + 1
        graph.nodes[place:place] = made.nodes
        remove_moves(use.origin)


def _before(graph: Graph, layer: Layer) -> int:
    return min(int(graph.nodes.index(use.node)) for use in layer.uses)


class _Steps:
    """Nodes to be inserted, in order."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[Node] = []

    def step(self, op: str, *inputs: Tensor, **attrs: int) -> Tensor:
        output = Variable(self.graph.scope.fresh("q"))
        self.nodes.append(Node(op, "", dict(attrs), list(inputs), [output]))
        return output
