"""Sums of exponentials over the last axis, as decomposed Softmax and LogSoftmax have them."""

from __future__ import annotations

from dataclasses import dataclass

from onnxcompress.graph import Graph, Node, Tensor, is_op, rank
from onnxcompress.patterns.reductions import reduces_last_axis


@dataclass(frozen=True)
class ExponentialSum:
    """ReduceSum(Exp(shifted)) with the last axis kept.

    Attributes:
        shifted: What the exponential is taken of.
        source: ``shifted`` before its maximum was subtracted; ``shifted`` itself where none was.
        largest: The maximum, or None.
        exponentials: Exp(shifted).
        nodes: Sum and exponential.
        shift_nodes: The subtraction and the maximum.
    """

    shifted: Tensor
    source: Tensor
    largest: Tensor | None
    exponentials: Tensor
    nodes: tuple[Node, ...]
    shift_nodes: tuple[Node, ...]


def read_exponential_sum(graph: Graph, tensor: Tensor) -> ExponentialSum | str | None:
    """``tensor`` as a sum of exponentials; None when it is none, a reason when the axis is another."""
    total = graph.producer(tensor)
    if total is None or not is_op(total, "ReduceSum"):
        return None
    exponential = graph.producer(total.inputs[0])
    if exponential is None or not is_op(exponential, "Exp"):
        return None
    if not reduces_last_axis(total):
        return "the sum does not go over the last axis alone, or drops it"
    shifted = exponential.inputs[0]
    nodes = (total, exponential)
    sub = graph.producer(shifted)
    peak = graph.producer(sub.inputs[1]) if sub is not None and is_op(sub, "Sub") else None
    if sub is None or peak is None or not is_op(peak, "ReduceMax") or peak.inputs[0] is not sub.inputs[0]:
        return ExponentialSum(shifted, shifted, None, total.inputs[0], nodes, ())
    if not reduces_last_axis(peak):
        return ExponentialSum(shifted, shifted, None, total.inputs[0], nodes, ())
    return ExponentialSum(shifted, sub.inputs[0], sub.inputs[1], total.inputs[0], nodes, (sub, peak))


def last_axis(graph: Graph, tensor: Tensor) -> int | None:
    """The last axis as Softmax takes it in the model's opset; None when it cannot be said."""
    axes = rank(tensor)
    return -1 if graph.opset >= 11 else None if axes is None else axes - 1
