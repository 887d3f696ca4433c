"""Weights that are stored small and decoded by nodes, which onnxruntime folds when it loads the model.

    codebook   Gather(codewords, indices) [-> Mul(scales)] [-> Reshape] [-> Transpose] [-> Reshape] [-> Cast]
                 [-> Gather(order) on another axis than the first]
                 codewords   Cast(float16 constant)  or  Mul(Cast(int8 constant), constant)
                 indices     Cast(unsigned constant)  or  Concat(Div(q, 16), q - 16 * Div(q, 16)), two indices in a byte
                 order       Cast(unsigned constant) [-> Add(starts)]
    int8       Mul(Cast(int8 constant), constant) [-> Reshape] [-> Transpose] [-> Reshape] [-> Cast]
    float16    Cast(float16 constant) [-> Reshape] [-> Transpose] [-> Reshape]
    vector     Cast(float16 constant) -> biases, factors, scales of norms
    together   Split of any of these, and what gives its parts their shapes and factors (``codebook/packing.py``)
    row        Gather(codewords, Cast(Gather(unsigned constant, ids))): of a table only the rows that are asked for

Folding such nodes in the file would undo the compression, so no pass of ours does it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import helper

from onnxcompress.graph import Constant, Graph, Node, Tensor, is_constant, is_op, numpy_dtype, optional_input
from onnxcompress.model_io.stored import packed_bytes

INDEX_TYPES = ("uint2", "uint4", "uint8", "uint16")
CODEWORD_TYPES = ("float16", "int8")
# Inputs of operators where a weight is.
WEIGHT_SLOTS = {
    "Conv": (1,),
    "ConvTranspose": (1,),
    "Gemm": (0, 1),
    "MatMul": (0, 1),
    "Gather": (0,),
    "LSTM": (1, 2),
    "GRU": (1, 2),
    "RNN": (1, 2),
}
# What may lie between stored constants and the weights that a Split gives.
UNPACKING = ("Cast", "Concat", "Div", "Gather", "Mul", "Reshape", "Split", "Sub", "Transpose")
# Inputs of operators where vectors are that float16 is good enough for: biases, and scales of norms.
VECTOR_SLOTS = {
    "BatchNormalization": (1, 2, 3),
    "Conv": (2,),
    "ConvTranspose": (2,),
    "GRU": (3,),
    "Gemm": (2,),
    "GroupNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LSTM": (3, 7),
    "LayerNormalization": (1, 2),
    "PRelu": (1,),
    "RNN": (3,),
    **dict.fromkeys(("Add", "Mul", "Sub"), (0, 1)),
}


@dataclass(frozen=True, eq=False)
class CodebookWeight:
    """A weight that nodes decode from a codebook.

    Attributes:
        weight: What the operators read.
        codebook: (k, d) float16, int8 or float32.
        codebook_scale: Factors of an int8 codebook, else None.
        indices: Unsigned; (outputs, D / d), or half of it where ``packed``.
        packed: Two indices stand in a byte.
        scales: (outputs, 1, 1) factors per output, or None.
        nodes: Those that decode it, in order.
        order: Where each input channel is stored, or None.
    """

    weight: Tensor
    codebook: Constant
    codebook_scale: Constant | None
    indices: Constant
    packed: bool
    scales: Constant | None
    nodes: tuple[Node, ...]
    order: Constant | None = None

    @property
    def readers(self) -> list[Node]:
        return list(dict.fromkeys(self.weight.outputs))

    @property
    def constants(self) -> list[Constant]:
        given = (self.codebook, self.codebook_scale, self.indices, self.scales, self.order)
        return [constant for constant in given if constant is not None]

    @property
    def stored_bytes(self) -> int:
        """Bytes of codebook, indices, factors and order; without the nodes."""
        return sum(packed_bytes(helper.np_dtype_to_tensor_dtype(c.dtype), math.prod(c.shape)) for c in self.constants)


@dataclass(frozen=True)
class _Source:
    """Constants and nodes behind one operand of a decoding node."""

    constant: Constant
    factor: Constant | None
    packed: bool
    nodes: tuple[Node, ...]


def find_codebooks(graph: Graph) -> list[CodebookWeight]:
    """The weights of a graph, and of those nested in it, that nodes decode from codebooks."""
    found = []
    for inner in graph.walk():
        for node in inner.nodes:
            if is_op(node, "Gather") and not node.attrs.get("axis", 0):
                weight = _codebook(inner, node)
                if weight is not None:
                    found.append(weight)
    return found


def narrow_weights(graph: Graph, *types: str) -> dict[Tensor, list[Node]]:
    """The weights of a graph, and of those nested in it, that nodes widen from int8 or float16, and those nodes."""
    found = {}
    for inner in graph.walk():
        for node in inner.nodes:
            dtype = numpy_dtype(node.inputs[0]) if is_op(node, "Cast") and is_constant(node.inputs[0]) else None
            if dtype is not None and dtype.name in (types or CODEWORD_TYPES):
                nodes = _widening(inner, node, dtype)
                if nodes:
                    found[nodes[-1].outputs[0]] = nodes
    return found


def narrow_vectors(graph: Graph) -> list[Node]:
    """The Casts of a graph, and of those nested in it, that widen float16 vectors: biases, factors, scales of norms."""
    found = []
    for inner in graph.walk():
        for node in inner.nodes:
            if not is_op(node, "Cast") or not is_constant(node.inputs[0]) or numpy_dtype(node.inputs[0]) != np.float16:
                continue
            wide = node.outputs[0]
            if wide.outputs and all(_reads(reader, wide, VECTOR_SLOTS) for reader in wide.outputs):
                found.append(node)
    return found


def unpacking_nodes(graph: Graph) -> set[Node]:
    """The nodes of the outermost graph that decode several weights together and take them apart by a Split."""
    static: set[Node] = set()
    for node in graph.nodes:
        unpacks = is_op(node, *UNPACKING) or _adds_starts(graph, node)
        if unpacks and all(is_constant(t) or graph.producer(t) in static for t in node.inputs):
            static.add(node)
    found: set[Node] = set()
    for node in graph.nodes:
        if node in static and is_op(node, "Split") and node not in found:
            above = _upstream(graph, node)
            if any(_is_narrow_cast(one) for one in above):
                found |= above
    for node in graph.nodes:  # in order, so that what follows from a Split is found in one pass
        made = (graph.producer(tensor) for tensor in node.inputs)
        if node in static and any(one in found for one in made if one is not None):
            found |= _upstream(graph, node)
    return found


def unpacked_weights(graph: Graph) -> list[Tensor]:
    """What ``unpacking_nodes`` give to the operators."""
    nodes = unpacking_nodes(graph)
    return [t for node in graph.nodes if node in nodes for t in node.outputs if not nodes.issuperset(t.outputs)]


def _is_narrow_cast(node: Node) -> bool:
    dtype = numpy_dtype(node.inputs[0]) if is_op(node, "Cast") and is_constant(node.inputs[0]) else None
    return dtype is not None and dtype.name in (*INDEX_TYPES, *CODEWORD_TYPES)


def _adds_starts(graph: Graph, node: Node) -> bool:
    """Whether a node makes places of channels out of an order of runs."""
    cast = graph.producer(node.inputs[0]) if is_op(node, "Add") else None
    dtype = numpy_dtype(cast.inputs[0]) if cast is not None and is_op(cast, "Cast") else None
    return dtype is not None and dtype.name in INDEX_TYPES


def _upstream(graph: Graph, node: Node) -> set[Node]:
    """A node and all that it depends on."""
    found, pending = {node}, [node]
    while pending:
        made = [graph.producer(tensor) for tensor in pending.pop().inputs]
        fresh = {one for one in made if one is not None and one not in found}
        found |= fresh
        pending += fresh
    return found


def decoding_nodes(graph: Graph) -> set[Node]:
    """The nodes of a graph, and of those nested in it, that decode weights."""
    found = {node for weight in find_codebooks(graph) for node in weight.nodes}
    return found.union(narrow_vectors(graph), unpacking_nodes(graph), *narrow_weights(graph).values())


def _codebook(graph: Graph, gather: Node) -> CodebookWeight | None:
    codewords, picks = _codewords(graph, gather.inputs[0]), _indices(graph, gather.inputs[1])
    if codewords is None or picks is None:
        return None
    nodes = [*codewords.nodes, *picks.nodes, gather]
    weight, scales, order = gather.outputs[0], None, None
    while (reader := _shaping_reader(graph, weight)) is not None:
        if is_op(reader, "Mul"):
            if scales is not None:
                break
            source = _factors(graph, next(t for t in reader.inputs if t is not weight))
            if source is None:
                break
            scales = source.constant
            nodes += source.nodes
        if is_op(reader, "Gather"):
            places = _order(graph, reader, weight)
            if places is None or order is not None:
                break
            order = places.constant
            nodes += places.nodes
        nodes.append(reader)
        weight = reader.outputs[0]
    return CodebookWeight(
        weight, codewords.constant, codewords.factor, picks.constant, picks.packed, scales, tuple(nodes), order
    )


def _order(graph: Graph, gather: Node, tensor: Tensor) -> _Source | None:
    """The stored order in which a Gather takes a decoded weight along another axis than the first."""
    if gather.inputs[0] is not tensor or not gather.attrs.get("axis", 0):
        return None
    add = graph.producer(gather.inputs[1])
    starts = add.inputs[1] if add is not None and is_op(add, "Add") else None
    places = _widened(graph, gather.inputs[1] if add is None or starts is None else add.inputs[0], INDEX_TYPES)
    if places is None or not places.nodes or (starts is not None and not isinstance(starts, Constant)):
        return None
    nodes = places.nodes if add is None or starts is None else (*places.nodes, add)
    return _Source(places.constant, starts, False, nodes)


def _factors(graph: Graph, tensor: Tensor) -> _Source | None:
    """Factors per output: a constant, or the rows of one that ids pick."""
    return _rows(graph, tensor, ("float16",)) or _widened(graph, tensor, ("float16", "float32"))


def _rows(graph: Graph, tensor: Tensor, types: Iterable[str]) -> _Source | None:
    """Rows that ids pick from a stored constant of one of these types, behind a Cast."""
    cast = graph.producer(tensor)
    rows = graph.producer(cast.inputs[0]) if cast is not None and is_op(cast, "Cast") else None
    if cast is None or rows is None or not _is_row_gather(rows, types):
        return None
    return _Source(rows.inputs[0], None, False, (rows, cast))


def _shaping_reader(graph: Graph, tensor: Tensor) -> Node | None:
    """The one reader, when it scales, moves, widens or puts in order what it reads."""
    reader = graph.only_reader(tensor)
    if reader is None or not is_op(reader, "Cast", "Gather", "Mul", "Reshape", "Transpose"):
        return None
    if is_op(reader, "Reshape") and not is_constant(reader.inputs[1]):
        return None
    return reader


def _codewords(graph: Graph, tensor: Tensor) -> _Source | None:
    mul = graph.producer(tensor)
    if mul is None or not is_op(mul, "Mul"):
        return _widened(graph, tensor, (*CODEWORD_TYPES, "float32"))
    for i in (0, 1):
        factor, source = mul.inputs[1 - i], _widened(graph, mul.inputs[i], CODEWORD_TYPES)
        if source is not None and source.nodes and isinstance(factor, Constant):
            return _Source(source.constant, factor, False, (*source.nodes, mul))
    return None


def _widened(graph: Graph, tensor: Tensor, types: Iterable[str]) -> _Source | None:
    """A constant of one of these types, itself or behind a Cast."""
    cast = graph.producer(tensor)
    nodes = (cast,) if cast is not None and is_op(cast, "Cast") else ()
    constant = cast.inputs[0] if cast is not None and nodes else tensor
    dtype = numpy_dtype(constant)
    if not isinstance(constant, Constant) or dtype is None or dtype.name not in types:
        return None
    return _Source(constant, None, False, nodes)


def _indices(graph: Graph, tensor: Tensor) -> _Source | None:
    node = graph.producer(tensor)
    if node is None or not is_op(node, "Concat"):
        source = _rows(graph, tensor, INDEX_TYPES) or _widened(graph, tensor, INDEX_TYPES)
        return source if source is not None and source.nodes else None
    if len(node.inputs) != 2:
        return None
    high, low = (graph.producer(half) for half in node.inputs)
    if high is None or low is None or not is_op(high, "Div") or not is_op(low, "Sub"):
        return None
    times = graph.producer(low.inputs[1])
    source = _rows(graph, high.inputs[0], ("uint8",)) or _widened(graph, high.inputs[0], ("uint8",))
    if times is None or source is None or not is_op(times, "Mul"):
        return None
    if low.inputs[0] is not high.inputs[0] or times.inputs[0] is not high.outputs[0]:
        return None
    return _Source(source.constant, None, True, (*source.nodes, high, times, low, node))


def _is_row_gather(node: Node, types: Iterable[str]) -> bool:
    """Whether a node picks rows of a stored constant of one of these types by ids that are no constant."""
    if not is_op(node, "Gather") or node.attrs.get("axis", 0) or not isinstance(node.inputs[0], Constant):
        return False
    dtype = numpy_dtype(node.inputs[0])
    return dtype is not None and dtype.name in types and not is_constant(node.inputs[1])


def _widening(graph: Graph, cast: Node, dtype: np.dtype) -> list[Node]:
    """The nodes from a Cast of a constant to a weight; none when it is another thing."""
    nodes, tensor = [cast], cast.outputs[0]
    mul = graph.only_reader(tensor)
    if is_op(mul, "Mul") and mul is not None and any(is_constant(t) for t in mul.inputs):
        nodes.append(mul)
        tensor = mul.outputs[0]
    elif dtype == np.int8:
        return []
    while (reader := _shaping_reader(graph, tensor)) is not None and not is_op(reader, "Gather", "Mul"):
        nodes.append(reader)
        tensor = reader.outputs[0]
    return nodes if tensor.outputs and all(_reads_weight(node, tensor) for node in tensor.outputs) else []


def _reads_weight(node: Node, tensor: Tensor) -> bool:
    return _reads(node, tensor, WEIGHT_SLOTS)


def _reads(node: Node, tensor: Tensor, places: Mapping[str, tuple[int, ...]]) -> bool:
    slots = places.get(node.op, ()) if is_op(node, node.op) else ()
    return any(optional_input(node, slot) is tensor for slot in slots)
