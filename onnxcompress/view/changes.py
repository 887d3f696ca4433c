"""Which nodes of one model another one has not, has in addition, or has changed.

Nodes are the same where they have the same name; those without a name, where they are of one operator and make a tensor
of the same name. Only the outermost graph is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, numpy_helper

from onnxcompress.model_io import PASS_KEY

Key = tuple[str, str]


@dataclass(frozen=True)
class NodeChange:
    """A node that is not the same in both models.

    Attributes:
        status: "gone" (only in the first), "new" (only in the second) or "changed".
        name: Its name; empty where it has none.
        output: The first tensor that it makes.
        operator: Its type, in the second model where it is there.
        detail: The pass that made it, and what is different.
    """

    status: str
    name: str
    output: str
    operator: str
    detail: str


def node_changes(first: GraphProto, second: GraphProto) -> list[NodeChange]:
    """The nodes that differ, in the order of the second graph, then those that are gone."""
    before, after = _Side(first), _Side(second)
    found = []
    for key, node in after.nodes.items():
        old = before.nodes.get(key)
        if old is None:
            found.append(_change("new", node, _made_by(node)))
        elif differences := [*_differences(before, old, after, node)]:
            found.append(_change("changed", node, "; ".join([*differences, *filter(None, [_made_by(node)])])))
    found += [_change("gone", node, "") for key, node in before.nodes.items() if key not in after.nodes]
    return found


class _Side:
    """A graph with its nodes by key and its constants by name."""

    def __init__(self, graph: GraphProto) -> None:
        self.constants: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant":
                for attr in node.attribute:
                    if attr.type == AttributeProto.TENSOR:
                        self.constants[node.output[0]] = attr.t
        self.nodes: dict[Key, NodeProto] = {}
        for node in graph.node:
            key = (node.name, "") if node.name else (node.op_type, node.output[0] if node.output else "")
            while key in self.nodes:  # names need not be unique
                key = (key[0], f"{key[1]}'")
            self.nodes[key] = node


def _change(status: str, node: NodeProto, detail: str) -> NodeChange:
    return NodeChange(status, node.name, next(iter(node.output), ""), node.op_type, detail)


def _made_by(node: NodeProto) -> str:
    return next((entry.value for entry in node.metadata_props if entry.key == PASS_KEY), "")


def _differences(before: _Side, old: NodeProto, after: _Side, new: NodeProto) -> Iterator[str]:
    if (old.domain, old.op_type) != (new.domain, new.op_type):
        yield f"{old.op_type} -> {new.op_type}"
        return
    ours, theirs = ({attr.name: attr.SerializeToString() for attr in node.attribute} for node in (old, new))
    attributes = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if attributes:
        yield f"attributes {', '.join(attributes)}"
    if len(old.input) != len(new.input):
        yield f"{len(old.input)} -> {len(new.input)} inputs"
    for one, other in zip(old.input, new.input, strict=False):
        mine, yours = before.constants.get(one), after.constants.get(other)
        if mine is None and yours is None:
            continue
        if mine is None or yours is None:
            yield f"{one} is {'computed' if yours is None else 'a constant'} now"
        elif list(mine.dims) != list(yours.dims):
            yield f"{other} {list(mine.dims)} -> {list(yours.dims)}"
        elif _content(mine) != _content(yours):
            yield f"{other} has other values"


def _content(tensor: TensorProto) -> tuple[int, object]:
    """The values with their type; external data count as the same where they are of the same length."""
    if tensor.data_location == TensorProto.EXTERNAL:
        return tensor.data_type, [entry.value for entry in tensor.external_data if entry.key == "length"]
    values = numpy_helper.to_array(tensor)
    return tensor.data_type, values.tolist() if values.dtype == object else values.tobytes()
