"""Let nodes that compute the same thing from the same tensors be one node (common subexpressions).

    before   a = Relu(x)    b = Relu(x)    y = Add(a, b)
    after    a = Relu(x)    y = Add(a, a)

Exact. Attributes are equal when their bits are, an omitted one being its default: 0.0 is not -0.0. Left alone: random
operators, nodes that hold graphs, other domains (what they do is not known), two nodes that both make model outputs.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import AttributeProto, defs

from onnxcompress.graph import Constant, Graph, Node, bodies
from onnxcompress.patterns.bypass import is_used
from onnxcompress.rewrite import Miss, RewritePass

RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Dropout"}
)
COMMUTATIVE = frozenset({"Add", "And", "Equal", "Mul", "Or", "Xor"})


@dataclass(frozen=True)
class Site:
    kept: Node
    dropped: Node


class DeduplicateNodes(RewritePass[Site]):
    name = "deduplicate-nodes"

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        if node.op in RANDOM or not node.inputs or bodies(node):
            return None
        # Equal nodes share every input, so the one that is read least has the fewest candidates.
        read_least = min((t for t in node.inputs if not t.is_empty()), key=lambda t: len(t.outputs), default=None)
        if read_least is None or len(read_least.outputs) < 2:
            return None
        miss = None
        for other in read_least.outputs:
            if other is node or not self._is_equal(graph, node, other):
                continue
            if graph.nodes.index(other) > graph.nodes.index(node):
                continue  # it will find this one
            reason = why_not_replace(graph, node, other)
            if reason is None:
                return Site(other, node)
            miss = Miss(node.name, reason)
        return miss

    def _is_equal(self, graph: Graph, node: Node, other: Node) -> bool:
        if other.op != node.op or other.graph is not graph or other.domain not in self.domains:
            return False
        return same_inputs(node, other) and attributes(graph, node) == attributes(graph, other)

    def rewrite(self, graph: Graph, site: Site) -> None:
        for old, new in zip(list(site.dropped.outputs), list(site.kept.outputs), strict=False):
            if is_used(graph, old):
                graph.bypass(old, new)
        graph.remove(site.dropped)


def why_not_replace(graph: Graph, node: Node, other: Node) -> str | None:
    """The reason why the outputs of ``other`` cannot stand for those of ``node``, or None when they can."""
    for index, old in enumerate(node.outputs):
        if not is_used(graph, old):
            continue
        if index >= len(other.outputs) or other.outputs[index].is_empty():
            return "the equal node does not make all outputs that are read"
        reason = graph.why_not_bypass(old, other.outputs[index])
        if reason is not None:
            return reason
    return None


def same_inputs(a: Node, b: Node) -> bool:
    """Whether two nodes of one operator read the same tensors, in any order where that does not matter."""
    if len(a.inputs) != len(b.inputs):
        return False
    pairs = list(zip(a.inputs, b.inputs, strict=True))
    if all(x is y or (x.is_empty() and y.is_empty()) for x, y in pairs):
        return True
    return a.op in COMMUTATIVE and a.inputs[0] is b.inputs[1] and a.inputs[1] is b.inputs[0]


def attributes(graph: Graph, node: Node) -> dict[str, Any] | None:
    """The attributes as bits, defaults filled in; never equal to anything when one cannot be compared."""
    try:
        schema = defs.get_schema(node.op, graph.opset, "").attributes
    except defs.SchemaError:
        schema = {}
    values = {
        name: default_value(attr.default_value) for name, attr in schema.items() if attr.default_value.type
    } | dict(node.attrs)
    return {name: bits(value) for name, value in values.items()}


def default_value(attr: AttributeProto) -> Any:
    """The Python value of a default; those of ONNX are numbers, strings and lists of them."""
    kinds = {AttributeProto.FLOAT: "f", AttributeProto.INT: "i", AttributeProto.STRING: "s"}
    lists = {AttributeProto.FLOATS: "floats", AttributeProto.INTS: "ints", AttributeProto.STRINGS: "strings"}
    if attr.type in kinds:
        return getattr(attr, kinds[attr.type])
    return list(getattr(attr, lists[attr.type])) if attr.type in lists else attr


def bits(value: Any) -> Any:
    """A value to compare by its bits; an object that equals only itself for what has none."""
    if isinstance(value, (bool, int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return struct.pack("<f", value)
    if isinstance(value, (str, bytes)):
        return value.encode() if isinstance(value, str) else value
    if isinstance(value, (list, tuple)):
        return tuple(bits(item) for item in value)
    if isinstance(value, Constant):
        array = value.values
        content = tuple(array.reshape(-1)) if array.dtype == object else array.tobytes()
        return (str(array.dtype), array.shape, content)
    if isinstance(value, AttributeProto):
        return value.SerializeToString(deterministic=True)
    return object()
