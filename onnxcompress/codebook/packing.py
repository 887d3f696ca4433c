"""Decode the weights of a small file together: in a file of 30 kB, nodes and headers of each layer are most of it.

    indices   -> Cast -> Split -> Gather(codewords) -> Split -> Reshape [-> Mul] [-> Transpose] -> W1, W2, ...
    factors   -> Cast -> Gather(levels) -> Split -> the factors of the outputs
    vectors   -> Cast -> Gather(levels) -> Split -> b1, b2, ...

All indices of one width stand in one initializer; those of layers that share a codebook are decoded by one Gather.
Biases, scales of norms and factors are one byte each, numbers of one list of 256 levels: an error far below that of the
weights. Weights are decoded bit for bit as before, but for their factors. onnxruntime folds all of it at load.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from onnx import TensorProto

from onnxcompress.codebook.levels import fit_levels
from onnxcompress.codebook.recipes import UINT4_IR, UINT4_OPSET
from onnxcompress.graph import Constant, Graph, Node, Tensor, Variable, is_op
from onnxcompress.patterns.decoded_weights import CodebookWeight, find_codebooks
from onnxcompress.rewrite import remove_if_unread

SPLIT_OPSET = 13  # sizes are an input from then on
MOVES = ("Gather", "Reshape", "Transpose")
MIN_TABLE = 256  # numbers
MIN_VECTOR = 16  # of fewer each counts: the mean of an image's colours, the biases of classes
MIN_VECTORS = 640  # numbers, from which on 256 levels are fewer bytes than float16


@dataclass(frozen=True, eq=False)
class _Part:
    """A weight, how it stands in the graph, and where it will.

    Attributes:
        codebook: What decodes it now.
        indices: (outputs * D / d,) unsigned.
        moves: Reshape, and what follows it up to the weight.
        shape: What the first Reshape makes: (outputs, ...).
    """

    codebook: CodebookWeight
    indices: np.ndarray
    moves: tuple[Node, ...]
    shape: tuple[int, ...]


def pack(graph: Graph, may_be_narrow: Callable[[Constant], bool]) -> None:
    """Decode codebook weights, and vectors, together.

    Args:
        graph: The outermost graph, all layers encoded; changed in place.
        may_be_narrow: Whether a float constant need not be exact.
    """
    vectors = _vectors(graph, may_be_narrow)  # before there are more Splits to look behind
    maker = _Maker(graph)
    parts = [part for one in find_codebooks(graph) if (part := _part(graph, one)) is not None]
    scaled = [part for part in parts if part.codebook.scales is not None]
    factors = maker.factors(scaled)
    maker.weights(parts, factors)
    maker.vectors(vectors)
    graph.nodes[0:0] = maker.nodes


# -- what is there ---------------------------------------------------------------------------------------------------


def _part(graph: Graph, one: CodebookWeight) -> _Part | None:
    """The weight's parts, where it is decoded as ``recipes`` does it for one reader."""
    nodes = list(one.nodes)
    gathers = [node for node in nodes if is_op(node, "Gather")]
    last = gathers[-1] if one.order is None else gathers[-2]
    later = nodes[nodes.index(last) + 1 :]
    moves = [node for node in later if is_op(node, *MOVES)]
    known = {*moves, *(node for node in later if is_op(node, "Mul")), *_order_nodes(graph, moves)}
    widened = [node for node in later if node not in known]  # the Cast of the factors
    first = next((node for node in moves if is_op(node, "Reshape")), None)
    if first is None or first is not moves[0] or any(node.graph is not graph for node in nodes):
        return None
    if len(widened) != (0 if one.scales is None or one.scales.dtype == np.float32 else 1):
        return None
    if widened and widened[0].inputs[0] is not one.scales:
        return None
    rows = one.indices.values.astype(np.int64)
    if one.packed:
        concat = next(node for node in nodes if is_op(node, "Concat"))
        rows = np.concatenate([rows // 16, rows % 16], axis=int(concat.attrs["axis"]))
    if not isinstance(first.inputs[1], Constant) or rows.ndim != 2:
        return None
    shape = tuple(int(size) for size in first.inputs[1].values)
    if min(shape) < 1 or shape[0] != len(rows) or math.prod(shape) != rows.size * one.codebook.shape[1]:
        return None
    return _Part(one, rows.reshape(-1), tuple(moves), shape)


def _order_nodes(graph: Graph, moves: Sequence[Node]) -> list[Node]:
    """The Cast, and the Add where there is one, of the order in which a Gather among the moves takes the channels."""
    found: list[Node] = []
    for gather in (node for node in moves if is_op(node, "Gather")):
        tensor = gather.inputs[1]
        while (made := graph.producer(tensor)) is not None:
            found.insert(0, made)
            tensor = made.inputs[0]
    return found


def _vectors(graph: Graph, may_be_narrow: Callable[[Constant], bool]) -> list[Constant]:
    """Vectors, and tables such as positions that are large enough to pay for a Reshape."""
    found: dict[Constant, None] = {}
    for node in graph.nodes:
        for tensor in node.inputs:
            if not isinstance(tensor, Constant) or tensor in found or not may_be_narrow(tensor):
                continue
            count = math.prod(tensor.shape)
            if count >= MIN_TABLE or (len(tensor.shape) == 1 and count >= MIN_VECTOR):
                found.setdefault(tensor)
    return list(found)


# -- what is made ----------------------------------------------------------------------------------------------------


class _Maker:
    """Makes the nodes that decode together, in order."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[Node] = []
        self._shapes: dict[tuple[int, ...], Constant] = {}
        self.nibbles = graph.opset >= UINT4_OPSET and (graph.ir_version or 0) >= UINT4_IR

    def step(self, op: str, *inputs: Tensor, **attrs: int | list[int]) -> Tensor:
        output = Variable(self.graph.scope.fresh("q"))
        self.nodes.append(Node(op, "", dict(attrs), list(inputs), [output]))
        return output

    def constant(self, name: str, values: np.ndarray) -> Constant:
        return Constant(self.graph.scope.fresh(name), values, home=self.graph)

    def wide(self, tensor: Tensor) -> Tensor:
        return self.step("Cast", tensor, to=int(TensorProto.FLOAT))

    def split(self, tensor: Tensor, sizes: Sequence[int], axis: int = 0) -> list[Tensor]:
        """The parts of a tensor along its first axis."""
        if len(sizes) == 1:
            return [tensor]
        outputs: list[Tensor] = [Variable(self.graph.scope.fresh("q")) for _ in sizes]
        attrs: dict[str, int | list[int]] = {"axis": axis} if axis else {}
        inputs = [tensor]
        if self.graph.opset >= SPLIT_OPSET:
            inputs.append(self.constant("sizes", np.array(sizes, np.int64)))
        else:
            attrs["split"] = list(sizes)
        self.nodes.append(Node("Split", "", attrs, inputs, outputs))
        return outputs

    def spread(self, name: str, vectors: Sequence[np.ndarray]) -> list[Tensor]:
        """The vectors, stored together: numbers of a list of levels where they are many, else in float16."""
        together = np.concatenate(vectors)
        if together.size < MIN_VECTORS:
            return self.split(self.wide(self.constant(name, together.astype(np.float16))), [len(v) for v in vectors])
        levels, numbers = fit_levels(vectors)
        indices = self.step("Cast", self.constant(name, numbers.reshape(together.shape)), to=int(TensorProto.INT32))
        decoded = self.step("Gather", self.wide(self.constant(f"{name}_levels", levels)), indices)
        return self.split(decoded, [len(v) for v in vectors])

    def factors(self, parts: Sequence[_Part]) -> dict[_Part, Tensor]:
        """The factors of scaled weights, of as many axes as the weight has when they are applied."""
        found: dict[_Part, Tensor] = {}
        for rank, group in _grouped(parts, lambda part: len(part.shape)):
            arrays = []
            for part in group:
                scales = part.codebook.scales
                assert scales is not None, "filtered so"
                arrays.append(scales.values.astype(np.float32).reshape(-1, *[1] * (rank - 1)))
            found.update(zip(group, self.spread("factors", arrays), strict=True))
        return found

    def weights(self, parts: Sequence[_Part], factors: dict[_Part, Tensor]) -> None:
        for width, stream in _grouped(parts, lambda part: _width(part.codebook.codebook.shape[0])):
            if width == 4 and not self.nibbles and sum(len(part.indices) for part in stream) % 2:
                stream.remove(next(part for part in stream if len(part.indices) % 2))
            if not stream:
                continue
            groups = [group for _, group in _grouped(stream, lambda part: id(part.codebook.codebook))]
            whole = self._indices(np.concatenate([part.indices for group in groups for part in group]), width)
            rows = self.split(whole, [sum(len(part.indices) for part in group) for group in groups])
            for group, indices in zip(groups, rows, strict=True):
                self._group(group, indices, factors)

    def _group(self, group: Sequence[_Part], indices: Tensor, factors: dict[_Part, Tensor]) -> None:
        first = group[0].codebook
        codewords: Tensor = first.codebook
        if first.codebook.dtype != np.float32:
            codewords = self.wide(codewords)
        if first.codebook_scale is not None:
            codewords = self.step("Mul", codewords, first.codebook_scale)
        decoded = self.step("Gather", codewords, indices)
        for part, rows in zip(group, self.split(decoded, [len(part.indices) for part in group]), strict=True):
            self._place(part, rows, factors.get(part))

    def _place(self, part: _Part, rows: Tensor, factors: Tensor | None) -> None:
        """Let the weight come from these rows."""
        old, weight = part.codebook.nodes, part.codebook.weight
        made = rows
        if len(part.shape) != 2 or part.shape[1] != part.codebook.codebook.shape[1]:  # one sub-vector is a row
            made = self.step("Reshape", rows, self._shape(part.shape))
        if factors is not None:
            made = self.step("Mul", made, factors)
        for move in part.moves[1:]:
            places: list[Tensor] = []
            for node in _order_nodes(self.graph, [move]):
                places = [self.step(node.op, *[*places, *node.inputs[len(places) :]], **node.attrs)]
            made = self.step(move.op, made, *(places or move.inputs[1:]), **move.attrs)
        made.name, made.dtype, made.shape = weight.name, weight.dtype, weight.shape
        for reader in list(dict.fromkeys(weight.outputs)):
            reader.inputs = [made if tensor is weight else tensor for tensor in reader.inputs]
        remove_if_unread(self.graph, list(reversed(old)))

    def _shape(self, shape: tuple[int, ...]) -> Constant:
        """(-1, ...): the same for all weights that differ in outputs alone."""
        rest = shape[1:]
        if rest not in self._shapes:
            name = "x".join(["", *map(str, rest)]).replace("x1x1", "") or "flat"
            self._shapes[rest] = self.constant(name, np.array([-1, *rest], np.int64))
        return self._shapes[rest]

    def _indices(self, numbers: np.ndarray, width: int) -> Tensor:
        if width > 4:
            stored = numbers.astype(np.uint8 if width == 8 else np.uint16)
            return self.step("Cast", self.constant("indices", stored), to=int(TensorProto.INT32))
        if self.nibbles:
            return self.step(
                "Cast", self.constant("indices", numbers.astype(ml_dtypes.uint4)), to=int(TensorProto.INT32)
            )
        high, low = np.split(numbers, 2)
        both = self.constant("indices", (high * 16 + low).astype(np.uint8))
        wide, sixteen = self.step("Cast", both, to=int(TensorProto.INT32)), self.constant("16", np.array(16, np.int32))
        first = self.step("Div", wide, sixteen)
        return self.step("Concat", first, self.step("Sub", wide, self.step("Mul", first, sixteen)), axis=0)

    def vectors(self, constants: Sequence[Constant]) -> None:
        if len(constants) < 2:
            return
        made = self.spread("vectors", [constant.values.astype(np.float32).reshape(-1) for constant in constants])
        for constant, flat in zip(constants, made, strict=True):
            tensor = flat
            if len(constant.shape) != 1:
                tensor = self.step("Reshape", flat, self.constant("shape", np.array(constant.shape, np.int64)))
            tensor.name, tensor.dtype, tensor.shape = constant.name, constant.dtype, list(constant.shape)
            for reader in list(dict.fromkeys(constant.outputs)):
                reader.inputs = [tensor if one is constant else one for one in reader.inputs]


def _grouped(parts: Iterable[_Part], key: Callable[[_Part], int]) -> list[tuple[int, list[_Part]]]:
    """The parts of each key, keys and parts in the order in which they come."""
    found: dict[int, list[_Part]] = {}
    for part in parts:
        found.setdefault(key(part), []).append(part)
    return list(found.items())


def _width(codewords: int) -> int:
    return 4 if codewords <= 16 else 8 if codewords <= 256 else 16
