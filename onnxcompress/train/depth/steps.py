"""What lies between two tensors of a graph, read backwards: linear operators, activations, normalizations.

A step has one live input and one live output, which the next step alone reads. An activation may be a cone of
elementwise nodes with scalar constants, so that ``x * 0.5 * (1 + Erf(x / sqrt(2)))`` and ``x * Sigmoid(x)`` are one
step in any spelling.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from onnxcompress.graph import (
    Graph,
    Node,
    Tensor,
    constant_value,
    is_constant,
    is_op,
    optional_input,
    rank,
    scalar_value,
)
from onnxcompress.linear import ConvOp
from onnxcompress.linear.nodes import other_operand, read_affine, read_conv
from onnxcompress.merging.channel_affine import live_operand, why_not_inference
from onnxcompress.patterns.standardization import (
    Fit,
    Standardized,
    choose_last_axes,
    finished,
    fit_channels,
    read_standardized,
)

StepKind = Literal["conv", "matrix", "scale", "activation", "norm", "transpose"]

MAX_STEPS = 64
# Elementwise operators with one live input that are activations by themselves.
SMOOTH = ("Celu", "Elu", "Gelu", "HardSigmoid", "HardSwish", "Mish", "Selu", "Sigmoid", "Softplus", "Swish", "Tanh")
UNARY = (*SMOOTH, "Clip", "LeakyRelu", "PRelu", "Relu", "Softsign", "ThresholdedRelu")
# What a cone may be made of besides.
ARITHMETIC = ("Abs", "Add", "Div", "Erf", "Exp", "Log", "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal", "Sqrt", "Sub")
FOR_PEOPLE = {"Gelu": "GELU", "Relu": "ReLU"}
LARGEST_CONE = 16


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a branch.

    Attributes:
        kind: What it is.
        nodes: In execution order.
        source: Its live input.
        output: Its output.
        what: For people: the activation, the normalization.
        conv: The convolution as it stands.
        axis: Of a normalization, the channel axis: 1 or the last.
        scale: Of a normalization, (C,); None for ones.
        bias: Likewise; None for zeros.
        columns: Of a matrix, the channels that it makes.
    """

    kind: StepKind
    nodes: tuple[Node, ...]
    source: Tensor
    output: Tensor
    what: str = ""
    conv: ConvOp | None = None
    axis: int = 1
    scale: np.ndarray | None = None
    bias: np.ndarray | None = None
    columns: int = 0


@dataclass(frozen=True, eq=False)
class Branch:
    """Steps from ``source`` to ``output`` in execution order, or why reading stopped at ``source``."""

    source: Tensor
    output: Tensor
    steps: tuple[Step, ...]
    stopped: str = field(default="", compare=False)

    @property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(node for step in self.steps for node in step.nodes)

    @property
    def linear(self) -> list[Step]:
        return [step for step in self.steps if step.kind in ("conv", "matrix")]


def read_branch(
    graph: Graph,
    output: Tensor,
    readers: Collection[Node] | None,
    stop: Collection[Tensor] = (),
    *,
    kinds: Collection[StepKind] | None = None,
) -> Branch:
    """The steps that lead to ``output``, as far back as ``stop`` or as they go.

    Args:
        graph: The graph.
        output: Where to begin.
        readers: The nodes that may read it, None for any; every tensor further back only by the step after it.
        stop: Tensors at which to end.
        kinds: Steps to take; all by default.
    """
    steps: list[Step] = []
    tensor, allowed = output, readers
    reason = ""
    while tensor not in stop:
        shared = "" if allowed is None else why_shared(graph, tensor, allowed)
        if shared:
            reason = shared
            break
        step = step_to(graph, tensor)
        if isinstance(step, str):
            reason = step
            break
        if (kinds is not None and step.kind not in kinds) or len(steps) == MAX_STEPS:
            reason = f"{step.nodes[-1].op} {step.nodes[-1].name!r} is no part of it"
            break
        steps.insert(0, step)
        tensor, allowed = step.source, set(step.nodes)
    return Branch(tensor, output, tuple(steps), reason)


def why_shared(graph: Graph, tensor: Tensor, readers: Collection[Node]) -> str:
    """The reason why others than ``readers`` read a tensor; empty where they do not."""
    if graph.is_output(tensor):
        return f"the inner tensor {tensor.name!r} is an output of the model"
    others = [node for node in tensor.outputs if node not in readers]
    return f"the inner tensor {tensor.name!r} is read by {others[0].op} {others[0].name!r} too" if others else ""


