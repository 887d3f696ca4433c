"""One walk over a graph: labels of every tensor, what is bound to them, and what has to be mended when they go.

A rule reads the labels of a node's inputs and sets those of its outputs. An operator without a rule freezes what it
reads. Beside its labels a tensor has a *rest*: the number at removed channels once their parameters are zero, NaN where
it is not one known number, and infinity where it may be none at all. What mixes channels has no weights for those that
are removed, so their rest is lost there. Where it is not 0, and where statistics are taken over channels, the pruned
graph is said to be *approximate*, for it is not the graph with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from onnxcompress.channels.labels import LabelSpace, Line, collapsed, lines, on_axis, padded, varied
from onnxcompress.graph import (
    STANDARD_DOMAINS,
    Constant,
    Graph,
    Node,
    Tensor,
    bodies,
    constant_value,
    is_constant,
    is_op,
    numpy_dtype,
    optional_input,
    rank,
    static_shape,
)

# weight, bias, scale: make the channel. input: read it where channels are mixed. other: goes along.
Role = Literal["weight", "bias", "scale", "input", "other"]
MAKERS = frozenset({"weight", "bias", "scale"})
ZEROED = MAKERS | {"input"}
UNKNOWN = math.nan
WILD = math.inf


@dataclass(frozen=True, eq=False)
class Binding:
    """One axis of a constant: its index i goes with slice i of a line.

    Attributes:
        node: Reads the constant.
        slot: At which input.
        axis: Of the constant.
        line: One axis of a labelling.
        role: What the constant is to the channels.
        user: The operator that works with it, where ``node`` only dequantizes it.
    """

    node: Node
    slot: int
    axis: int
    line: Line
    role: Role
    user: Node | None = None

    @property
    def tensor(self) -> Tensor:
        tensor: Tensor = self.node.inputs[self.slot]
        return tensor


class Keeping:
    """What stays, asked by slices.

    Args:
        removed: (labels,) bool by label.
    """

    def __init__(self, removed: np.ndarray) -> None:
        self.removed = removed

    def mask(self, line: Line) -> np.ndarray:
        """(size,) bool: which slices stay."""
        return ~np.asarray(self.removed[line.slices()].all(axis=1))

    def count(self, line: Line) -> int:
        return int(self.mask(line).sum())

    def changes(self, labels: np.ndarray) -> bool:
        return bool(self.removed[labels].any())


@dataclass(frozen=True, eq=False)
class Offset:
    """A constant that is added to channels; ``labels`` are those of the sum."""

    node: Node
    slot: int
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class Repair:
    """What has to change at a node besides its weights.

    Attributes:
        node: The node.
        labels: Nothing changes unless some of these are removed.
        act: Does it.
    """

    node: Node
    labels: np.ndarray
    act: Callable[[Graph, Keeping], None]


@dataclass(frozen=True, eq=False)
class Approximation:
    """A place where removed channels count otherwise than zeros would.

    Attributes:
        line: The channels.
        why: The node, and what it does without them.
    """

    line: Line
    why: str


@dataclass(frozen=True, eq=False)
class Work:
    """A node's multiply-accumulates: in proportion to what is left of each of these labellings."""

    node: Node
    factors: tuple[np.ndarray, ...]


