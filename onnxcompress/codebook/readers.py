"""The operators that read a weight: at which input, as what matrix, on which rows, and where their bias is.

Conv, ConvTranspose, Gemm   bias in the node, added where there was none
MatMul                      bias in the Add behind it; a new Add where the weight is large enough to hide its time
LSTM, GRU, RNN              W and R are two weights, each with its half of the B input
Gather                      none
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcompress.codebook.biases import Bias, added_bias, own_bias, recurrent_bias
from onnxcompress.codebook.rows import Form, RowSource, Window
from onnxcompress.codebook.views import (
    Origin,
    View,
    columns_view,
    conv_transpose_view,
    find_origin,
    is_stored,
    rows_view,
)
from onnxcompress.graph import Graph, Node, Tensor, optional_input

RECURRENT = {"LSTM": 4, "GRU": 3, "RNN": 1}  # gates
CANDIDATES = frozenset({"Conv", "ConvTranspose", "Gather", "Gemm", "MatMul", *RECURRENT})
# Operators on quantized weights, and the input where the weight is.
QUANTIZED_OPERATORS = {
    "ConvInteger": 1,
    "GatherBlockQuantized": 0,
    "MatMulInteger": 1,
    "MatMulNBits": 1,
    "QGemm": 3,
    "QLinearConv": 3,
    "QLinearMatMul": 3,
    "DynamicQuantizeMatMul": 1,
}
Refused = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Use:
    """One node's reading of a weight."""

    node: Node
    slot: int
    kind: str
    origin: Origin
    view: View
    rows: RowSource
    groups: int = 1
    bias: Bias | None = None


def read_uses(
    graph: Graph, node: Node, static: Collection[Node], decoded: Mapping[Tensor, str]
) -> Iterator[Use | Refused]:
    """The weights that a node reads, and those that it reads in a way that is not supported.

    Args:
        graph: The graph of the node.
        node: One of ``CANDIDATES``.
        static: Nodes that depend on constants alone.
        decoded: Weights that are compressed already, and as what.
    """
    slots = {"Gather": (0,), "MatMul": (1, 0), "Gemm": (1, 0)}.get(node.op, (1, 2) if node.op in RECURRENT else (1,))
    for slot in slots:
        tensor = optional_input(node, slot)
        if tensor is None:
            continue
        if _overridable(graph, tensor):
            yield tensor.name, "the caller may override it (an initializer that is an input too)"
            continue
        if tensor in decoded:
            yield tensor.name, decoded[tensor]
            continue
        if not (is_stored(tensor) or (tensor.inputs and tensor.inputs[0] in static)):
            continue
        origin = find_origin(tensor)
        if isinstance(origin, str):
            yield tensor.name, origin
            continue
        dtype = np.dtype(origin.root_values().dtype)
        if dtype.kind in "iubO" and not origin.nodes:
            continue  # a table of integers or strings
        found = _read(graph, node, slot, origin)
        yield found if isinstance(found, Use) else (origin.root.name, found)


def _overridable(graph: Graph, tensor: Tensor) -> bool:
    home: Graph | None = graph
    while home is not None:
        if tensor.name in home.overridable and any(tensor is value for value in home.inputs):
            return True
        home = home.outer
    return False


def _read(graph: Graph, node: Node, slot: int, origin: Origin) -> Use | str:
    shape = tuple(origin.values().shape)
    if node.op == "Conv":
        return _read_conv(node, origin, shape)
    if node.op == "ConvTranspose":
        return _read_conv_transpose(node, origin, shape)
    if node.op == "Gemm":
        return _read_gemm(graph, node, slot, origin, shape)
    if node.op == "MatMul":
        return _read_matmul(graph, node, slot, origin, shape)
    if node.op == "Gather":
        return _read_gather(node, origin, shape)
    return _read_recurrent(node, slot, origin, shape)


def _window(node: Node, kernel: tuple[int, ...]) -> Window:
    axes = len(kernel)

    def ints(name: str, default: int) -> tuple[int, ...]:
        return tuple(node.attrs.get(name) or [default] * axes)

    auto_pad = str(node.attrs.get("auto_pad") or "NOTSET")
    pads: Any = None
    if auto_pad in ("NOTSET", "VALID"):
        pads = tuple((auto_pad == "NOTSET" and node.attrs.get("pads")) or [0] * (2 * axes))
    return Window(
        kernel,
        ints("strides", 1),
        ints("dilations", 1),
        pads,
        auto_pad,
        tuple(node.attrs.get("output_padding") or ()),
        tuple(node.attrs.get("output_shape") or ()),
    )


