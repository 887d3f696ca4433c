"""What scalar arithmetic computes: polynomials and products of tensors, whatever the order in which a file writes them.

``x * 0.5 * (1 + e)``, ``(x + x * e) / 2`` and ``0.5 * (e * x) + x / 2`` are the same polynomial in x and e. A pattern
compares coefficients; it does not list the ways to write them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcompress.graph import Graph, Node, Tensor, is_constant, is_op, numpy_dtype, rank, scalar_value
from onnxcompress.linear.nodes import FLOATS
from onnxcompress.patterns.cones import upstream

ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Neg", "Pow")
MAX_DEGREE = 4
MAX_DEPTH = 8

# A constant and a coefficient that comes of a few of them are correct to this many units in the last place.
UNITS = 4

Powers = tuple[int, ...]


@dataclass(frozen=True)
class Polynomial:
    """Coefficients, not 0, by the powers of the variables, and the nodes that compute the sum."""

    coefficients: Mapping[Powers, float]
    nodes: tuple[Node, ...]

    def is_close(self, wanted: Mapping[Powers, float], dtype: np.dtype) -> bool:
        """Whether the coefficients are ``wanted`` as far as constants of ``dtype`` can say."""
        return self.coefficients.keys() == wanted.keys() and all(
            is_close(self.coefficients[powers], value, dtype) for powers, value in wanted.items()
        )

    def written(self, *names: str) -> str:
        """For people: "0.5 x + 0.5 x e" with the variables named x and e."""
        terms = []
        for powers, value in sorted(self.coefficients.items(), key=lambda term: (sum(term[0]), term[0])):
            parts = [f"{value:.7g}"]
            for name, power in zip(names, powers, strict=True):
                parts += [] if power == 0 else [name] if power == 1 else [f"{name}^{power}"]
            terms.append(" ".join(parts))
        return " + ".join(terms) or "0"


def is_close(value: float, wanted: float, dtype: np.dtype) -> bool:
    """Whether a number that comes of constants of ``dtype`` is ``wanted`` up to their rounding."""
    return abs(value - wanted) <= UNITS * float(np.finfo(dtype).eps) * abs(wanted)


def float_dtype(tensor: Tensor | None) -> np.dtype | None:
    """float16, float32 or float64 when the tensor is of that type; None for all others."""
    dtype = numpy_dtype(tensor)
    return dtype if dtype is not None and dtype.name in FLOATS else None


def scalar_beside(constant: Tensor, other: Tensor) -> float | None:
    """The value of a constant that leaves the shape of ``other`` as it is in a broadcast; None when it may not."""
    if not is_constant(constant):
        return None
    axes, other_axes = rank(constant) or 0, rank(other)
    if axes > 0 and (other_axes is None or axes > other_axes):
        return None
    value = scalar_value(constant)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def read_polynomial(graph: Graph, tensor: Tensor, variables: Sequence[Tensor]) -> Polynomial | None:
    """``tensor`` as a polynomial in ``variables`` with constant scalar coefficients; None when it is none.

    Variables of different shapes are not meant: the shape of the result is taken to be theirs.
    """
    nodes: dict[Node, None] = {}
    coefficients = _polynomial(graph, tensor, variables, nodes, MAX_DEPTH)
    if coefficients is None:
        return None
    return Polynomial({powers: value for powers, value in coefficients.items() if value != 0}, tuple(nodes))


def _polynomial(
    graph: Graph, tensor: Tensor, variables: Sequence[Tensor], nodes: dict[Node, None], depth: int
) -> dict[Powers, float] | None:
    for i, variable in enumerate(variables):
        if tensor is variable:
            return {tuple(int(i == j) for j in range(len(variables))): 1.0}
    node = graph.producer(tensor)
    if node is None or depth == 0 or not is_op(node, *ARITHMETIC):
        return None
    constant = (0,) * len(variables)
    terms: list[dict[Powers, float]] = []
    for i, operand in enumerate(node.inputs):
        if is_constant(operand):
            value = scalar_beside(operand, node.inputs[1 - i])
            found = None if value is None else {constant: value}
        else:
            found = _polynomial(graph, operand, variables, nodes, depth - 1)
        if found is None:
            return None
        terms.append(found)
    nodes[node] = None
    return _combine(node.op, terms, constant)


def _combine(op: str, terms: list[dict[Powers, float]], constant: Powers) -> dict[Powers, float] | None:
    first, second = terms[0], terms[-1]
    if op == "Neg":
        return {powers: -value for powers, value in first.items()}
    if op in ("Add", "Sub"):
        sign = 1.0 if op == "Add" else -1.0
        total = dict(first)
        for powers, value in second.items():
            total[powers] = total.get(powers, 0.0) + sign * value
        return total
    if op == "Mul":
        return _product(first, second)
    if second.keys() != {constant}:
        return None
    value = second[constant]
    if op == "Div":
        return None if value == 0 else {powers: number / value for powers, number in first.items()}
    if value not in range(1, MAX_DEGREE + 1):  # Pow
        return None
    power: dict[Powers, float] | None = {constant: 1.0}
    for _ in range(int(value)):
        power = None if power is None else _product(power, first)
    return power


def _product(a: dict[Powers, float], b: dict[Powers, float]) -> dict[Powers, float] | None:
    total: dict[Powers, float] = {}
    for p, value in a.items():
        for q, factor in b.items():
            powers = tuple(i + j for i, j in zip(p, q, strict=True))
            if sum(powers) > MAX_DEGREE:
                return None
            total[powers] = total.get(powers, 0.0) + value * factor
    return total


def arguments(graph: Graph, tensor: Tensor) -> list[Tensor]:
    """Tensors of which ``tensor`` may be a polynomial, nearest first; the first is ``tensor`` itself."""
    return upstream(graph, tensor, ARITHMETIC, 5)


def is_scaled_later(tensor: Tensor) -> bool:
    """Whether ``tensor`` is multiplied or divided by a scalar: a pattern may end there."""
    return any(
        scalar_beside(other, tensor) is not None
        for reader in tensor.outputs
        if is_op(reader, "Mul", "Div")
        for other in reader.inputs
    )


# -- products with fractional powers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """coefficient * product of tensors to powers, and the nodes that compute it."""

    coefficient: float
    powers: Mapping[Tensor, float]
    nodes: tuple[Node, ...]


def read_product(graph: Graph, tensor: Tensor, leaves: Sequence[Tensor]) -> Product | None:
    """``tensor`` as a product of ``leaves`` and of constants through Mul, Div, Neg, Reciprocal, Sqrt and Pow.

    Returns:
        None when another tensor has a part in it, or one leaf has powers that must not be added up (x / x is not 1).
        A constant that is no scalar is a leaf of its own.
    """
    powers: dict[Tensor, float] = {}
    nodes: dict[Node, None] = {}
    coefficient = 1.0
    stack = [(tensor, 1.0)]
    while stack:
        part, power = stack.pop()
        node = graph.producer(part)
        if any(part is leaf for leaf in leaves) or is_constant(part):
            if part in powers and (powers[part] < 0 or power < 0 or power % 1 or powers[part] % 1):
                return None
            powers[part] = powers.get(part, 0.0) + power
            continue
        split = None if node is None or len(nodes) >= MAX_DEPTH else _factors(node)
        # The inside of a root is no product: sqrt(a * b) is not sqrt(a) * sqrt(b) for negative numbers.
        if node is None or split is None or power % 1:
            return None
        nodes[node] = None
        factor, parts = split
        coefficient *= math.pow(factor, power)
        stack += [(t, p * power) for t, p in parts]
    return Product(coefficient, powers, tuple(nodes))


def _factors(node: Node) -> tuple[float, list[tuple[Tensor, float]]] | None:
    """A node as a factor and tensors with their powers."""
    if is_op(node, "Neg"):
        return -1.0, [(node.inputs[0], 1.0)]
    if is_op(node, "Reciprocal"):
        return 1.0, [(node.inputs[0], -1.0)]
    if is_op(node, "Sqrt"):
        return 1.0, [(node.inputs[0], 0.5)]
    if not is_op(node, "Mul", "Div", "Pow"):
        return None
    a, b = node.inputs
    if node.op == "Pow":
        exponent = scalar_beside(b, a)
        return (1.0, [(a, exponent)]) if exponent in (-1, -0.5, 0.5, 1, 2) else None
    sign = 1.0 if node.op == "Mul" else -1.0
    left, right = scalar_beside(a, b), scalar_beside(b, a)
    if left is not None:
        return (left, [(b, sign)]) if left else None
    if right is not None:
        return (right**sign, [(a, 1.0)]) if right else None
    return 1.0, [(a, 1.0), (b, sign)]
