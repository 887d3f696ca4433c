"""What is known of shapes, and of the small integer tensors that hold them, before the model runs.

Exporters compute shapes at run time: Shape, Gather, Mul, Concat into Reshape. ``Sizes`` walks a graph once and follows
such values element by element as polynomials in unknowns; ``size_rules`` says how. What cannot be followed becomes an
unknown of its own. An unknown that is a dimension is never negative, and it may be 0.

What is found holds for the shapes of one inference (``shapes.infer_shapes``); after the next one, make a new ``Sizes``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcompress.graph import Graph, Node, Tensor, constant_value, is_op, optional_input, static_shape
from onnxcompress.sizes import rules as size_rules
from onnxcompress.sizes.polynomial import Size, product

logger = logging.getLogger(__name__)

MAX_ELEMENTS = 64  # tensors that hold sizes have a few elements; others are not followed
MAX_TERMS = 32


@dataclass(frozen=True)
class Values:
    """The elements of an integer or bool tensor of rank 0 (``scalar``) or 1."""

    items: tuple[Size, ...]
    scalar: bool = False

    @property
    def known(self) -> tuple[int, ...] | None:
        """The elements as numbers, when all are."""
        numbers = [item.known for item in self.items]
        return None if None in numbers else tuple(n for n in numbers if n is not None)


@dataclass(frozen=True)
class Window:
    """Sizes ``start`` to ``end`` of ``source``; ``shape`` holds all of them."""

    source: Tensor
    shape: Tensor
    start: int
    end: int


class Sizes:
    """What is known of the sizes in one graph.

    Args:
        graph: Its nodes must stand in order.
        outer: The same for the graph that holds this one; its tensors are seen here too.
        nodes: Those to visit now; all by default.
    """

    def __init__(self, graph: Graph, outer: Sizes | None = None, *, nodes: Iterable[Node] | None = None) -> None:
        self.graph = graph
        # Shared with the outer graphs: one unknown has one number.
        self._unknowns: dict[Hashable, int] = {} if outer is None else outer._unknowns
        self._not_negative: set[int] = set() if outer is None else outer._not_negative
        self._lengths: set[Size] = set() if outer is None else outer._lengths
        # Names that inference gave to sizes which are polynomials of others.
        self._alias: dict[str, Size] = {} if outer is None else outer._alias
        self._values: dict[Tensor, Values] = {} if outer is None else dict(outer._values)
        self._first: dict[tuple[Values, str], Tensor] = {}
        # Neighbouring sizes of a tensor whose Shape is taken, and where a node comes after that Shape: its window.
        self._neighbours: dict[tuple[Size, ...], Window] = {}
        self._windows: dict[Tensor, Window] = {}
        for node in graph.nodes if nodes is None else nodes:
            self.visit(node)

    # -- questions ---------------------------------------------------------------------------------------------------

    def dims(self, tensor: Tensor | None) -> tuple[Size, ...] | None:
        """The shape of a tensor; None when its rank is not known."""
        if tensor is None or tensor.shape is None:
            return None
        found = tuple(self._dim(tensor, axis, dim) for axis, dim in enumerate(tensor.shape))
        self._lengths.update(found)
        return found

    def output_dims(self, node: Node) -> Sequence[Size | None] | None:
        """The shape that a node gives its first output, computed from its inputs; None where that is not followed."""
        return size_rules.SHAPES[node.op](self, node) if node.op in size_rules.SHAPES and is_op(node, node.op) else None

    def name(self, size: Size | None) -> int | str | None:
        """A size as ``tensor.shape`` holds it: a number or a symbolic name; None where it has neither."""
        if size is None or size.known is not None:
            return None if size is None else size.known
        key = next((key for key, number in self._unknowns.items() if size == Size.unknown(number)), None)
        return key if isinstance(key, str) else None

    def values(self, tensor: Tensor | None) -> Values | None:
        """The elements of a small integer tensor; None when they are not followed."""
        if tensor is None or tensor.is_empty():
            return None
        constant = constant_value(tensor, limit=MAX_ELEMENTS)
        if constant is None:
            return self._values.get(tensor)
        if constant.ndim > 1 or constant.dtype.kind not in "iub":
            return None
        return Values(tuple(Size.of(int(item)) for item in constant.reshape(-1)), constant.ndim == 0)

    def first_equal(self, tensor: Tensor) -> Tensor | None:
        """The first tensor that a node of this graph makes with the type and elements of ``tensor``, or itself."""
        values = self.values(tensor)
        return None if values is None else self._first.get((values, str(tensor.dtype)))

    def window(self, tensor: Tensor) -> Window | None:
        """Neighbouring sizes of one tensor that are the elements of ``tensor``; a Shape before it takes all of them."""
        return self._windows.get(tensor)

    def is_not_negative(self, size: Size) -> bool:
        """Whether ``size`` is proven to be 0 or more."""
        return all(k > 0 and self._not_negative.issuperset(monomial) for monomial, k in size.terms)

    def is_axis_length(self, size: Size) -> bool:
        """Whether ``size`` is the length of an axis of some tensor, not only a number computed from lengths."""
        return size in self._lengths

    def is_positive(self, size: Size) -> bool:
        """Whether ``size`` is proven to be 1 or more."""
        return self.is_not_negative(size) and bool(size.terms) and size.terms[0][0] == ()

    def reshaped(self, source: Sequence[Size], target: Sequence[Size], *, allow_zero: bool) -> list[Size | None] | None:
        """The shape after a Reshape of ``source`` to ``target``: 0 copies an axis, -1 takes what is left over.

        An element is None where it is not known. None when the Reshape would fail.
        """
        shape: list[Size | None] = []
        left_over: int | None = None
        for axis, size in enumerate(target):
            same_axis = source[axis] if axis < len(source) else None
            if size.known == 0 and not allow_zero:
                if same_axis is None:
                    return None
                shape.append(same_axis)
            elif size.known == -1:
                left_over = axis
                shape.append(None)
            else:
                # A size that is 0 at run time copies the axis, which is the same thing where it stands for that axis.
                plain = size == same_axis or (self.is_not_negative(size) if allow_zero else self.is_positive(size))
                shape.append(size if plain else None)
        if left_over is not None and shape.count(None) == 1:
            shape[left_over] = product(source).divided_by(product(size for size in shape if size is not None))
        return shape

    # -- the walk ----------------------------------------------------------------------------------------------------

    def unknown(self, key: Hashable, *, not_negative: bool = False) -> Size:
        """The unknown that stands for ``key``."""
        number = self._unknowns.setdefault(key, len(self._unknowns))
        if not_negative:
            self._not_negative.add(number)
        return Size.unknown(number)

    def _dim(self, tensor: Tensor, axis: int, dim: Any) -> Size:
        if isinstance(dim, (int, np.integer)):
            return Size.of(int(dim))
        if dim is None:
            return self.unknown((tensor, axis), not_negative=True)
        return self._alias[dim] if dim in self._alias else self.unknown(dim, not_negative=True)

    def visit(self, node: Node) -> None:
        """Learn what a node tells; those before it were visited."""
        if not is_op(node, node.op) or not node.outputs:
            return
        if node.op in size_rules.SHAPES:
            self._name(node)
        if node.op == "Split":
            for tensor, values in size_rules.split(self, node):
                self._values[tensor] = values
        elif node.op in size_rules.VALUES:
            output = node.outputs[0]
            found = size_rules.VALUES[node.op](self, node) or self._opaque(output)
            if found is not None and len(found.items) <= MAX_ELEMENTS:
                items = [self._stored(item, output, i) for i, item in enumerate(found.items)]
                values = self._values[output] = Values(tuple(items), found.scalar)
                self._first.setdefault((values, str(output.dtype)), output)
                self._look_out(node, values)

    def _look_out(self, node: Node, values: Values) -> None:
        output = node.outputs[0]
        if values.items in self._neighbours and not values.scalar and output.dtype == np.int64:
            self._windows[output] = self._neighbours[values.items]
        if node.op == "Shape" and "start" not in node.attrs and "end" not in node.attrs:
            for start in range(len(values.items)):
                for end in range(start + 1, len(values.items) + 1):
                    window = Window(node.inputs[0], output, start, end)
                    self._neighbours.setdefault(values.items[start:end], window)

    def _stored(self, item: Size, output: Tensor, index: int) -> Size:
        """The element as the output's type holds it, or an unknown when that is another number or it is too long."""
        if item.known is not None and output.dtype is not None and np.dtype(output.dtype).kind in "iu":
            limits = np.iinfo(output.dtype)
            if not limits.min <= item.known <= limits.max:
                return self.unknown((output, "element", index))
        return item if len(item.terms) <= MAX_TERMS else self.unknown((output, "element", index))

    def _opaque(self, tensor: Tensor) -> Values | None:
        """Unknowns for the elements of a signed integer tensor of known, small length."""
        shape = static_shape(tensor)
        if shape is None or len(shape) > 1 or math.prod(shape) > MAX_ELEMENTS:
            return None
        if tensor.dtype is None or np.dtype(tensor.dtype).kind != "i":
            return None
        return Values(tuple(self.unknown((tensor, "element", i)) for i in range(math.prod(shape))), len(shape) == 0)

    def _name(self, node: Node) -> None:
        """Learn what the names that inference gave to an output's sizes stand for."""
        shape = node.outputs[0].shape
        if shape is None or not any(isinstance(dim, str) and not self._is_told(dim) for dim in shape):
            return
        found = self.output_dims(node)
        if found is None or shape is None or len(found) != len(shape):
            return
        for dim, size in zip(shape, found, strict=True):
            if isinstance(dim, str) and size is not None and not self._is_told(dim):
                self._alias[dim] = size

    def _is_told(self, name: str) -> bool:
        return name in self._alias or name in self._unknowns


def slice_bounds(sizes: Sizes, node: Node) -> tuple[Values, Values, list[int], list[int]] | None:
    """(starts, ends, axes, steps) of a Slice with attributes (before opset 10) or inputs; None where not followed."""
    if "starts" in node.attrs:
        starts, ends = (Values(tuple(map(Size.of, node.attrs[name]))) for name in ("starts", "ends"))
        return starts, ends, list(node.attrs.get("axes") or range(len(starts.items))), [1] * len(starts.items)
    begin, end = (sizes.values(optional_input(node, i)) for i in (1, 2))
    if begin is None or end is None or len(begin.items) != len(end.items):
        return None
    count = len(begin.items)
    axes = known_or(sizes, optional_input(node, 3), range(count))
    steps = known_or(sizes, optional_input(node, 4), [1] * count)
    if axes is None or steps is None or not len(axes) == len(steps) == count:
        return None
    return begin, end, axes, steps


def known_or(sizes: Sizes, tensor: Tensor | None, default: Iterable[int]) -> list[int] | None:
    """The elements of ``tensor`` where they are known; the default when it is omitted."""
    if tensor is None:
        return list(default)
    values = sizes.values(tensor)
    return None if values is None or values.known is None else list(values.known)