@dataclass
class Trace:
    """The labels of one graph while it is walked over."""

    graph: Graph
    space: LabelSpace = field(default_factory=LabelSpace)
    labels: dict[Tensor, np.ndarray] = field(default_factory=dict)
    rests: dict[Tensor, float] = field(default_factory=dict)
    bindings: list[Binding] = field(default_factory=list)
    repairs: list[Repair] = field(default_factory=list)
    references: list[Repair] = field(default_factory=list)
    approximations: list[Approximation] = field(default_factory=list)
    offsets: list[Offset] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)
    contracted: list[Line] = field(default_factory=list)

    # -- questions ---------------------------------------------------------------------------------------------------

    def of(self, tensor: Tensor | None) -> np.ndarray | None:
        return None if tensor is None else self.labels.get(tensor)

    def rest(self, tensor: Tensor) -> float:
        """The number at removed channels; for a constant of one element its value."""
        if tensor in self.rests:
            return self.rests[tensor]
        value = constant_value(tensor, limit=1)
        if value is None or value.size != 1 or value.dtype.kind not in "fiub":
            return UNKNOWN
        return float(value.reshape(-1)[0])

    def is_weight(self, tensor: Tensor | None) -> bool:
        """Whether a tensor is constant, or what one node reads of an integer constant that is dequantized."""
        return is_constant(tensor) or self.dequantizer(tensor) is not None

    def dequantizer(self, tensor: Tensor | None) -> Node | None:
        """The node that makes a weight of an integer constant, where nothing else reads it."""
        node = self.graph.producer(tensor)
        if node is None or tensor is None or not is_op(node, "DequantizeLinear") or node.attrs.get("block_size", 0):
            return None
        alone = len(tensor.outputs) == 1 and not self.graph.is_output(tensor)
        return node if alone and all(is_constant(t) for t in node.inputs) else None

    def channel_line(self, tensor: Tensor, axis: int) -> Line | None:
        """The labels along one axis when the labelling has no other; None too when there are none."""
        labels = self.of(tensor)
        return Line(labels, axis) if labels is not None and varied(labels) == (axis,) else None

    # -- statements --------------------------------------------------------------------------------------------------

    def set(self, tensor: Tensor, labels: np.ndarray | None, rest: float = UNKNOWN) -> None:
        """Set the labels of an output; what has become the same along an axis needs none there."""
        labels = None if labels is None else collapsed(labels)
        if labels is not None:
            self.labels[tensor] = labels
            self.space.arrays.append(labels)
            self.rests[tensor] = rest

    def new(self, size: int, axis: int, rank_: int) -> np.ndarray:
        """New labels along one axis."""
        return on_axis(self.space.new(size), axis, rank_)

    def freeze(self, tensor: Tensor | None, node: Node | None, why: str) -> None:
        """None of a tensor's channels may be removed."""
        self.space.freeze(self.of(tensor), reason_text(node, why))

    def freeze_axis(self, tensor: Tensor, axis: int, node: Node, why: str) -> None:
        labels = self.of(tensor)
        if labels is not None and axis in varied(labels):
            self.space.freeze_line(Line(labels, axis), reason_text(node, why))

    def bind(self, node: Node, slot: int, axis: int, line: Line, role: Role) -> None:
        """Let an axis of a constant go with a line."""
        rank_ = len(node.inputs[slot].shape)
        axis %= rank_
        quantized = self.dequantizer(node.inputs[slot])
        if quantized is not None:
            # Scales and zero points of this very axis go along.
            if int(quantized.attrs.get("axis", 1)) % max(rank_, 1) == axis:
                for other in range(1, len(quantized.inputs)):
                    if math.prod(quantized.inputs[other].shape) > 1:
                        self.bindings.append(Binding(quantized, other, 0, line, "other"))
            self.bindings.append(Binding(quantized, 0, axis, line, role, node))
        else:
            self.bindings.append(Binding(node, slot, axis, line, role))

    def bind_constant(self, node: Node, slot: int, labels: np.ndarray, rank_: int, role: Role) -> None:
        """Bind a constant that is broadcast to a tensor with these labels, wherever it is not itself 1 there."""
        shape = node.inputs[slot].shape
        labels = padded(labels, rank_)
        for line in lines(labels):
            axis = line.axis - (rank_ - len(shape))
            if axis >= 0 and shape[axis] != 1:
                self.bind(node, slot, axis, line, role)

    def repair(self, node: Node, labels: np.ndarray, act: Callable[[Graph, Keeping], None]) -> None:
        self.repairs.append(Repair(node, labels, act))

    def work(self, node: Node, *factors: np.ndarray | None) -> None:
        self.works.append(Work(node, tuple(labels for labels in factors if labels is not None)))

    def refer(self, node: Node, labels: np.ndarray, act: Callable[[Graph, Keeping], None]) -> None:
        """What is done where channels are zeroed, not removed, so that ``node`` sees what it sees without them."""
        self.references.append(Repair(node, labels, act))

    def approximate(self, line: Line, node: Node, why: str) -> None:
        self.approximations.append(Approximation(line, reason_text(node, why)))

    def ignore(self, tensor: Tensor, axis: int, node: Node) -> None:
        """``node`` mixes the channels along ``axis``, and what is removed has no weights there."""
        rest, labels = self.rest(tensor), self.of(tensor)
        if labels is None or rest == 0:
            return
        if rest == WILD:
            self.freeze_axis(tensor, axis, node, "a removed channel might be no finite number there")
            return
        what = "a number of its own" if math.isnan(rest) else f"{rest:g}"
        self.approximate(Line(labels, axis), node, f"a channel with zeros would be {what} there, not 0")

    def mask(self, node: Node, slot: int, axis: int) -> None:
        """``node`` mixes the channels along ``axis`` of an input without weights: removed ones are 0 to it."""
        labels = self.of(node.inputs[slot])
        self.ignore(node.inputs[slot], axis, node)
        if labels is not None and self.rest(node.inputs[slot]) != 0:
            self.refer(node, labels, lambda graph, keeping: multiply_by_mask(graph, keeping, node, slot, labels))

    def joint(self, sources: Sequence[Line], axes: Sequence[int], rank_: int) -> np.ndarray | None:
        """New labels over several axes, each linked with a line."""
        shape = [1] * rank_
        for line, axis in zip(sources, axes, strict=True):
            shape[axis] = line.size
        if not sources:
            return None
        made = self.space.new(math.prod(shape)).reshape(shape)
        for line, axis in zip(sources, axes, strict=True):
            self.space.link(Line(made, axis), line)
        return made