def step_to(graph: Graph, tensor: Tensor) -> Step | str:
    """The step that makes ``tensor``, or the reason why there is none."""
    node = graph.producer(tensor)
    if node is None:
        return f"{tensor.name!r} is an input, a constant, or made outside of this graph"
    if is_op(node, "Conv"):
        conv = read_conv(node)
        if isinstance(conv, str):
            return f"Conv {node.name!r}: {conv}"
        return Step("conv", (node,), node.inputs[0], tensor, conv=conv)
    if is_op(node, "MatMul", "Gemm"):
        affine = read_affine(node)
        if isinstance(affine, str):
            return f"{node.op} {node.name!r}: {affine}"
        return Step("matrix", (node,), node.inputs[0], tensor, columns=affine.matrix.shape[1])
    if is_op(node, "Transpose"):
        return Step("transpose", (node,), node.inputs[0], tensor)
    norm = norm_to(graph, tensor, node)
    if norm is not None:
        return norm
    activation = activation_to(graph, tensor, node)
    if isinstance(activation, Step):
        return activation
    if is_op(node, "BatchNormalization"):
        reason = why_not_inference(graph, node)
        if reason or not all(is_constant(t) for t in node.inputs[1:]):
            return f"BatchNormalization {node.name!r}: {reason or 'a statistic is not a constant'}"
        return Step("scale", (node,), node.inputs[0], tensor)
    live = live_operand(node)
    if live is not None and not is_constant(live):
        return Step("scale", (node,), live, tensor)
    return activation


# -- activations -----------------------------------------------------------------------------------------------------


def activation_to(graph: Graph, tensor: Tensor, node: Node) -> Step | str:
    """The activation that makes ``tensor``, or the reason why it is none."""
    if is_op(node, *UNARY):
        if not all(is_constant(t) for t in node.inputs[1:] if not t.is_empty()):
            return f"the numbers of {node.op} {node.name!r} are not constants"
        if any(graph.is_output(t) or t.outputs for t in node.outputs[1:]):
            return f"{node.op} {node.name!r} has a second output"
        return Step("activation", (node,), node.inputs[0], tensor, what=activation_name([node]))
    return _cone(graph, tensor, node)


def _cone(graph: Graph, tensor: Tensor, node: Node) -> Step | str:
    """Elementwise nodes with scalar constants that make ``tensor`` of one other tensor, two or more paths apart."""
    inside = {node}
    top = node
    while len(live := _live(top)) == 1 and is_op(top, "Mul", "Div", "Add", "Sub"):
        # What comes after the paths have met: the last factor of GELU, the 1/6 of HardSwish.
        before = graph.producer(live[0])
        if not _is_elementwise(top) or before is None or not graph.feeds_only(live[0], top) or len(inside) > 2:
            break
        top = before
        inside.add(top)
    if len(set(_live(top))) < 2:
        return f"{node.op} {node.name!r} is neither linear nor an activation"
    position = {other: i for i, other in enumerate(graph.nodes)}
    front = set(_live(top))
    if not _is_elementwise(top):
        return f"{top.op} {top.name!r} is neither linear nor an activation"
    while len(front) > 1:
        last = max(front, key=lambda t: position.get(graph.producer(t), -1))  # type: ignore[arg-type]
        maker = graph.producer(last)
        if maker is None or not _is_elementwise(maker):
            made = "an input" if maker is None else f"{maker.op} {maker.name!r}"
            gate = " (a gate, such as squeeze-and-excitation)" if top.op == "Mul" else ""
            return f"{top.op} {top.name!r} joins two tensors, one made by {made}{gate}"
        inside.add(maker)
        front = (front - {last}) | set(_live(maker))
        if len(inside) > LARGEST_CONE:
            return f"{top.op} {top.name!r} joins two tensors"
    (source,) = front
    nodes = sorted(inside, key=position.__getitem__)
    for inner in nodes:
        for made_tensor in inner.outputs:
            if made_tensor is not tensor and (shared := why_shared(graph, made_tensor, inside)):
                return shared
    return Step("activation", tuple(nodes), source, tensor, what=activation_name(nodes))


def _live(node: Node) -> list[Tensor]:
    return [t for t in node.inputs if not t.is_empty() and not is_constant(t)]


def _is_elementwise(node: Node) -> bool:
    if not is_op(node, *UNARY, *ARITHMETIC):
        return False
    return all(scalar_value(t) is not None for t in node.inputs if is_constant(t))


def activation_name(nodes: Iterable[Node]) -> str:
    """For people: ReLU6, SiLU, GELU, or the operator."""
    ops = [str(node.op) for node in nodes]
    if ops == ["Clip"]:
        return "ReLU6" if clip_bounds(next(iter(nodes))) == (0.0, 6.0) else "clip"
    if len(ops) == 1:
        return FOR_PEOPLE.get(ops[0], ops[0])
    if "Erf" in ops or ("Tanh" in ops and "Pow" in ops):
        return "GELU"
    if "HardSigmoid" in ops or "Clip" in ops:
        return "HardSwish"
    return "Mish" if "Softplus" in ops else "SiLU" if "Sigmoid" in ops else "+".join(ops)


def clip_bounds(node: Node) -> tuple[float | None, float | None]:
    """Lower and upper bound of a Clip, as attributes or as constants."""
    if "min" in node.attrs or "max" in node.attrs or len(node.inputs) == 1:
        return node.attrs.get("min"), node.attrs.get("max")
    low, high = (scalar_value(optional_input(node, i)) for i in (1, 2))
    return None if low is None else float(low), None if high is None else float(high)


