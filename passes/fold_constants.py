"""Compute now what depends on constants alone, as long as the file does not grow by it.

    before   y = Mul(x, Sqrt(c))
    after    y = Mul(x, c')         with c' = Sqrt(c)

Exact: the numbers are those of onnxruntime, or of NumPy where both are the same to the bit. A result that takes over
1 KB more than the constants it sets free is not stored: Expand, Tile and ConstantOfShape stay the few bytes they are.
Nodes are folded together where only their last result is small: Concat(Slice(c), Slice(c)).
Never folded: random operators, nodes that hold graphs, QuantizeLinear and DequantizeLinear (int8 weights stay int8),
and nodes that decode a weight from a codebook, int8 or float16 (see ``patterns.decoded_weights``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcompress.errors import RuntimeFailure
from onnxcompress.graph import Constant, Graph, Node, Tensor, bodies, is_constant, is_op, numpy_dtype, static_shape
from onnxcompress.passes.deduplicate_nodes import RANDOM
from onnxcompress.patterns.bypass import is_used
from onnxcompress.patterns.constant_evaluation import evaluate_in_numpy, single_node_model
from onnxcompress.patterns.decoded_weights import decoding_nodes
from onnxcompress.rewrite import Miss, PassResult, RewritePass, Settings, remove_if_unread

logger = logging.getLogger(__name__)

GROWTH_ALLOWANCE_BYTES = 1024
NEVER = RANDOM | {"Constant", "DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"}
MAY_GROW = frozenset({"Expand", "Tile", "ConstantOfShape", "Range", "Resize", "Upsample", "Pad", "OneHot"})
MAX_NODES = 256  # that are folded together
STRING_BYTES = 16  # stands for the length of a string, which is not known without reading it


@dataclass(frozen=True)
class Site:
    """The last of ``nodes`` gives ``results``; those before it go with it unless something else reads them."""

    nodes: tuple[Node, ...]
    results: tuple[np.ndarray, ...]
    growth_bytes: int


class FoldConstants(RewritePass[Site]):
    name = "fold-constants"

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        self.growth_bytes = 0
        self._derived: set[Node] = set()
        self._decoding: set[Node] = set()

    def sweep(self, graph: Graph, result: PassResult) -> None:
        self._decoding = decoding_nodes(graph)
        self._derived = derived_nodes(graph, self._decoding)
        super().sweep(graph, result)

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        if node not in self._derived:
            if is_codebook(node):
                return Miss(node.name, "it decodes a codebook")
            return Miss(node.name, "it decodes a weight") if node in self._decoding else None
        if any(graph.is_output(tensor) for tensor in node.outputs):
            return Miss(node.name, "a graph output would be an initializer")
        nodes = upstream(graph, node)
        if len(nodes) > MAX_NODES:
            return Miss(node.name, f"it depends on more than {MAX_NODES} nodes")
        given = dict.fromkeys(tensor for one in nodes for tensor in one.inputs if is_constant(tensor))
        gone = nodes_set_free(graph, nodes)
        freed = sum(size_bytes(t) for t in given if gone.issuperset(t.outputs) and not graph.is_output(t))
        limit = max(self.settings.max_constant_bytes, sum(map(size_bytes, given)))
        for one in nodes:
            expected = expected_bytes(one)
            if expected is None and one.op in MAY_GROW:
                return Miss(node.name, f"the size of what {one.op} makes is not known")
            if expected is not None and expected > limit:
                return Miss(node.name, f"{one.op} makes {expected} bytes, allowed {limit}")
        reason = self._growth(expected_bytes(node) or 0, freed)
        if reason is not None:
            return Miss(node.name, reason)
        results = self._evaluate(graph, nodes)
        if results is None:
            return Miss(node.name, "onnxruntime is not there to compute it, or refuses to")
        total = sum(array_bytes(array) for array in results)
        reason = self._growth(total, freed)
        return Miss(node.name, reason) if reason is not None else Site(nodes, tuple(results), total - freed)

    def rewrite(self, graph: Graph, site: Site) -> None:
        node = site.nodes[-1]
        outputs = list(node.outputs)
        graph.remove(node)
        for tensor, array in zip(outputs, site.results, strict=True):
            if is_used(graph, tensor):
                graph.redirect(tensor, Constant(tensor.name, array, home=graph))
        remove_if_unread(graph, site.nodes[-2::-1])
        self.growth_bytes += max(site.growth_bytes, 0)

    def _growth(self, result_bytes: int, freed: int) -> str | None:
        growth = result_bytes - freed
        if growth > GROWTH_ALLOWANCE_BYTES:
            return f"the result has {growth} bytes more than what it replaces, allowed {GROWTH_ALLOWANCE_BYTES}"
        if self.growth_bytes + growth > self.settings.max_constant_bytes:
            return f"folding has added {self.growth_bytes} bytes already, allowed {self.settings.max_constant_bytes}"
        return None

    def _evaluate(self, graph: Graph, nodes: Sequence[Node]) -> list[np.ndarray] | None:
        """The outputs of the last of ``nodes``, each of which depends on constants and those before it."""
        arrays: dict[Tensor, np.ndarray] = {}
        results: list[np.ndarray] = []
        for node in nodes:
            given = [None if t.is_empty() else t.values if is_constant(t) else arrays[t] for t in node.inputs]
            found = evaluate_in_numpy(graph, node, given) or self._evaluate_in_onnxruntime(graph, node, given)
            if found is None:
                return None
            results = found
            arrays.update(zip(node.outputs, results, strict=True))
        return results

    def _evaluate_in_onnxruntime(
        self, graph: Graph, node: Node, given: Sequence[np.ndarray | None]
    ) -> list[np.ndarray] | None:
        if self.settings.evaluate is None:
            return None
        pairs = zip(node.inputs, given, strict=True)
        model = single_node_model(graph, node, {t.name: array for t, array in pairs if array is not None})
        try:
            made = self.settings.evaluate(model, {})
        except RuntimeFailure as failure:
            logger.debug(
                "%s %r is not folded: %s", node.op, node.name, failure
            )  # it fails at run time, or not: as before
            return None
        if not all(isinstance(array, np.ndarray) for array in made):
            return None  # a sequence or a map
        results = iter(made)
        return [np.zeros(0) if tensor.is_empty() else next(results) for tensor in node.outputs]


def derived_nodes(graph: Graph, kept: Collection[Node] = ()) -> set[Node]:
    """The nodes of a graph that depend on constants alone and may be folded: none of ``kept``, nor what reads them."""
    derived: set[Node] = set()
    for node in graph.nodes:
        given = [tensor for tensor in node.inputs if not tensor.is_empty()]
        if not given or node.op in NEVER or not is_op(node, node.op) or bodies(node):
            continue
        if node in kept or is_codebook(node):
            continue
        if all(is_constant(tensor) or graph.producer(tensor) in derived for tensor in given):
            derived.add(node)
    return derived


def upstream(graph: Graph, node: Node) -> tuple[Node, ...]:
    """``node`` after all nodes that it depends on, in order; a few more than ``MAX_NODES`` at most."""
    found: dict[Node, None] = {}
    stack = [(node, False)]
    while stack and len(found) <= MAX_NODES:
        one, done = stack.pop()
        if done:
            found[one] = None
        elif one not in found:
            stack.append((one, True))
            stack += [(maker, False) for t in one.inputs if (maker := graph.producer(t)) is not None]
    return tuple(found)


def nodes_set_free(graph: Graph, nodes: Sequence[Node]) -> set[Node]:
    """Those of ``nodes`` that nothing needs once the last is gone."""
    gone = {nodes[-1]}
    for node in reversed(nodes[:-1]):
        if all(gone.issuperset(t.outputs) and not graph.is_output(t) for t in node.outputs):
            gone.add(node)
    return gone


def is_codebook(node: Node) -> bool:
    """Whether a Cast makes the indices of a Gather from small unsigned numbers, or the codewords it picks from."""
    if not is_op(node, "Cast"):
        return False
    for reader in node.outputs[0].outputs:
        if is_op(reader, "Gather"):
            picks = reader.inputs[1]
            cast = picks.inputs[0] if picks.inputs else None
            source = numpy_dtype(cast.inputs[0]) if cast is not None and is_op(cast, "Cast") else None
            if source is not None and source.name in ("uint2", "uint4", "uint8", "uint16"):
                return True
    return False


def size_bytes(constant: Constant) -> int:
    """Bytes of a constant in the file, without reading it."""
    count = math.prod(constant.shape)
    return STRING_BYTES * count if constant.dtype == object else constant.nbytes


def array_bytes(array: np.ndarray) -> int:
    """Bytes of an array in the file."""
    return array.size * (STRING_BYTES if array.dtype == object else array.itemsize)


def expected_bytes(node: Node) -> int | None:
    """Bytes of the outputs of a node; None where a type or shape is not known."""
    total = 0
    for tensor in node.outputs:
        shape, dtype = static_shape(tensor), numpy_dtype(tensor)
        if tensor.is_empty():
            continue
        if shape is None or dtype is None:
            return None
        total += math.prod(shape) * (STRING_BYTES if dtype.kind == "O" else dtype.itemsize)
    return total
