"""Drop an activation that its input has behind it already.

    before   y = Relu(Exp(x)), Abs(Abs(x)), Floor(Ceil(x)), Sign(Sign(x))
    after    y = Exp(x), Abs(x), Ceil(x), Sign(x)

Exact to the bit. Abs after Relu stays, since Relu lets -0.0 pass. Relu and Clip among themselves: ``fuse-clip-chain``.
"""

from __future__ import annotations

from onnxcompress.graph import Graph, Node, Tensor, is_op
from onnxcompress.patterns.bypass import BypassPass
from onnxcompress.rewrite import Miss

NOT_NEGATIVE = ("Abs", "Exp", "HardSigmoid", "Softmax", "Softplus", "ReduceL1", "ReduceL2", "ReduceSumSquare")
INTEGRAL = ("Ceil", "Floor", "Round")

# An operator, and those whose outputs it leaves as they are.
REDUNDANT_AFTER = {
    "Relu": (*NOT_NEGATIVE, "Sqrt"),
    "Abs": NOT_NEGATIVE,
    "Ceil": (*INTEGRAL, "Sign"),
    "Floor": (*INTEGRAL, "Sign"),
    "Round": (*INTEGRAL, "Sign"),
    "Sign": ("Sign",),
}


class EliminateRedundantActivation(BypassPass):
    name = "eliminate-redundant-activation"
    ops = tuple(REDUNDANT_AFTER)

    def same_value(self, graph: Graph, node: Node) -> Tensor | Miss | None:
        first = graph.producer(node.inputs[0])
        return node.inputs[0] if is_op(first, *REDUNDANT_AFTER[node.op]) else None