# -- normalizations --------------------------------------------------------------------------------------------------


def norm_to(graph: Graph, tensor: Tensor, node: Node) -> Step | str | None:
    """The normalization over channels that makes ``tensor``; None where there is none, a reason where it is another."""
    if is_op(node, "LayerNormalization", "InstanceNormalization", "GroupNormalization"):
        scale, bias = (constant_value(optional_input(node, i)) for i in (1, 2))
        if scale is None or (optional_input(node, 2) is not None and bias is None):
            return f"scale and bias of {node.op} {node.name!r} are not constants"
        if node.op == "LayerNormalization":
            axes = rank(node.inputs[0])
            if axes is None:
                return f"LayerNormalization {node.name!r}: the number of axes is not known"
            if int(node.attrs.get("axis", -1)) not in (-1, axes - 1):
                return f"LayerNormalization {node.name!r} normalizes several axes"
            return Step("norm", (node,), node.inputs[0], tensor, node.op, axis=axes - 1, scale=scale, bias=bias)
        channels = node.inputs[0].shape[1] if rank(node.inputs[0]) else None
        if not isinstance(channels, int) or scale.size != channels:
            return f"{node.op} {node.name!r} has {scale.size} scales, not one for each channel"
        return Step("norm", (node,), node.inputs[0], tensor, node.op, scale=scale, bias=bias)
    group = group_norm_to(graph, tensor, node)
    if group is not None:
        return group
    candidate: Node | None = node
    for _ in range(3):
        if candidate is None or not is_op(candidate, "Mul", "Div", "Add"):
            return None
        found = read_standardized(graph, candidate, centred=True, choose_fit=_fit_channels)
        if isinstance(found, Standardized):
            return _standardized_step(found, tensor) if found.output is tensor else None
        operands = other_operand(candidate)
        candidate = None if operands is None else graph.producer(operands[0])
    return None


def group_norm_to(graph: Graph, tensor: Tensor, last: Node) -> Step | None:
    """A GroupNormalization in parts: Reshape to groups, InstanceNormalization, Reshape back, scale, shift."""
    nodes: list[Node] = []
    numbers: dict[str, np.ndarray | None] = {"Add": None, "Mul": None}
    back: Node | None = last
    for op in numbers:
        operands = other_operand(back) if back is not None and is_op(back, op) else None
        if back is not None and operands is not None:
            numbers[op] = constant_value(operands[1])
            nodes.insert(0, back)
            back = graph.producer(operands[0])
    norm = graph.producer(back.inputs[0]) if back is not None and is_op(back, "Reshape") else None
    there = graph.producer(norm.inputs[0]) if norm is not None and is_op(norm, "InstanceNormalization") else None
    if back is None or norm is None or there is None or not is_op(there, "Reshape"):
        return None
    source: Tensor = there.inputs[0]
    channels = source.shape[1] if rank(source) else None
    plain = [constant_value(t) for t in norm.inputs[1:]]  # ones and zeros, one of each for a group
    if any(v is None or (v != 1 - i).any() for i, v in enumerate(plain)) or not isinstance(channels, int):
        return None
    shape = (channels, *(1,) * (len(source.shape) - 2))
    fits = all(v is None or (v.size == channels and v.shape[-len(shape) :] == shape) for v in numbers.values())
    if tensor.shape is None or len(tensor.shape) != len(source.shape) or tensor.shape[1] != channels or not fits:
        return None
    sizes = graph.producer(back.inputs[1])  # Shape(source), where a size is dynamic
    if sizes is not None and not (is_op(sizes, "Shape") and sizes.inputs[0] is source):
        return None
    nodes = [*([] if sizes is None else [sizes]), there, norm, back, *nodes]
    if any(why_shared(graph, t, nodes) for node in nodes for t in node.outputs if t is not tensor):
        return None
    scale, bias = (None if v is None else v.reshape(-1) for v in (numbers["Mul"], numbers["Add"]))
    return Step("norm", tuple(nodes), source, tensor, "GroupNormalization", scale=scale, bias=bias)


def _fit_channels(source: Tensor, axes: tuple[int, ...]) -> Fit | str | None:
    axis_count = rank(source)
    if axis_count is None or len(axes) != 1:
        return None
    if axes[0] == axis_count - 1:
        return choose_last_axes(source, axes)
    channels = source.shape[1]
    return fit_channels(source, channels) if axes[0] == 1 and isinstance(channels, int) else None


def _standardized_step(found: Standardized, tensor: Tensor) -> Step | None:
    channels = found.source.shape[found.axes[0]]
    if not isinstance(channels, int):
        return None
    whole = finished(found, [channels])
    if isinstance(whole, str) or whole.scale is None:
        return None
    scale = whole.scale.reshape(-1)
    bias = None if whole.shift is None else whole.shift.reshape(-1)
    nodes = tuple(dict.fromkeys(whole.nodes))
    return Step("norm", nodes, found.source, tensor, "LayerNormalization", axis=found.axes[0], scale=scale, bias=bias)