Rule = Callable[[Trace, Node], None]


def walk(graph: Graph, rules: Mapping[str, Rule]) -> Trace:
    """Label the tensors of the outermost graph; its nodes stand in order and its shapes are inferred."""
    trace = Trace(graph)
    for node in graph.nodes:
        rule = rules.get(node.op) if node.domain in STANDARD_DOMAINS else None
        if bodies(node):
            _freeze_captured(trace, node)
        if rule is None or not _shapes_known(node):
            why = "is not understood" if rule is None else "has inputs or outputs of unknown shape"
            for tensor in node.inputs:
                trace.freeze(tensor, node, why)
        else:
            rule(trace, node)
    for tensor in graph.outputs:
        trace.space.freeze(trace.of(tensor), f"output {tensor.name!r} of the model")
    _check_constants(trace)
    return trace


def _shapes_known(node: Node) -> bool:
    live = [t for t in [*node.inputs, *node.outputs] if not t.is_empty()]
    return all(rank(t) is not None for t in live)


def _freeze_captured(trace: Trace, node: Node) -> None:
    for body in bodies(node):
        for nested in body.walk():
            for tensor in [*(t for inner in nested.nodes for t in inner.inputs), *nested.outputs]:
                trace.freeze(tensor, node, "reads it in a nested graph")


def _check_constants(trace: Trace) -> None:
    """A constant with several readers keeps one shape: bound alike by all, or its channels stay."""
    by_axis: dict[tuple[Tensor, int], list[Binding]] = {}
    for binding in trace.bindings:
        by_axis.setdefault((binding.tensor, binding.axis), []).append(binding)
    for (tensor, _), found in by_axis.items():
        first = found[0]
        readers: list[Node] = list(dict.fromkeys(tensor.outputs))
        uses = [(node, slot) for node in readers for slot, t in enumerate(node.inputs) if t is tensor]
        missing = [node for node, slot in uses if not any(b.node is node and b.slot == slot for b in found)]
        if trace.graph.is_output(tensor) or not isinstance(tensor, Constant) or tensor.home not in (None, trace.graph):
            trace.space.freeze_line(first.line, reason_text(first.node, f"weight {tensor.name!r} is needed outside"))
        for node in missing:
            why = f"reads {tensor.name!r} too, where channels cannot be removed"
            trace.space.freeze_line(first.line, reason_text(node, why))
        for other in found[1:]:
            if other.line.size == first.line.size:
                trace.space.link(first.line, other.line)
            else:
                trace.space.freeze_line(first.line, reason_text(other.node, f"shares {tensor.name!r} in another way"))
                trace.space.freeze_line(other.line, reason_text(other.node, f"shares {tensor.name!r} in another way"))


def multiply_by_mask(graph: Graph, keeping: Keeping, node: Node, slot: int, labels: np.ndarray) -> Tensor:
    """Let an input of ``node`` be 0 in removed channels."""
    source = node.inputs[slot]
    values = (~keeping.removed[labels]).astype(numpy_dtype(source) or np.float32)
    made = graph.insert("Mul", [source, graph.new_constant(f"{source.name}_mask", values)], before=node).outputs[0]
    made.dtype, made.shape = source.dtype, source.shape
    node.inputs = [made if i == slot else tensor for i, tensor in enumerate(node.inputs)]
    return made


def blurred(rest: float) -> float:
    """The rest after an operator that makes an unknown finite number of any finite one."""
    return rest if rest == WILD else UNKNOWN


def name_of(node: Node) -> str:
    """A node's name, or the name of what it makes."""
    return str(node.name or (node.outputs[0].name if node.outputs else node.op))


def reason_text(node: Node | None, why: str) -> str:
    return why if node is None else f"{node.op} {name_of(node)!r}: {why}"


def constant_input(node: Node, slot: int) -> np.ndarray | None:
    """The value of an input that is there and constant."""
    return constant_value(optional_input(node, slot))


def sizes_of(tensor: Tensor) -> list[int | str | None]:
    """The shape with numbers as int."""
    return [int(d) if isinstance(d, (int, np.integer)) else d for d in tensor.shape]


def known(tensor: Tensor | None) -> tuple[int, ...] | None:
    return static_shape(tensor)


def ints(value: object) -> list[int]:
    """A list of numbers from an attribute or an array."""
    return [int(v) for v in np.asarray(value).reshape(-1)]
