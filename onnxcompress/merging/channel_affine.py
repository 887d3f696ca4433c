"""Nodes that are y = scale * x + shift with one constant pair per channel: BatchNormalization, Mul, Div, Add, Sub, Neg.

A run of such nodes is read as one ``ChannelAffine`` in float64, from which folding passes make weights and biases.
Reading returns None where a node is no such thing, and a reason where it looks like one and is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcompress.cost import OperatorSpec
from onnxcompress.graph import (
    Constant,
    Graph,
    Node,
    Tensor,
    constant_value,
    is_constant,
    is_op,
    rank,
    scalar_value,
    static_shape,
)
from onnxcompress.linear import batchnorm_affine
from onnxcompress.linear.nodes import FLOATS, channel_vector, other_operand

ELEMENTWISE = ("Mul", "Div", "Add", "Sub", "Neg")
AFFINE_OPS = ("BatchNormalization", *ELEMENTWISE)


@dataclass(frozen=True, eq=False)
class ChannelAffine:
    """A run of nodes, each the only reader of the one before: output = scale * source + shift.

    Attributes:
        nodes: In order of execution.
        source: What the first node reads.
        output: What the last node makes.
        scale: (C,) float64.
        shift: (C,) float64.
    """

    nodes: tuple[Node, ...]
    source: Tensor
    output: Tensor
    scale: np.ndarray
    shift: np.ndarray

    def then(self, after: ChannelAffine) -> ChannelAffine:
        """This run and the one that reads its output, as one."""
        shift = self.shift * after.scale + after.shift
        return ChannelAffine(self.nodes + after.nodes, self.source, after.output, self.scale * after.scale, shift)


def why_not_inference(graph: Graph, node: Node) -> str | None:
    """The reason why a BatchNormalization is not a fixed affine map per channel, or None when it is."""
    # Before opset 14 there is no training_mode: to ask for the batch statistics is to train.
    if node.attrs.get("training_mode", 0) or (graph.opset < 14 and any(not t.is_empty() for t in node.outputs[1:])):
        return "BatchNormalization is in training mode"
    if graph.opset < 9 and not node.attrs.get("spatial", 1):
        return "BatchNormalization normalizes each position on its own (spatial=0)"
    if any(tensor.outputs or graph.is_output(tensor) for tensor in node.outputs[1:]):
        return "running statistics of BatchNormalization are read"
    return None


def read_batchnorm(graph: Graph, node: Node) -> ChannelAffine | str:
    """An inference-mode BatchNormalization, or the reason why its numbers are not known or not fixed."""
    reason = why_not_inference(graph, node)
    if reason is not None:
        return reason
    statistics = [constant_value(tensor) for tensor in node.inputs[1:5]]
    known = [values for values in statistics if values is not None]
    if len(known) != 4:
        return "a weight or a statistic of BatchNormalization is not a constant"
    try:
        scale, shift = batchnorm_affine(known[0], known[1], known[2], known[3], float(node.attrs.get("epsilon", 1e-5)))
    except ValueError as error:
        return str(error)
    return _finite(ChannelAffine((node,), node.inputs[0], node.outputs[0], scale, shift))


def live_operand(node: Node) -> Tensor | None:
    """What an affine node transforms, judged by its form alone: one operand is a constant; None for other nodes."""
    if is_op(node, "BatchNormalization", "Neg"):
        return node.inputs[0]
    operands = other_operand(node) if is_op(node, *ELEMENTWISE) else None
    if operands is None or (node.op == "Div" and operands[0] is not node.inputs[0]):
        return None  # c / x is not linear
    return operands[0]


def read_affine_node(
    graph: Graph, node: Node, channels: int, tensor_rank: int | None, axis: int = 1
) -> ChannelAffine | str | None:
    """One node as an affine map of ``channels`` channels along ``axis`` of its output.

    Args:
        graph: The graph of the node.
        node: Any node.
        channels: Number of channels.
        tensor_rank: Rank of the tensor that the node transforms; None when it is not known.
        axis: The channel axis, counted from the front.

    Returns:
        None when the node is another thing (also for a BatchNormalization along another axis), or a reason.
    """
    if is_op(node, "BatchNormalization"):
        if axis != 1:
            return None
        found = read_batchnorm(graph, node)
        if isinstance(found, ChannelAffine) and len(found.scale) != channels:
            return f"BatchNormalization has {len(found.scale)} channels, not {channels}"
        return found
    if not is_op(node, *ELEMENTWISE):
        return None
    ones, zeros = np.ones(channels), np.zeros(channels)
    if node.op == "Neg":
        return ChannelAffine((node,), node.inputs[0], node.outputs[0], -ones, zeros)
    live = live_operand(node)
    if live is None:
        return None
    if ends_gelu(graph, node):
        return "it is the end of a GELU, for which the runtime has one kernel"
    if (tensor_rank is None or axis == tensor_rank - 1) and ends_layer_norm(graph, node):
        return "it is the end of a LayerNormalization, for which the runtime has one kernel"
    constant = node.inputs[1] if live is node.inputs[0] else node.inputs[0]
    if np.dtype(constant.dtype).name not in FLOATS:
        return f"the constant is {constant.dtype}, not floating point"
    values = channel_vector(constant, channels, tensor_rank, axis)
    if isinstance(values, str):
        return values
    numbers = values.astype(np.float64)
    if node.op == "Mul":
        scale, shift = numbers, zeros
    elif node.op == "Div":
        if not numbers.all():
            return "the constant divides by zero"
        scale, shift = 1 / numbers, zeros
    elif node.op == "Add":
        scale, shift = ones, numbers
    else:
        scale, shift = (ones, -numbers) if live is node.inputs[0] else (-ones, numbers)
    return why_not_shift(shift, constant.dtype) or _finite(ChannelAffine((node,), live, node.outputs[0], scale, shift))


def _finite(affine: ChannelAffine) -> ChannelAffine | str:
    if np.isfinite(affine.scale).all() and np.isfinite(affine.shift).all():
        return affine
    return "a scale or a shift is not finite"


def extend_forward(graph: Graph, affine: ChannelAffine, tensor_rank: int | None, axis: int = 1) -> ChannelAffine:
    """The run continued for as long as the only reader is another affine map per channel."""
    while True:
        reader = graph.only_reader(affine.output)
        step = None if reader is None else read_affine_node(graph, reader, len(affine.scale), tensor_rank, axis)
        if not isinstance(step, ChannelAffine):
            return affine
        affine = affine.then(step)


def extend_backward(graph: Graph, affine: ChannelAffine, tensor_rank: int | None, axis: int = 1) -> ChannelAffine:
    """The run continued towards the input for as long as its source is made by such a node and read by it alone."""
    while True:
        maker = graph.producer(affine.source)
        if maker is None or not graph.feeds_only(affine.source, affine.nodes[0]):
            return affine
        step = read_affine_node(graph, maker, len(affine.scale), tensor_rank, axis)
        if not isinstance(step, ChannelAffine) or why_not_same_shape(step, tensor_rank, axis) is not None:
            return affine
        affine = step.then(affine)


def why_not_same_shape(affine: ChannelAffine, tensor_rank: int | None, axis: int) -> str | None:
    """The reason why the first node of a run may give its source another shape (a broadcast), or None."""
    node = affine.nodes[0]
    if node.op in ("BatchNormalization", "Neg"):
        return None
    constant = next(tensor for tensor in node.inputs if is_constant(tensor))
    shape = static_shape(constant)
    assert shape is not None
    if math.prod(shape) == 1 and len(shape) <= 1:
        return None
    if tensor_rank is None or rank(affine.source) != tensor_rank:
        return "the rank of what the constant is applied to is not known, or smaller"
    if math.prod(shape) > 1 and affine.source.shape[axis] != len(affine.scale):
        return "the constant may broadcast the channel axis"
    return None


# -- what belongs elsewhere ------------------------------------------------------------------------------------------


def ends_gelu(graph: Graph, node: Node) -> bool:
    """Whether ``node`` is the Mul by 0.5 that ends x * (1 + erf(x / sqrt(2))) * 0.5, or the form with tanh.

    onnxruntime makes one kernel of the whole; where a neighbour takes the 0.5 in, it does not, and all the rest is run
    node by node.
    """
    product = graph.producer(live_operand(node)) if is_op(node, "Mul") else None
    if product is None or not is_op(product, "Mul") or all(scalar_value(tensor) != 0.5 for tensor in node.inputs):
        return False
    sums = [maker for tensor in product.inputs if (maker := graph.producer(tensor)) is not None and is_op(maker, "Add")]
    return any(is_op(graph.producer(tensor), "Erf", "Tanh") for maker in sums for tensor in maker.inputs)


def ends_layer_norm(graph: Graph, node: Node) -> bool:
    """Whether ``node`` is the Mul or the Add after (x - mean) / sqrt(variance), which is fused as a GELU is."""
    source = graph.producer(live_operand(node))
    if is_op(node, "Add") and source is not None and is_op(source, "Mul"):
        node, source = source, graph.producer(live_operand(source))
    if source is None or not is_op(node, "Mul") or not is_op(source, "Div"):
        return False
    return is_op(graph.producer(source.inputs[1]), "Sqrt")


# -- whether the numbers bear it -------------------------------------------------------------------------------------


def why_not_shift(shift: np.ndarray, dtype: np.dtype) -> str | None:
    """The reason why the constant of an Add should not move into another sum, or None.

    Adding a large constant rounds its partner, and ``x + c - c`` is how rounding is written: the sum in another order
    does not round. Up to 2^12 in float32 a sum keeps half of its digits, whatever is taken away again.
    """
    limit = 2.0 ** ((np.finfo(dtype).nmant + 1) // 2)
    largest = float(np.abs(shift).max(initial=0.0))
    if largest > limit:
        return (
            f"a constant of {largest:.4g} rounds what it is added to in {dtype} (above {limit:.4g}); it may be meant to"
        )
    return None


DEAD = 1e-12  # of the largest weight: channels that training has switched off, in files down to 1e-38


def why_not_scale(peaks: np.ndarray, scale: np.ndarray, dtype: np.dtype) -> str | None:
    """The reason why scaled weights would lose precision, or None. Dead channels have none to lose.

    Args:
        peaks: Largest magnitude of the weights that each factor meets, in the order of ``scale``.
        scale: Factors.
        dtype: Element type of the weights.
    """
    tiny = float(np.finfo(dtype).tiny)
    alive = peaks >= max(tiny, DEAD * float(peaks.max(initial=0)))
    scaled = np.abs(peaks.astype(np.float64) * scale)[alive]
    if ((scaled > 0) & (scaled < tiny)).any():
        smallest = float(scaled[scaled > 0].min())
        return f"a scaled weight of {smallest:.3g} is below the normal range of {dtype} ({tiny:.3g})"
    return None


def why_not_copy(tensor: Tensor, replaced: Iterable[Node], limit_bytes: int) -> str | None:
    """The reason why giving ``replaced`` their own copy of a shared initializer costs too much, or None."""
    changed = set(replaced)
    if not isinstance(tensor, Constant) or all(reader in changed for reader in tensor.outputs):
        return None
    if tensor.nbytes > limit_bytes:
        return f"the weight is shared: a copy takes {tensor.nbytes} bytes, allowed are {limit_bytes}"
    return None


# -- writing ---------------------------------------------------------------------------------------------------------


def compact(values: np.ndarray, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Values per channel in ``shape``, or as a scalar when they are all the same."""
    rounded = values.astype(dtype)
    return np.asarray(rounded[0]) if (rounded == rounded[0]).all() else rounded.reshape(shape)


def elementwise_specs(affine: ChannelAffine, shape: Sequence[int], axis: int = 1) -> list[OperatorSpec]:
    """What the nodes of a run cost on a tensor of this shape; a BatchNormalization counts as a Mul."""
    weight = (len(affine.scale), *(1,) * (len(shape) - axis - 1))
    dtype = np.dtype(affine.output.dtype).name if affine.output.dtype is not None else "float32"
    return [OperatorSpec("Mul", tuple(shape), (weight,), dtype=dtype) for _ in affine.nodes]
