"""The tensor that a layer's output is added to, as in a residual connection.

    y = Conv(x, W)  ->  (Add of a constant)*  ->  Add(y, s)

Such a layer can make up for what the layers before it lost in s, see ``target.py``.
"""

from __future__ import annotations

from onnxcompress.codebook.layers import Layer
from onnxcompress.graph import Graph, Tensor, is_constant, is_op

OPERATORS = ("Conv", "ConvTranspose", "MatMul", "Gemm")


def find_skip(graph: Graph, layer: Layer) -> Tensor | None:
    """The other operand s; None where there is none, or the layer's output has other readers.

    Shapes are not looked at: s may be broadcast.
    """
    use = layer.uses[0]
    if len(layer.uses) > 1 or layer.in_body or not is_op(use.node, *OPERATORS) or use.slot != 1:
        return None
    attrs = use.node.attrs
    if is_op(use.node, "Gemm") and (attrs.get("alpha", 1.0) != 1.0 or attrs.get("transA", 0)):
        return None
    tensor = use.node.outputs[0]
    while True:
        reader = graph.only_reader(tensor)
        if reader is None or not is_op(reader, "Add"):
            return None
        other = reader.inputs[1] if reader.inputs[0] is tensor else reader.inputs[0]
        if not is_constant(other):
            return other
        tensor = reader.outputs[0]
