"""The graph that every pass reads and leaves: onnx-graphsurgeon's containers, with identity, ownership and edits.

Tensors and nodes compare by identity here; graphsurgeon compares them by name and by content, which is quadratic on
tensors that are read often and takes equal nodes of two ``If`` branches for one. A node knows the graph that holds it,
so that a pattern never reaches across a subgraph's border unnoticed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon import Tensor as Tensor
from onnx_graphsurgeon.ir.tensor import LazyValues

logger = logging.getLogger(__name__)

STANDARD_DOMAINS = frozenset({None, "", "ai.onnx"})


class Node(gs.Node):
    """An operator. ``carrier`` is the NodeProto it was read from, ``made_by`` the pass that made or last changed it."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__  # in C: lists of 16,000 nodes are searched nine times as fast as with a method here

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.graph: Graph | None = None
        self.carrier: onnx.NodeProto | None = None
        self.imported_attrs: dict[str, Any] = {}
        self.made_by: str = ""


class Variable(gs.Variable):
    """A tensor known at run time only. ``shape`` holds int, str (symbolic) or None per axis; None when unknown."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    @staticmethod
    def empty() -> Variable:
        """A new tensor without a name, for an input or output that is left out."""
        return Variable("")


class Constant(gs.Constant):
    """A tensor known now. Its array is read-only: another node may share it, so a pass makes a new Constant."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__
    CACHE_LIMIT_BYTES = 1 << 20

    def __init__(self, name: str, values: np.ndarray | LazyValues, home: Graph | None = None) -> None:
        super().__init__(name, values)
        self.home = home
        self._cache: np.ndarray | None = None
        if isinstance(values, np.ndarray):
            values.setflags(write=False)

    @property
    def stored(self) -> LazyValues | None:
        """The unread original, when the values are still those of the file."""
        return self._values if isinstance(self._values, LazyValues) else None

    @property
    def values(self) -> np.ndarray:
        """The array, read-only. Large ones are read anew each time, so that they do not pile up in memory."""
        if not isinstance(self._values, LazyValues):
            return self._values  # type: ignore[no-any-return]  # graphsurgeon is untyped
        if self._cache is not None:
            return self._cache
        array: np.ndarray = self._values.load()
        array.setflags(write=False)
        if array.nbytes <= self.CACHE_LIMIT_BYTES:
            self._cache = array
        return array

    @values.setter
    def values(self, array: np.ndarray) -> None:
        array.setflags(write=False)
        self._values, self._cache = array, None

    @property
    def nbytes(self) -> int:
        """Bytes of the values, without reading them."""
        return int(self._values.nbytes)


