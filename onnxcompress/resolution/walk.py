"""One walk over a graph at two resolutions: sizes of every tensor, before and after, and what has to be mended.

A rule reads the axes of a node's inputs and sets those of its outputs; where a size is written down that no longer
holds, it says what to do about it. Nothing is done before the walk is through, so a graph that cannot be scaled is as
it was. A node none of whose inputs changes needs no rule; one that has none, and whose input changes, is a refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from onnxcompress.errors import ModelError
from onnxcompress.graph import (
    STANDARD_DOMAINS,
    Constant,
    Graph,
    Node,
    Tensor,
    bodies,
    constant_value,
    optional_input,
    static_shape,
)
from onnxcompress.resolution.axes import Axes, Side, fixed
from onnxcompress.sizes import Sizes


@dataclass(frozen=True)
class Repair:
    """What was mended: at which node, and what."""

    node: str
    what: str


@dataclass
class Walk:
    """The sizes of one graph while it is walked over.

    Attributes:
        graph: Its shapes are those of the old resolution, all of them numbers.
        free: Numbers that stand for open sizes; none of them is written down.
        axes: Of each tensor that was seen.
        follows: Tensors whose numbers are computed from sizes that change.
        repairs: What will be mended.
        losses: Rows and columns that a patch does not reach any more.
    """

    graph: Graph
    free: Collection[int] = ()
    axes: dict[Tensor, Axes] = field(default_factory=dict)
    follows: set[Tensor] = field(default_factory=set)
    repairs: list[Repair] = field(default_factory=list)
    losses: list[Repair] = field(default_factory=list)
    _acts: list[Callable[[], None]] = field(default_factory=list)
    _seen: dict[tuple[Side, int], set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.old = Sizes(self.graph)
        self.new = Sizes(self.graph, nodes=())  # told of each node once its new shapes are known

    # -- questions ---------------------------------------------------------------------------------------------------

    def of(self, tensor: Tensor) -> Axes:
        """The axes of a tensor; those of constants and of tensors that nothing changes are what they were."""
        if tensor in self.axes:
            return self.axes[tensor]
        shape = static_shape(tensor)
        return fixed(shape) if shape is not None else ()

    def changed(self, tensor: Tensor | None) -> bool:
        return tensor is not None and any(axis.changed for axis in self.axes.get(tensor, ()))

    def old_shape(self, tensor: Tensor) -> tuple[int, ...] | None:
        return tuple(axis.old for axis in self.axes[tensor]) if tensor in self.axes else static_shape(tensor)

    def like(self, side: Side, old: int) -> int | None:
        """The new length of rows or columns that had this length elsewhere, when it is the same everywhere."""
        found = self._seen.get((side, old), set())
        return next(iter(found)) if len(found) == 1 else None

    def old_values(self, tensor: Tensor | None) -> list[int] | None:
        """The elements of a small integer tensor at the old resolution, when they are known."""
        return _numbers(self.old, tensor)

    def new_values(self, tensor: Tensor | None) -> list[int] | None:
        return _numbers(self.new, tensor)

    # -- statements --------------------------------------------------------------------------------------------------

    def refuse(self, node: Node, why: str) -> ModelError:
        """The error that says why this graph works at its own resolution only."""
        return self.refusal(f"{node.op} {name_of(node)!r} {why}")

    def refusal(self, why: str) -> ModelError:
        """The same where it is no node's fault."""
        for size in self.free:
            why = why.replace(str(size), "N")
        return ModelError(f"the resolution cannot be changed: {why}")

    def set(self, tensor: Tensor, axes: Axes) -> None:
        self.axes[tensor] = axes
        tensor.shape = [axis.new for axis in axes]
        for axis in axes:
            if axis.side:
                self._seen.setdefault((axis.side, axis.old), set()).add(axis.new)

    def later(self, node: Node, what: str, act: Callable[[], None]) -> None:
        """Mend something once the walk is through."""
        self.repairs.append(Repair(name_of(node), what))
        self._acts.append(act)

    def lose(self, node: Node, what: str) -> None:
        """Say that a node leaves something out at the new size."""
        self.losses.append(Repair(name_of(node), what))

    def new_input(self, node: Node, slot: int, values: np.ndarray, what: str) -> None:
        """Give a node a constant of its own, later; others may share the one that was there."""

        def act() -> None:
            old = node.inputs[slot]
            dtype = old.dtype if isinstance(old, Constant) else np.dtype(np.int64)
            fresh = self.graph.new_constant(old.name, values.astype(dtype))
            node.inputs = [fresh if i == slot else tensor for i, tensor in enumerate(node.inputs)]
            self.graph.touch(node)

        self.later(node, what, act)

    def mend(self) -> None:
        """Do what has to be done."""
        for act in self._acts:
            act()


