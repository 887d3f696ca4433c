"""Drop arithmetic and logic that gives back one of its operands.

    before   y = Mul(x, 1), Div(x, 1), Pow(x, 1), Sub(x, 0), Add(x, 0), And(x, true), Or(x, false), Xor(x, false),
             Where(false, z, x), Max(x), Min(x), Sum(x), Mean(x), Neg(Neg(x)), Not(Not(x))
    after    x

Exact to the bit. Add(x, 0.0) stays, because it turns -0.0 into 0.0, and 1 / x shows the difference; so does
Where(true, x, z) in onnxruntime. Add(x, -0.0) goes, and so does all that on integers. The constant may have any shape
that leaves the shape of x alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxcompress.graph import Graph, Node, Tensor, constant_value, is_op, numpy_dtype, same_shape
from onnxcompress.patterns.bypass import BypassPass
from onnxcompress.rewrite import Miss

# Operator, position of the constant, and the element that leaves the other operand as it is.
NEUTRAL: dict[str, tuple[tuple[int, ...], float | bool]] = {
    "Mul": ((0, 1), 1),
    "Div": ((1,), 1),
    "Pow": ((1,), 1),
    "Sub": ((1,), 0),
    "Add": ((0, 1), 0),
    "And": ((0, 1), True),
    "Or": ((0, 1), False),
    "Xor": ((0, 1), False),
}
INVOLUTIONS = ("Neg", "Not")
OF_ONE = ("Max", "Min", "Sum", "Mean")
LARGEST_CONSTANT = 1 << 20


class EliminateNoopArithmetic(BypassPass):
    name = "eliminate-noop-arithmetic"
    ops = (*NEUTRAL, *INVOLUTIONS, *OF_ONE, "Where")

    def same_value(self, graph: Graph, node: Node) -> Tensor | Miss | None:
        if node.op in OF_ONE:
            return node.inputs[0] if len(node.inputs) == 1 else None
        if node.op in INVOLUTIONS:
            first = graph.producer(node.inputs[0])
            return first.inputs[0] if first is not None and is_op(first, node.op) else None
        if node.op == "Where":
            return self._where(node)
        positions, neutral = NEUTRAL[node.op]
        for position in positions:
            source, constant = node.inputs[1 - position], node.inputs[position]
            values = constant_value(constant, limit=LARGEST_CONSTANT)
            if values is None or values.dtype == object or not values.size or not np.all(values == neutral):
                continue
            if neutral == 0 and loses_sign(node.op, values):
                return Miss(node.name, "it turns -0.0 into 0.0")
            if not keeps_shape(source, values.shape, node.outputs[0]):
                return Miss(node.name, f"the constant of shape {list(values.shape)} may broadcast the other operand")
            return source
        return None

    def _where(self, node: Node) -> Tensor | Miss | None:
        condition = constant_value(node.inputs[0], limit=LARGEST_CONSTANT)
        if condition is None or not condition.size or condition.all() != condition.any():
            return None
        source, other = (node.inputs[1], node.inputs[2]) if condition.all() else (node.inputs[2], node.inputs[1])
        dtype = numpy_dtype(source)
        if source is node.inputs[1] and (dtype is None or dtype.kind not in "iubO"):
            return Miss(node.name, "onnxruntime's Where turns -0.0 of its second input into 0.0")
        if same_shape(source, node.outputs[0]):
            return source
        if other.shape is None or any(dim != 1 for dim in other.shape):
            return Miss(node.name, "the other branch may broadcast the result")
        wider = np.broadcast_shapes(condition.shape, tuple(other.shape))
        return source if keeps_shape(source, wider, node.outputs[0]) else Miss(node.name, "the shape may change")


def loses_sign(op: str, zeros: np.ndarray) -> bool:
    """Whether x + zeros or x - zeros is 0.0 for an x of -0.0; x - 0.0 and x + -0.0 are not."""
    return zeros.dtype.kind not in "iub" and bool(np.any(np.signbit(zeros) != (op == "Add")))


def keeps_shape(source: Tensor, shape: Sequence[int], output: Tensor) -> bool:
    """Whether an operand of ``shape`` leaves the shape of ``source`` alone when they are broadcast together."""
    if same_shape(source, output) or not shape:
        return True
    return source.shape is not None and len(shape) <= len(source.shape) and all(size == 1 for size in shape)
