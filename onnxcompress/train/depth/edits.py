"""Edits of which supernets and pruned graphs are made: mixes, BatchNormalization, masks, padding, activations.

Every new tensor is named after its block, so that the initializers of a supernet and of a pruned graph made from the
same original have the same names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcompress.errors import RecipeError
from onnxcompress.graph import Graph, Node, Tensor, is_constant, numpy_dtype, rank
from onnxcompress.linear import ConvOp
from onnxcompress.linear.nodes import spatial_sizes
from onnxcompress.train.depth.kinds import Flow, rings
from onnxcompress.train.depth.steps import Branch, Step

EPSILON = 1e-5
MOMENTUM = 0.9


@dataclass(frozen=True, eq=False)
class Mixer:
    """The two weights of a mix: ``base`` (1 - l) for what the block computes, ``pruned`` (l) for what replaces it."""

    base: Tensor
    pruned: Tensor

    def mix(self, graph: Graph, base: Tensor, pruned: Tensor, *, before: Node, name: str) -> Tensor:
        """(1 - l) * base + l * pruned."""
        one = graph.insert("Mul", [base, self.base], before=before, name=f"{name}.base").outputs[0]
        other = graph.insert("Mul", [pruned, self.pruned], before=before, name=f"{name}.pruned").outputs[0]
        mixed: Tensor = graph.insert("Add", [one, other], before=before, name=f"{name}.mix").outputs[0]
        for tensor in (one, other, mixed):
            tensor.dtype, tensor.shape = base.dtype, base.shape
        return mixed


def new_mixer(graph: Graph, block: str, like: Tensor) -> Mixer:
    """Lambda as an initializer of the element type of the block, 0 at first, and 1 - lambda."""
    dtype = float_type(like)
    first = graph.nodes[0]
    pruned = graph.new_constant(f"{block}.lambda", np.zeros((), dtype))
    one = graph.new_constant(f"{block}.one", np.ones((), dtype))
    base = graph.insert("Sub", [one, pruned], before=first, name=f"{block}.base").outputs[0]
    base.dtype, base.shape = dtype, []
    return Mixer(base, pruned)


def float_type(tensor: Tensor) -> np.dtype:
    """Element type of a tensor, float32 where it is not known."""
    dtype = numpy_dtype(tensor)
    return np.dtype(np.float32) if dtype is None else dtype


def rewire(readers: Iterable[Node], old: Tensor, new: Tensor) -> None:
    """Let these nodes read ``new`` in place of ``old``."""
    for reader in dict.fromkeys(readers):
        reader.inputs = [new if tensor is old else tensor for tensor in reader.inputs]


def take_over(graph: Graph, output: Tensor) -> Tensor:
    """Give the producer of ``output`` a new tensor to make, so that another node can make ``output``."""
    node = graph.producer(output)
    assert node is not None, "a block's output is made by a node"
    inner = graph.new_variable(f"{output.name}.inner", output)
    node.outputs = [inner if tensor is output else tensor for tensor in node.outputs]
    return inner


# -- BatchNormalization ----------------------------------------------------------------------------------------------


def insert_batchnorm(
    graph: Graph,
    source: Tensor,
    axis: int,
    *,
    before: Node,
    name: str,
    scale: np.ndarray | None = None,
    bias: np.ndarray | None = None,
) -> Tensor:
    """BatchNormalization along ``axis``: scale 1, bias 0, mean 0 and variance 1 unless given."""
    channels, dtype = channels_of(source, axis), float_type(source)
    numbers = {
        "scale": np.ones(channels) if scale is None else scale,
        "bias": np.zeros(channels) if bias is None else bias,
        "mean": np.zeros(channels),
        "var": np.ones(channels),
    }
    constants = [graph.new_constant(f"{name}.{key}", value.astype(dtype)) for key, value in numbers.items()]
    axes = rank(source)
    there, back = moved_axes(axes, axis)
    tensor = source
    if there is not None:
        tensor = graph.insert(
            "Transpose", [tensor], attrs={"perm": there}, before=before, name=f"{name}.there"
        ).outputs[0]
    attrs = {"epsilon": EPSILON, "momentum": MOMENTUM}
    made: Tensor = graph.insert(
        "BatchNormalization", [tensor, *constants], attrs=attrs, before=before, name=name
    ).outputs[0]
    if there is not None:
        made = graph.insert("Transpose", [made], attrs={"perm": back}, before=before, name=f"{name}.back").outputs[0]
    made.dtype, made.shape = source.dtype, source.shape
    return made


def channels_of(tensor: Tensor, axis: int) -> int:
    """Size of the channel axis.

    Raises:
        RecipeError: It is not known.
    """
    size = None if tensor.shape is None or len(tensor.shape) <= axis else tensor.shape[axis]
    if not isinstance(size, (int, np.integer)):
        raise RecipeError(f"the channels of {tensor.name!r} are not known: no BatchNormalization can stand there")
    return int(size)


def moved_axes(axes: int | None, axis: int) -> tuple[list[int] | None, list[int] | None]:
    """Permutations that bring ``axis``, the last, to place 1 and back; None where it is there."""
    if axis == 1 or axes is None or axes < 3:
        return None, None
    return [0, axes - 1, *range(1, axes - 1)], [0, *range(2, axes), 1]


def channel_axis(branch: Branch, step: Step) -> int:
    """The channel axis of what a step reads: 1 among convolutions, the last one among matrices."""
    axes = rank(step.source)
    if step.kind == "norm":
        return step.axis
    last = not any(other.kind == "conv" for other in branch.steps)
    for other in branch.steps:
        if other is step:
            break
        if other.kind == "transpose":
            last = not last
    return (axes or 2) - 1 if last else 1


# -- padding ---------------------------------------------------------------------------------------------------------


def moved_pads(branch: Branch) -> list[tuple[Step, tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Per convolution: its step, the pads it gets, and by how much its input grows, begin and end."""
    steps = [step for step in branch.linear if step.conv is not None]
    convs = [step.conv for step in steps if step.conv is not None]
    if not convs:
        return []
    found = []
    for index, (step, (begin, end)) in enumerate(zip(steps, rings(convs), strict=True)):
        none = (0,) * len(begin)
        found.append(
            (step, (none + none) if index else begin + end, none if not index else begin, none if not index else end)
        )
    return found