Rule = Callable[[Walk, Node], None]


def walk(graph: Graph, start: Mapping[Tensor, Axes], rules: Mapping[str, Rule], *, free: Collection[int] = ()) -> Walk:
    """Follow sizes through a graph; the shapes of its tensors become the new ones.

    Args:
        graph: Its shapes are numbers, those of the old resolution.
        start: Axes of the inputs.
        rules: By operator of the standard domain.
        free: Numbers that stand for open sizes.

    Raises:
        ModelError: Something pins the resolution; the message names the node and why.
    """
    found = Walk(graph, free)
    for tensor, axes in start.items():
        found.set(tensor, axes)
    for node in list(graph.nodes):
        _step(found, node, rules)
    return found


def _step(found: Walk, node: Node, rules: Mapping[str, Rule]) -> None:
    for body in bodies(node):
        for nested in body.walk():
            for tensor in [*(t for inner in nested.nodes for t in inner.inputs), *nested.outputs]:
                if found.changed(tensor) or tensor in found.follows:
                    raise found.refuse(node, f"reads {tensor.name!r}, whose size changes, in a nested graph")
    touched = [t for t in node.inputs if found.changed(t) or t in found.follows]
    rule = rules.get(node.op) if node.domain in STANDARD_DOMAINS else None
    if touched:
        if rule is None:
            raise found.refuse(node, f"is not understood, and the size of {touched[0].name!r} changes")
        unknown = [t for t in [*node.inputs, *node.outputs] if not t.is_empty() and found.old_shape(t) is None]
        if unknown:
            why = f"has an input or output of unknown shape, {unknown[0].name!r}; clean the model up first (optimize)"
            raise found.refuse(node, why)
        _apply(found, node, rule)
        if any(t in found.follows for t in node.inputs) or (
            any(map(found.changed, node.inputs)) and node.op in SIZE_OPS
        ):
            found.follows.update(node.outputs)
    found.new.visit(node)


SIZE_OPS = frozenset({"Shape", "Size"})


def _apply(found: Walk, node: Node, rule: Rule) -> None:
    shapes = {t: static_shape(t) for t in node.outputs if not t.is_empty()}
    rule(found, node)
    for tensor, shape in shapes.items():
        axes = found.axes.get(tensor)
        if axes is None:
            raise found.refuse(node, f"gives {tensor.name!r}, of which nothing is known")
        if tuple(axis.old for axis in axes) != shape:
            raise found.refuse(node, f"gives {list(shape or ())}, which is not what its inputs make")
        if any(axis.new < 1 for axis in axes):
            raise found.refuse(node, f"would give {[axis.new for axis in axes]}: the resolution is too small for it")


def _numbers(sizes: Sizes, tensor: Tensor | None) -> list[int] | None:
    values = sizes.values(tensor)
    return None if values is None or values.known is None else list(values.known)


def name_of(node: Node) -> str:
    """A node's name, or the name of what it makes."""
    return str(node.name or (node.outputs[0].name if node.outputs else node.op))


def constant_ints(node: Node, slot: int, name: str) -> list[int] | None:
    """Numbers from an attribute, or from a constant input."""
    given = node.attrs.get(name)
    if given is None:
        given = constant_value(optional_input(node, slot))
    return None if given is None else [int(v) for v in np.asarray(given).reshape(-1)]
