"""Remove what no output depends on: nodes, unread initializers, and optional outputs that nothing reads.

    before   y = Relu(x)    d = Neg(x)    v, i = MaxPool(y)      with d and i unread
    after    y = Relu(x)    v = MaxPool(y)

Exact, random operators included. Subgraphs are cleaned as well. Model inputs and outputs stay, read or not, and so does
an initializer that is also an input: the caller may know it. Nodes of other domains are removed like any other.
"""

from __future__ import annotations

from onnx import defs

from onnxcompress.graph import Graph, Node, Variable, bodies, is_op
from onnxcompress.patterns.bypass import is_used
from onnxcompress.rewrite import PassResult, Rewrite, RewritePass

# From the second output on, these mean another mode of the operator (training, before opset 14).
KEEPS_OUTPUTS = ("BatchNormalization",)


class EliminateDeadCode(RewritePass[Node]):
    name = "eliminate-dead-code"

    def sweep(self, graph: Graph, result: PassResult) -> None:
        # Inner graphs first: what they no longer read may be dead out here.
        for node in list(graph.nodes):
            for body in bodies(node):
                self.sweep(body, result)
        for node in reversed(list(graph.nodes)):
            if not any(is_used(graph, tensor) for tensor in node.outputs):
                result.done.append(Rewrite(node.name or node.op, detail="nothing reads its outputs"))
                graph.remove(node)
            elif len(node.outputs) > 1 and is_op(node, node.op) and node.op not in KEEPS_OUTPUTS:
                self._drop_outputs(graph, node, result)
        for constant in graph.unread:
            result.done.append(Rewrite(constant.name, detail="nothing reads the initializer"))
        graph.unread = []

    def _drop_outputs(self, graph: Graph, node: Node, result: PassResult) -> None:
        outputs = list(node.outputs)
        for index, tensor in enumerate(outputs):
            if not tensor.is_empty() and not is_used(graph, tensor) and is_optional(graph, node, index):
                outputs[index] = Variable.empty()
        while outputs[-1].is_empty():
            outputs.pop()
        if len(outputs) < len(node.outputs) or any(a is not b for a, b in zip(outputs, node.outputs, strict=True)):
            node.outputs = outputs
            graph.touch(node)
            result.done.append(Rewrite(node.name or node.op, detail="optional outputs that nothing reads"))


def is_optional(graph: Graph, node: Node, index: int) -> bool:
    """Whether the operator may leave out its output at ``index``."""
    try:
        outputs = defs.get_schema(node.op, graph.opset, "").outputs
    except defs.SchemaError:
        return False  # not an operator of this opset; the checker will say so
    return index < len(outputs) and outputs[index].option == defs.OpSchema.FormalParameterOption.Optional
