"""Operators that work on each element: one operand, or several with broadcasting."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from onnxcompress.channels.labels import Line, lines, padded, varied
from onnxcompress.channels.trace import UNKNOWN, WILD, Offset, Trace, blurred
from onnxcompress.graph import Node, Tensor, is_constant, optional_input, scalar_value

Number = Callable[[float, Node], float]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


# The number that each makes of the number at removed channels.
UNARY: dict[str, Number] = {
    "Abs": lambda x, n: abs(x),
    "Atan": lambda x, n: math.atan(x),
    "Cast": lambda x, n: x,
    "Ceil": lambda x, n: math.ceil(x),
    "Celu": lambda x, n: x if x == 0 else UNKNOWN,
    "Cos": lambda x, n: math.cos(x),
    "Dropout": lambda x, n: x,
    "Elu": lambda x, n: x if x >= 0 else UNKNOWN,
    "Erf": lambda x, n: math.erf(x),
    "Exp": lambda x, n: math.exp(x),
    "Floor": lambda x, n: math.floor(x),
    "Gelu": lambda x, n: 0.0 if x == 0 else UNKNOWN,
    "HardSigmoid": lambda x, n: min(max(n.attrs.get("alpha", 0.2) * x + n.attrs.get("beta", 0.5), 0.0), 1.0),
    "HardSwish": lambda x, n: x * min(max(x / 6 + 0.5, 0.0), 1.0),
    "Identity": lambda x, n: x,
    "LeakyRelu": lambda x, n: x if x >= 0 else x * n.attrs.get("alpha", 0.01),
    "Log": lambda x, n: math.log(x) if x > 0 else UNKNOWN,
    "Mish": lambda x, n: 0.0 if x == 0 else UNKNOWN,
    "Neg": lambda x, n: -x,
    "Reciprocal": lambda x, n: 1 / x if x else UNKNOWN,
    "Relu": lambda x, n: max(x, 0.0),
    "Round": lambda x, n: float(np.round(x)),
    "Selu": lambda x, n: 0.0 if x == 0 else UNKNOWN,
    "Sigmoid": lambda x, n: _sigmoid(x),
    "Sign": lambda x, n: float(np.sign(x)),
    "Sin": lambda x, n: math.sin(x),
    "Sinh": lambda x, n: math.sinh(x),
    "Softplus": lambda x, n: math.log1p(math.exp(x)) if x < 700 else x,
    "Softsign": lambda x, n: x / (1 + abs(x)),
    "Sqrt": lambda x, n: math.sqrt(x) if x >= 0 else UNKNOWN,
    "Swish": lambda x, n: x * _sigmoid(n.attrs.get("alpha", 1.0) * x),
    "Tan": lambda x, n: math.tan(x),
    "Tanh": lambda x, n: math.tanh(x),
    "ThresholdedRelu": lambda x, n: x if x > n.attrs.get("alpha", 1.0) else 0.0,
}

PARTIAL = frozenset({"Log", "Reciprocal", "Sqrt"})  # they make no finite number of some


def unary(trace: Trace, node: Node) -> None:
    """One tensor in, one of its shape out."""
    x = node.inputs[0]
    labels = trace.of(x)
    if node.op == "Dropout" and len(node.outputs) > 1:
        trace.freeze(x, node, "its mask is read")
        return
    rest = trace.rest(x) if labels is not None else UNKNOWN
    trace.set(node.outputs[0], labels, _made_of(rest, node))


def _made_of(rest: float, node: Node) -> float:
    if math.isnan(rest):
        return WILD if node.op in PARTIAL else UNKNOWN
    try:
        found = float(UNARY[node.op](rest, node))
    except (ArithmeticError, ValueError):
        return WILD
    return WILD if math.isinf(rest) or math.isinf(found) or (math.isnan(found) and node.op in PARTIAL) else found


def clip(trace: Trace, node: Node) -> None:
    """Clip, its limits attributes or inputs."""
    rest = trace.rest(node.inputs[0]) if trace.of(node.inputs[0]) is not None else UNKNOWN
    if math.isinf(rest):
        trace.set(node.outputs[0], trace.of(node.inputs[0]), rest)
        return
    for slot, name, choose in ((1, "min", max), (2, "max", min)):
        limit: float | int | bool | None = node.attrs.get(name)
        tensor = optional_input(node, slot)
        if tensor is not None:
            limit = scalar_value(tensor)
            rest = UNKNOWN if limit is None else rest
        if limit is not None and not math.isnan(rest):
            rest = float(choose(rest, float(limit)))
    trace.set(node.outputs[0], trace.of(node.inputs[0]), rest)


def quantize(trace: Trace, node: Node) -> None:
    """QuantizeLinear and DequantizeLinear: what is 0 stays so, other numbers are rounded."""
    x = node.inputs[0]
    labels = trace.of(x)
    if labels is None:
        return
    parameters = [tensor for tensor in node.inputs[1:] if not tensor.is_empty()]
    if any(not is_constant(tensor) for tensor in parameters) or node.attrs.get("block_size", 0):
        trace.freeze(x, node, "its scales are no constants, or those of blocks")
        return
    axis = int(node.attrs.get("axis", 1)) % len(x.shape)
    for slot, tensor in enumerate(node.inputs[1:], 1):
        if not tensor.is_empty() and math.prod(tensor.shape) > 1:
            if varied(labels) != (axis,):
                trace.freeze(x, node, "has a scale for each place, and its channels are elsewhere")
                return
            trace.bind(node, slot, 0, Line(labels, axis), "other")
    trace.set(node.outputs[0], labels, 0.0 if trace.rest(x) == 0 else blurred(trace.rest(x)))


def _divide(a: float, b: float) -> float:
    return 0.0 if a == 0 and b != 0 else a / b if b else UNKNOWN


def _multiply(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b


def _power(a: float, b: float) -> float:
    return UNKNOWN if math.isnan(a) or math.isnan(b) else float(np.power(np.float64(a), np.float64(b)))


# NaN stands for a number that is finite and not known; 0 times it is 0.
BINARY: dict[str, Callable[[float, float], float]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": _multiply,
    "Div": _divide,
    "Pow": _power,
    "PRelu": lambda a, b: a if a >= 0 else a * b,
    "Max": lambda a, b: UNKNOWN if math.isnan(a + b) else max(a, b),
    "Min": lambda a, b: UNKNOWN if math.isnan(a + b) else min(a, b),
    "Sum": lambda a, b: a + b,
    "Mean": lambda a, b: a + b if a + b == 0 else UNKNOWN,
    "Where": lambda a, b: a if a == b else UNKNOWN,
    **dict.fromkeys(
        ("Mod", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor"),
        lambda a, b: UNKNOWN,
    ),
}
# A constant that they add makes what it is added to: it is zero in removed channels, also where one serves them all.
OFFSETS = frozenset({"Add", "Sub", "Sum"})


def several(trace: Trace, node: Node) -> None:
    """Several operands with broadcasting: channels of all of them go together."""
    rank = len(node.outputs[0].shape)
    labels = _together(trace, node, rank)
    if labels is None:
        return
    rest = _rest_of_all(trace, node)
    for slot, tensor in enumerate(node.inputs):
        if trace.dequantizer(tensor) is not None:
            trace.bind_constant(node, slot, labels, rank, "bias" if node.op in OFFSETS else "other")
        elif is_constant(tensor):
            trace.bind_constant(node, slot, labels, rank, "other")
            if node.op in OFFSETS:
                trace.offsets.append(Offset(node, slot, padded(labels, rank)))
    trace.set(node.outputs[0], labels, rest)


def _rest_of_all(trace: Trace, node: Node) -> float:
    operands = node.inputs[1:] if node.op == "Where" else node.inputs
    rests = [_rest(trace, node, tensor) for tensor in operands]
    if any(map(math.isinf, rests)) or (node.op in ("Div", "Mod") and _may_be_zero(trace, operands[1])):
        return WILD
    rest = rests[0]
    for other in rests[1:]:
        try:
            rest = BINARY[node.op](rest, other)
        except (ArithmeticError, ValueError):
            return WILD
    exponent = rests[-1]
    if node.op == "Pow" and math.isnan(rest) and not (exponent >= 0 and exponent.is_integer()):
        return WILD
    return WILD if math.isinf(rest) else rest


def _may_be_zero(trace: Trace, divisor: Tensor) -> bool:
    """Whether a removed channel may be divided by 0; a divisor of all channels is what it was."""
    if trace.of(divisor) is None:
        return False
    rest = trace.rest(divisor)
    return rest == 0 or math.isnan(rest)


def _rest(trace: Trace, node: Node, tensor: Tensor) -> float:
    if trace.is_weight(tensor):
        return 0.0 if node.op in OFFSETS else trace.rest(tensor)
    return trace.rest(tensor) if trace.of(tensor) is not None else UNKNOWN


def _together(trace: Trace, node: Node, rank: int) -> np.ndarray | None:
    """One labelling for all operands; what cannot be matched is frozen."""
    labelled = [padded(found, rank) for tensor in node.inputs if (found := trace.of(tensor)) is not None]
    if not labelled:
        return None
    axes = sorted({axis for found in labelled for axis in varied(found)})
    result: np.ndarray | None = None
    for found in labelled:
        if result is None:
            result = found
        elif varied(found) == varied(result) and found.shape == result.shape:
            trace.space.unite(result, found)
        else:
            result = _joined(trace, result, found, rank)
    assert result is not None
    for tensor in node.inputs:
        _check_operand(trace, node, tensor, axes, result, rank)
    return result


def _joined(trace: Trace, a: np.ndarray, b: np.ndarray, rank: int) -> np.ndarray:
    """Labels of two operands with channels on different axes."""
    for axis in set(varied(a)) & set(varied(b)):
        trace.space.link(Line(a, axis), Line(b, axis))
    if set(varied(b)) <= set(varied(a)):
        return a
    if set(varied(a)) <= set(varied(b)):
        return b
    sources = {line.axis: line for line in [*lines(b), *lines(a)]}
    axes = sorted(sources)
    made = trace.joint([sources[axis] for axis in axes], axes, rank)
    assert made is not None
    return made


def _check_operand(trace: Trace, node: Node, tensor: Tensor, axes: list[int], result: np.ndarray, rank: int) -> None:
    """An operand that is not constant must have channels on an axis, or size 1 there."""
    if trace.is_weight(tensor):
        return
    own = trace.of(tensor)
    own_axes = () if own is None else varied(padded(own, rank))
    shape = [1] * (rank - len(tensor.shape)) + list(tensor.shape)
    for axis in axes:
        if axis not in own_axes and shape[axis] != 1:
            why = f"{node.op} {node.name!r}: {tensor.name!r} keeps what it has on axis {axis}"
            trace.space.freeze_line(Line(result, axis), why)
