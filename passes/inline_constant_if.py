"""Put the nodes of a branch in place of an If whose condition is known.

    before   y = If (true) <then_branch = { p = Relu(x) }, else_branch = { q = Neg(x) }>
    after    y = Relu(x)

Exact. Inner tensors get a new name where theirs is taken. An output of the branch that no node of it makes (a constant,
or a tensor from outside) goes through an Identity.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnxcompress.graph import Constant, Graph, Node, Tensor, bodies, scalar_value
from onnxcompress.patterns.bypass import is_used
from onnxcompress.rewrite import Miss, RewritePass


@dataclass(frozen=True)
class Site:
    node: Node
    branch: Graph


class InlineConstantIf(RewritePass[Site]):
    name = "inline-constant-if"
    ops = ("If",)

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        condition = scalar_value(node.inputs[0])
        if condition is None:
            return None
        branch = node.attrs.get("then_branch" if condition else "else_branch")
        if not isinstance(branch, Graph) or len(branch.outputs) != len(node.outputs):
            return None
        if branch.overridable or branch.inputs:
            return Miss(node.name, "the branch has inputs of its own")
        return Site(node, branch)

    def rewrite(self, graph: Graph, site: Site) -> None:
        node, branch = site.node, site.branch
        outputs, results = list(node.outputs), list(branch.outputs)
        node.outputs = []
        moved = list(branch.nodes)
        rename(graph, branch)
        for inner in moved:
            branch.nodes.remove(inner)
            graph.nodes.insert(graph.nodes.index(node), inner)
            graph.touch(inner)
            for body in bodies(inner):
                body.outer = graph
        for output, result in zip(outputs, results, strict=True):
            if not is_used(graph, output):
                continue
            maker = graph.producer(result)
            if maker is not None and maker in moved and sum(result is other for other in results) == 1:
                maker.outputs = [output if tensor is result else tensor for tensor in maker.outputs]
                graph.redirect(result, output)
            else:
                graph.insert("Identity", [result], [output], before=node)
        graph.remove(node)


def rename(graph: Graph, branch: Graph) -> None:
    """Hand a branch's tensors and initializers over to ``graph``, under new names where theirs are taken."""
    own: dict[Tensor, None] = {
        tensor: None for node in branch.nodes for tensor in node.outputs if not tensor.is_empty()
    }
    for inner in branch.walk():
        for tensor in [t for node in inner.nodes for t in node.inputs] + list(inner.outputs):
            if isinstance(tensor, Constant) and (tensor.home or inner) is branch:
                own[tensor] = None
    taken = names_outside(graph, branch)
    for tensor in own:
        if tensor.name in taken:
            tensor.name = graph.scope.fresh(tensor.name)
        if isinstance(tensor, Constant):
            tensor.home = graph
    node_names = {node.name for inner in outermost(graph).walk() if inner is not branch for node in inner.nodes}
    for node in branch.nodes:
        if node.name in node_names:
            node.name = graph.scope.fresh(node.name)


def names_outside(graph: Graph, branch: Graph) -> set[str]:
    """Names of all tensors of the model but those of ``branch`` itself; those of graphs nested in it count."""
    names: set[str] = set()
    for inner in outermost(graph).walk():
        if inner is branch:
            continue
        names.update(tensor.name for tensor in inner.inputs)
        names.update(tensor.name for tensor in inner.unread)
        names.update(inner.overridable)
        for node in inner.nodes:
            names.update(tensor.name for tensor in node.outputs)
            for tensor in node.inputs:
                if isinstance(tensor, Constant) and tensor.home is not branch:
                    names.add(tensor.name)
    return names


def outermost(graph: Graph) -> Graph:
    """The model's graph."""
    while graph.outer is not None:
        graph = graph.outer
    return graph
