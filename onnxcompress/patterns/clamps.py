"""Clip and Relu as intervals with constant ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcompress.graph import Graph, Node, constant_value, is_op, numpy_dtype, optional_input


@dataclass(frozen=True)
class Clamp:
    """max(low, min(x, high)) with low <= high, NumPy scalars of ``dtype``.

    ``low_is_default`` and ``high_is_default`` say that a Clip does not give the bound: it then is the type's lowest or
    largest finite number, which infinities do not pass.
    """

    low: Any
    high: Any
    dtype: np.dtype
    low_is_default: bool = False
    high_is_default: bool = False

    def of(self, value: Any) -> Any:
        """A value, clamped; one that lies inside keeps its bits."""
        return self.low if value < self.low else self.high if value > self.high else value


def read_clamp(graph: Graph, node: Node | None) -> Clamp | None:
    """A Clip with constant bounds, or a Relu; None for anything else."""
    if node is None or not is_op(node, "Clip", "Relu"):
        return None
    dtype = numpy_dtype(node.inputs[0])
    if dtype is None or dtype.kind not in "fiu":
        return None
    if node.op == "Relu":
        top: Any = np.inf if dtype.kind == "f" else np.iinfo(dtype).max
        return Clamp(dtype.type(0), dtype.type(top), dtype)
    given = [_bound(graph, node, dtype, i) for i in (0, 1)]
    limits: Any = np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(dtype)
    if None in given:
        return None
    default = [isinstance(bound, str) for bound in given]
    low = dtype.type(limits.min) if default[0] else given[0]
    high = dtype.type(limits.max) if default[1] else given[1]
    # Not low > high alone: a bound may be NaN.
    return Clamp(low, high, dtype, default[0], default[1]) if low <= high else None


def _bound(graph: Graph, node: Node, dtype: np.dtype, index: int) -> Any:
    """The lower (0) or upper (1) bound, "default" when it is not given, None when it is not known."""
    if graph.opset < 11:
        value = node.attrs.get(("min", "max")[index])
        return "default" if value is None else dtype.type(value)
    tensor = optional_input(node, index + 1)
    if tensor is None:
        return "default"
    values = constant_value(tensor, limit=1)
    return None if values is None or values.dtype != dtype else values.reshape(-1)[0]