def set_pads(node: Node, conv: ConvOp, pads: Sequence[int]) -> None:
    """Explicit pads of a Conv in place of those it has."""
    node.attrs.pop("auto_pad", None)
    node.attrs.setdefault("kernel_shape", list(conv.kernel))
    node.attrs["pads"] = [int(pad) for pad in pads]


def insert_mask(graph: Graph, step: Step, begin: Sequence[int], end: Sequence[int], mixer: Mixer, name: str) -> None:
    """Multiply what a Conv reads by 1 inside and by lambda on the ring that the moved padding adds.

    At 0 the ring is the zeros that the Conv padded with; at 1 nothing is masked.
    """
    node, conv = step.nodes[0], step.conv
    assert conv is not None
    sizes = spatial_sizes(step.source, conv)
    inside = np.ones([1, 1, *(size or 1 for size in sizes)])  # every size is known where there is a ring
    ring = np.pad(inside, [(0, 0), (0, 0), *zip(begin, end, strict=True)])
    constant = graph.new_constant(f"{name}.inside", ring.astype(float_type(step.source)))
    mask = graph.insert("Max", [constant, mixer.pruned], before=node, name=f"{name}.mask").outputs[0]
    masked = graph.insert("Mul", [node.inputs[0], mask], before=node, name=f"{name}.masked").outputs[0]
    node.inputs = [masked, *node.inputs[1:]]


def centre(conv: ConvOp) -> list[int]:
    """The tap of a kernel that reads the position of the output."""
    return [p // d for p, d in zip(conv.pads_begin, conv.dilations, strict=True)]


# -- activations -----------------------------------------------------------------------------------------------------

MakeActivation = Callable[[Tensor, Node, str], Tensor]


def end_activation(graph: Graph, branch: Branch, flow: Flow, follows: str, block: str) -> MakeActivation | None:
    """What makes the activation at the block's end; None where there is to be none.

    Raises:
        RecipeError: The block's own activation cannot act on the block's output.
    """
    if flow.end == "none" or follows:
        return None
    if flow.end == "relu":
        return lambda x, before, name: graph.insert("Relu", [x], before=before, name=name).outputs[0]
    if flow.end == "gelu":
        return lambda x, before, name: insert_gelu(graph, x, before=before, name=name)
    own = [step for step in branch.steps if step.kind == "activation"]
    if not own:
        return None
    # Its parts are noted now: the pruned flow takes the nodes away.
    parts = [(node.op, dict(node.attrs), list(node.inputs), list(node.outputs), node.domain) for node in own[-1].nodes]
    for _, _, inputs, _, _ in parts:
        wide = next((t for t in inputs if is_constant(t) and math.prod(t.shape) > 1), None)
        if wide is not None:
            raise RecipeError(
                f"block {block!r}: its activation {own[-1].what} has the numbers {wide.name!r}, one for each inner "
                'channel, and cannot stand at the end: use end = "relu"'
            )
    source, output = own[-1].source, own[-1].output

    def make(x: Tensor, before: Node, name: str) -> Tensor:
        renamed: dict[Tensor, Tensor] = {source: x}
        for op, attrs, inputs, outputs, domain in parts:
            node = graph.insert(
                op, [renamed.get(t, t) for t in inputs], None, dict(attrs), before=before, name=name, domain=domain
            )
            renamed[outputs[0]] = node.outputs[0]
        return renamed[output]

    return make


def insert_gelu(graph: Graph, x: Tensor, *, before: Node, name: str) -> Tensor:
    """x * 0.5 * (1 + Erf(x / sqrt(2)))."""
    dtype = float_type(x)

    def constant(value: float) -> Tensor:
        return graph.new_constant(f"{name}.constant", np.array(value, dtype))

    def node(op: str, *inputs: Tensor) -> Tensor:
        made: Tensor = graph.insert(op, inputs, before=before, name=name).outputs[0]
        return made

    curve = node("Add", node("Erf", node("Div", x, constant(math.sqrt(2)))), constant(1.0))
    return node("Mul", node("Mul", x, curve), constant(0.5))


def insert_node(graph: Graph, op: str, inputs: Sequence[Tensor], before: Node, name: str, **attrs: Any) -> Tensor:
    """The output of a new node."""
    made: Tensor = graph.insert(op, inputs, attrs=attrs, before=before, name=name).outputs[0]
    return made
