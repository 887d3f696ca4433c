"""Which outputs of a model are drawn at random."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnx import GraphProto, ModelProto, NodeProto, numpy_helper

RANDOM_OPS = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}


def random_outputs(model: ModelProto) -> set[str]:
    """Outputs of a model that depend on a random operator, in subgraphs and local functions too."""
    functions = {(f.domain, f.name): f for f in model.functions}
    known: dict[tuple[str, str], bool] = {}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for body in (model.graph, *model.functions):
        constants |= {
            n.output[0]: n.attribute[0].t for n in _nodes(body.node) if n.op_type == "Constant" and n.attribute
        }

    def draws(node: NodeProto) -> bool:
        key = (node.domain, node.op_type)
        if node.op_type in RANDOM_OPS:
            return True
        if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]:
            tensor = constants.get(node.input[2])  # training_mode
            return tensor is None or bool(numpy_helper.to_array(tensor).any())
        if key in functions and key not in known:
            known[key] = False  # while it is looked at: a function cannot call itself
            known[key] = any(draws(inner) for inner in functions[key].node)
        return known.get(key, False) or any(draws(inner) for graph in _graphs(node) for inner in graph.node)

    tainted: set[str] = set()
    for node in model.graph.node:
        if draws(node) or not tainted.isdisjoint(_reads(node)):
            tainted.update(node.output)
    return {value.name for value in model.graph.output if value.name in tainted}


def _graphs(node: NodeProto) -> list[GraphProto]:
    return [graph for attr in node.attribute for graph in ([attr.g] if attr.HasField("g") else attr.graphs)]


def _nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        for graph in _graphs(node):
            yield from _nodes(graph.node)


def _reads(node: NodeProto) -> set[str]:
    """Names that a node reads, those that its subgraphs capture included."""
    names = set(node.input)
    for graph in _graphs(node):
        names.update(*(_reads(inner) for inner in graph.node), (value.name for value in graph.output))
    return names
