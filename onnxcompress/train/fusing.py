"""Several nodes as one call of torch: same numbers up to rounding, fewer passes over memory, less kept for gradients.

    MatMul, Add                                                   linear
    Erf((x / sqrt 2)), + 1, * x, * 0.5  in any order              gelu
    x * Sigmoid(x)                                                silu
    (x - mean) / sqrt(mean((x - mean)^2) + epsilon)               layer_norm without scale and bias

Exporters write these out; torch's own modules do not, and a training step of the twin is to take no longer than theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.nn import functional

from onnxcompress.graph import Graph, Node, is_op
from onnxcompress.graph import Tensor as GraphTensor
from onnxcompress.train.ops.call import Function

_CLOSE = 1e-6  # a constant of float32


@dataclass(frozen=True)
class Fusion:
    """One call in the place of nodes.

    Args:
        end: The node whose output the call makes.
        inner: The other nodes, whose outputs nothing else needs.
        inputs: What the call reads.
        function: The call.
    """

    end: Node
    inner: tuple[Node, ...]
    inputs: tuple[GraphTensor, ...]
    function: Function


@dataclass(frozen=True)
class Facts:
    """What a search may ask of a plan in the making.

    Args:
        graph: Whose nodes are searched.
        number: A tensor's value where it is known and has one element.
        shape: Of a weight, where it is held or known.
        private: Whether nothing but nodes of the graph read a tensor: it is not asked for, fed or edited.
    """

    graph: Graph
    number: Callable[[GraphTensor], float | None]
    shape: Callable[[GraphTensor], tuple[int, ...] | None]
    private: Callable[[GraphTensor], bool]


def find_fusions(nodes: Sequence[Node], facts: Facts) -> Iterator[Fusion]:
    """Fusions among ``nodes``, none of which shares a node with another."""
    taken: set[Node] = set()
    for node in nodes:
        for search in _SEARCHES.get(str(node.op), ()):
            found = search(node, facts) if is_op(node, str(node.op)) else None
            if found is None or taken.intersection((found.end, *found.inner)) or not _is_closed(found, facts):
                continue
            taken.update((found.end, *found.inner))
            yield found
            break


def _is_closed(found: Fusion, facts: Facts) -> bool:
    """Whether what the inner nodes make is read inside alone."""
    inside = {found.end, *found.inner}
    return all(
        facts.private(tensor) and all(reader in inside for reader in tensor.outputs)
        for node in found.inner
        for tensor in node.outputs
    )


def _operands(node: Node, facts: Facts, value: float | None = None) -> Iterator[tuple[GraphTensor, GraphTensor]]:
    """Both inputs of a commutative node in both orders; with ``value``, those whose second is that number."""
    a, b = node.inputs
    for first, second in ((a, b), (b, a)):
        if value is None or _is(facts.number(second), value):
            yield first, second


def _is(number: float | None, value: float) -> bool:
    return number is not None and abs(number - value) <= _CLOSE * max(1.0, abs(value))


def _made_by(tensor: GraphTensor, facts: Facts, op: str) -> Node | None:
    node = facts.graph.producer(tensor)
    return node if node is not None and is_op(node, op) else None


def _find_linear(node: Node, facts: Facts) -> Fusion | None:
    for product, bias in _operands(node, facts):
        matmul, vector = _made_by(product, facts, "MatMul"), facts.shape(bias)
        matrix = None if matmul is None else facts.shape(matmul.inputs[1])
        if matmul is not None and matrix is not None and len(matrix) == 2 and vector == matrix[1:]:
            return Fusion(node, (matmul,), (*matmul.inputs, bias), _linear)
    return None


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.linear(x, weight.t(), bias)


def _find_silu(node: Node, facts: Facts) -> Fusion | None:
    for x, gate in _operands(node, facts):
        sigmoid = _made_by(gate, facts, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is x:
            return Fusion(node, (sigmoid,), (x,), functional.silu)
    return None


def _find_gelu(node: Node, facts: Facts) -> Fusion | None:
    """0.5, x and 1 + erf are multiplied in any order; ``node`` is the last of the two products."""
    for left, right in _operands(node, facts):
        product = _made_by(left, facts, "Mul")
        if product is None:
            continue
        for a, b in _operands(product, facts):
            for half, x, one_more in ((right, a, b), (a, right, b), (a, b, right)):
                inner = _gelu_inside(x, half, one_more, facts)
                if inner is not None:
                    return Fusion(node, (product, *inner), (x,), functional.gelu)
    return None


def _gelu_inside(x: GraphTensor, half: GraphTensor, one_more: GraphTensor, facts: Facts) -> tuple[Node, ...] | None:
    """The nodes from x to 1 + erf(x / sqrt 2)."""
    add = _made_by(one_more, facts, "Add")
    if add is None or not _is(facts.number(half), 0.5):
        return None
    for curve, _ in _operands(add, facts, 1.0):
        erf = _made_by(curve, facts, "Erf")
        scaled = None if erf is None else facts.graph.producer(erf.inputs[0])
        if erf is None or scaled is None:
            continue
        divided = is_op(scaled, "Div") and scaled.inputs[0] is x and _is(facts.number(scaled.inputs[1]), math.sqrt(2))
        if divided or (is_op(scaled, "Mul") and any(a is x for a, _ in _operands(scaled, facts, math.sqrt(0.5)))):
            return add, erf, scaled
    return None


def _find_layer_norm(node: Node, facts: Facts) -> Fusion | None:
    centre, root = _made_by(node.inputs[0], facts, "Sub"), _made_by(node.inputs[1], facts, "Sqrt")
    add = None if root is None else _made_by(root.inputs[0], facts, "Add")
    if centre is None or root is None or add is None:
        return None
    x, centred = centre.inputs[0], centre.outputs[0]
    mean = _made_by(centre.inputs[1], facts, "ReduceMean")
    if mean is None or mean.inputs[0] is not x or not _is_over_last_axis(mean, facts):
        return None
    for squares, constant in _operands(add, facts):
        epsilon, variance = facts.number(constant), _made_by(squares, facts, "ReduceMean")
        if epsilon is None or variance is None or not _is_over_last_axis(variance, facts):
            continue
        square = facts.graph.producer(variance.inputs[0])
        if square is None or square.inputs[0] is not centred:
            continue
        is_power = is_op(square, "Pow") and _is(facts.number(square.inputs[1]), 2.0)
        if is_power or (is_op(square, "Mul") and square.inputs[1] is centred):
            inner = (centre, root, add, mean, variance, square)
            return Fusion(node, inner, (x,), partial(_standardize, epsilon=epsilon))
    return None


def _standardize(x: Tensor, *, epsilon: float) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=epsilon)


def _is_over_last_axis(node: Node, facts: Facts) -> bool:
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1:
        only = facts.number(node.inputs[1])
        axes = None if only is None else [int(only)]
    return axes is not None and list(axes) == [-1] and node.attrs.get("keepdims", 1) == 1


_SEARCHES: dict[str, tuple[Callable[[Node, Facts], Fusion | None], ...]] = {
    "Add": (_find_linear,),
    "Mul": (_find_gelu, _find_silu),
    "Div": (_find_layer_norm,),
}