class NodeList(list[Node]):
    """The nodes of one graph in execution order; tells each node which graph owns it."""

    def __init__(self, owner: Graph, nodes: Iterable[Node] = ()) -> None:
        super().__init__()
        self.owner = owner
        self.extend(nodes)

    def append(self, node: Node) -> None:
        node.graph = self.owner
        super().append(node)

    def insert(self, index: SupportsIndex, node: Node) -> None:
        node.graph = self.owner
        super().insert(index, node)

    def extend(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            self.append(node)

    def remove(self, node: Node) -> None:
        super().remove(node)
        node.graph = None

    def __setitem__(self, index: Any, value: Any) -> None:
        for node in value if isinstance(index, slice) else [value]:
            node.graph = self.owner
        super().__setitem__(index, value)


class Scope:
    """What a model's graph and all its subgraphs share: names in use, the pass at work, pinned tensors."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.pass_name = ""
        # Tensors of an outer graph that a subgraph returns as they are; their names must not change.
        self.pinned: set[Tensor] = set()

    def fresh(self, hint: str) -> str:
        """A name near ``hint`` that nothing in the model has."""
        name, n = hint or "tensor", 0
        while name in self.names:
            n += 1
            name = f"{hint or 'tensor'}_{n}"
        self.names.add(name)
        return name


class Graph(gs.Graph):
    """A graph or subgraph with the protobuf it came from as ``carrier``; see ``model_io`` for reading and writing."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def __init__(self, *args: Any, scope: Scope | None = None, outer: Graph | None = None, **kwargs: Any) -> None:
        self.scope = scope or Scope()
        self.outer = outer
        self.carrier: onnx.GraphProto | None = None
        self.model: onnx.ModelProto | None = None
        self.folder: Path | None = None
        # Initializers that are also inputs (IR 4 and later): the caller may override them, so they are Variables.
        self.overridable: dict[str, onnx.TensorProto] = {}
        # Initializers that nothing reads: kept until dead code is eliminated.
        self.unread: list[Constant] = []
        self.imported_names: set[str] = set()
        super().__init__(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "nodes" and not (isinstance(value, NodeList) and value.owner is self):
            value = NodeList(self, value)
        super().__setattr__(name, value)

    # -- questions ---------------------------------------------------------------------------------------------------

    def walk(self) -> Iterator[Graph]:
        """This graph, then every graph nested in it, outermost first."""
        yield self
        for node in list(self.nodes):
            for body in bodies(node):
                yield from body.walk()

    def producer(self, tensor: Tensor | None) -> Node | None:
        """The node of this very graph that makes ``tensor``; None for inputs, constants and outer tensors."""
        if tensor is None or not tensor.inputs:
            return None
        node: Node = tensor.inputs[0]
        return node if node.graph is self else None

    def is_output(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` leaves this graph (or is returned as it is by a subgraph)."""
        return any(tensor is output for output in self.outputs) or tensor in self.scope.pinned

    def feeds_only(self, tensor: Tensor, node: Node) -> bool:
        """Whether ``node`` reads ``tensor`` once and nothing else does, subgraphs and graph outputs included."""
        return len(tensor.outputs) == 1 and tensor.outputs[0] is node and not self.is_output(tensor)

    def only_reader(self, tensor: Tensor) -> Node | None:
        """The one node of this graph that reads ``tensor`` once, if nothing else reads it."""
        if len(tensor.outputs) != 1 or tensor.outputs[0].graph is not self or self.is_output(tensor):
            return None
        reader: Node = tensor.outputs[0]
        return reader

    # -- edits -------------------------------------------------------------------------------------------------------

    def new_constant(self, hint: str, values: np.ndarray) -> Constant:
        """A new initializer of this graph with a name near ``hint``."""
        return Constant(self.scope.fresh(hint), np.asarray(values), home=self)

    def new_variable(self, hint: str, like: Tensor | None = None, *, shape: Sequence[Any] | None = None) -> Variable:
        """A new tensor with a name near ``hint``; dtype and, unless given, shape of ``like``."""
        dtype = like.dtype if like is not None else None
        known = shape if shape is not None else (like.shape if like is not None else None)
        return Variable(self.scope.fresh(hint), dtype=dtype, shape=None if known is None else list(known))

    def insert(
        self,
        op: str,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor] | None = None,
        attrs: dict[str, Any] | None = None,
        *,
        before: Node,
        name: str = "",
        domain: str | None = None,
    ) -> Node:
        """Make a node in front of ``before`` and stamp it with the pass at work.

        Args:
            op: Operator type.
            inputs: Tensors in order; ``Variable.empty()`` for an omitted one.
            outputs: Tensors to produce; by default one new tensor shaped like the first input.
            attrs: Attributes by name.
            before: A node of this graph.
            name: Hint for the name; by default that of ``before``.
            domain: Operator domain.
        """
        label = self.scope.fresh(name or f"{before.name or op}_{self.scope.pass_name or 'new'}")
        made = list(outputs) if outputs is not None else [self.new_variable(f"{label}_output", inputs[0], shape=None)]
        if outputs is None:
            made[0].shape = None
        for tensor in made:
            if tensor.inputs:
                tensor.inputs = []
        node = Node(op, label, dict(attrs or {}), list(inputs), made, domain)
        node.made_by = self.scope.pass_name
        self.nodes.insert(self.nodes.index(before), node)
        return node

    def touch(self, node: Node) -> None:
        """Stamp a node whose inputs or attributes the pass at work changed."""
        node.made_by = self.scope.pass_name or node.made_by

    def remove(self, *nodes: Node) -> None:
        """Take nodes out, with the graphs nested in them; their tensors are unlinked first."""
        for node in nodes:
            for inner in [inner for body in bodies(node) for inner in body.walk()]:
                for nested in inner.nodes:
                    nested.inputs = []
                inner.nodes = []  # a sweep that is under way finds nothing there
            node.inputs = []
            node.outputs = []
            self.nodes.remove(node)

    def redirect(self, old: Tensor, new: Tensor) -> None:
        """Let every reader of ``old`` read ``new``; graph outputs are not touched."""
        for reader in dict.fromkeys(old.outputs):
            reader.inputs = [new if tensor is old else tensor for tensor in reader.inputs]

    def why_not_bypass(self, old: Tensor, new: Tensor) -> str | None:
        """The reason why ``new`` cannot stand wherever ``old`` stood, or None when it can."""
        if not self.is_output(old):
            return None
        if old in self.scope.pinned or new in self.scope.pinned:
            return "a subgraph returns the tensor"
        if self.producer(new) is None:
            return "the model output would be a graph input or an initializer"
        if self.is_output(new):
            return "both tensors are model outputs"
        return None

    def bypass(self, old: Tensor, new: Tensor) -> None:
        """Let ``new`` stand wherever ``old`` stood. An output name is kept: the producer of ``new`` then makes ``old``.

        The node that made ``old`` loses its output and should be removed by the caller.
        """
        if not self.is_output(old):
            self.redirect(old, new)
            return
        source = self.producer(new)
        assert source is not None, "why_not_bypass was not asked"
        old.inputs = []
        source.outputs = [old if tensor is new else tensor for tensor in source.outputs]
        self.redirect(new, old)

    def sort(self) -> None:
        """Order the nodes so that each stands after what it reads; stable where they already do."""
        position = {node: i for i, node in enumerate(self.nodes)}
        order: list[Node] = []
        state: dict[Node, int] = {}
        for root in self.nodes:
            stack = [root]
            while stack:
                node = stack[-1]
                if state.get(node) == 2:
                    stack.pop()
                    continue
                if state.get(node) == 1:
                    state[node] = 2
                    order.append(node)
                    stack.pop()
                    continue
                state[node] = 1
                for need in reversed(self._needs(node)):
                    if need in position and state.get(need) is None:
                        stack.append(need)
        self.nodes[:] = order

    def _needs(self, node: Node) -> list[Node]:
        """Nodes of this graph that ``node`` or a graph nested in it reads from."""
        tensors = list(node.inputs)
        for body in bodies(node):
            for nested in body.walk():
                tensors += [t for inner in nested.nodes for t in inner.inputs] + list(nested.outputs)
        return [maker for tensor in tensors if (maker := self.producer(tensor)) is not None and maker is not node]


# -- questions about one node or tensor ------------------------------------------------------------------------------


def is_op(node: Node | None, *ops: str) -> bool:
    """Whether ``node`` is one of these operators of the standard domain."""
    return node is not None and node.op in ops and node.domain in STANDARD_DOMAINS


def bodies(node: Node) -> list[Graph]:
    """The graphs that ``node`` holds: branches, loop bodies."""
    found: list[Graph] = []
    for value in node.attrs.values():
        if isinstance(value, Graph):
            found.append(value)
        elif isinstance(value, list) and value and isinstance(value[0], Graph):
            found += value
    return found


def optional_input(node: Node, index: int) -> Tensor | None:
    """The input at ``index``, or None when it is omitted."""
    if index >= len(node.inputs) or node.inputs[index].is_empty():
        return None
    return node.inputs[index]


def is_constant(tensor: Tensor | None) -> bool:
    """Whether the value is known now. Initializers that the caller may override are not constants."""
    return isinstance(tensor, gs.Constant)


def constant_value(tensor: Tensor | None, *, limit: int | None = None) -> np.ndarray | None:
    """The value of a constant tensor, or None; None too when it holds more than ``limit`` elements."""
    if not isinstance(tensor, gs.Constant):
        return None
    if limit is not None and int(np.prod(tensor.shape, dtype=np.int64)) > limit:
        return None
    values: np.ndarray = tensor.values
    return values


def scalar_value(tensor: Tensor | None) -> float | int | bool | None:
    """The value of a constant with one element, whatever its rank."""
    values = constant_value(tensor, limit=1)
    return None if values is None or values.size != 1 or values.dtype == object else values.reshape(-1)[0].item()


def static_shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    """The shape when every axis is a known number."""
    shape = None if tensor is None else tensor.shape
    if shape is None or not all(isinstance(dim, (int, np.integer)) for dim in shape):
        return None
    return tuple(int(dim) for dim in shape)


def rank(tensor: Tensor | None) -> int | None:
    """The number of axes, when it is known."""
    return None if tensor is None or tensor.shape is None else len(tensor.shape)


def numpy_dtype(tensor: Tensor | None) -> np.dtype | None:
    """The element type as NumPy's (ml_dtypes' for the small ones), when it is known."""
    dtype = None if tensor is None else tensor.dtype
    if dtype is None:
        return None
    found: np.dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(dtype) if isinstance(dtype, int) else dtype)
    return found


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Whether both shapes are known and equal on every axis, symbolic names included."""
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    return all(x is not None and x == y for x, y in zip(a.shape, b.shape, strict=True))