def _read_conv(node: Node, origin: Origin, shape: tuple[int, ...]) -> Use | str:
    if len(shape) < 3:
        return f"a Conv weight of shape {list(shape)} has no kernel axis"
    group = int(node.attrs.get("group", 1))
    window = _window(node, shape[2:])
    if window.pads is not None and min(window.pads) < 0:
        return f"Conv {node.name!r} has a negative pad"
    source = RowSource("patches", node.inputs[0].name, group, window)
    return Use(node, 1, "Conv", origin, rows_view(shape, shape[0]), source, group, own_bias(node, shape[0]))


def _read_conv_transpose(node: Node, origin: Origin, shape: tuple[int, ...]) -> Use | str:
    if len(shape) < 3:
        return f"a ConvTranspose weight of shape {list(shape)} has no kernel axis"
    group = int(node.attrs.get("group", 1))
    source = RowSource("spread patches", node.inputs[0].name, group, _window(node, shape[2:]))
    bias = own_bias(node, shape[1] * group)
    return Use(node, 1, "ConvTranspose", origin, conv_transpose_view(shape, group), source, group, bias)


def _read_gemm(graph: Graph, node: Node, slot: int, origin: Origin, shape: tuple[int, ...]) -> Use | str:
    if slot == 0:
        return f"it is the left operand of Gemm {node.name!r}"
    view = rows_view(shape, shape[0]) if node.attrs.get("transB", 0) else columns_view(shape)
    form: Form = "last but one axis" if node.attrs.get("transA", 0) else "last axis"
    factors = [float(node.attrs.get(name, 1.0)) for name in ("alpha", "beta")]
    # C is optional since opset 11.
    addable = factors == [1.0, 1.0] and (graph.opset >= 11 or optional_input(node, 2) is not None)
    bias = own_bias(node, view.outputs) if addable else None
    return Use(node, 1, "Gemm", origin, view, RowSource(form, node.inputs[0].name), bias=bias)


def _read_matmul(graph: Graph, node: Node, slot: int, origin: Origin, shape: tuple[int, ...]) -> Use | str:
    other = node.inputs[1 - slot].name
    if len(shape) < 2 or any(size != 1 for size in shape[:-2]):
        return f"MatMul {node.name!r} reads it as {len(shape)} axes {list(shape)}, not as one matrix"
    if slot == 0:
        return Use(node, 0, "MatMul", origin, rows_view(shape, shape[-2]), RowSource("last but one axis", other))
    bias = added_bias(graph, node, shape[-1], shape[-2])
    return Use(node, 1, "MatMul", origin, columns_view(shape), RowSource("last axis", other), bias=bias)


def _read_gather(node: Node, origin: Origin, shape: tuple[int, ...]) -> Use | str:
    if len(shape) != 2 or int(node.attrs.get("axis", 0)) not in (0, -2):
        return f"Gather {node.name!r} does not pick rows of a table: axis {node.attrs.get('axis', 0)} of {list(shape)}"
    return Use(node, 0, "Gather", origin, rows_view(shape, shape[0]), RowSource("ids", node.inputs[1].name))


def _read_recurrent(node: Node, slot: int, origin: Origin, shape: tuple[int, ...]) -> Use | str:
    if len(shape) != 3:
        return f"{node.op} {node.name!r} reads it as {len(shape)} axes, not 3"
    directions, rows = shape[:2]
    layout = int(node.attrs.get("layout", 0))
    view = rows_view(shape, directions * rows)
    bias = recurrent_bias(node, slot, directions, rows)
    kind = f"{node.op} {'W' if slot == 1 else 'R'}"
    if slot == 1:
        return Use(node, slot, kind, origin, view, RowSource("last axis", node.inputs[0].name), bias=bias)
    initial = optional_input(node, 5)
    source = RowSource(
        "hidden states",
        hidden_states_name(node),
        directions,
        initial="" if initial is None else initial.name,
        direction=str(node.attrs.get("direction", "forward")),
        layout=layout,
    )
    return Use(node, slot, kind, origin, view, source, directions, bias)


def hidden_states_name(node: Node) -> str:
    """What the hidden states of all steps are called; the node itself may leave that output out."""
    return f"{node.inputs[1].name}/{node.name or node.op}/hidden_states"
