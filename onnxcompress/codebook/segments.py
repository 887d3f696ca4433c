"""The graph cut where its layers read, so that each piece runs once on what the pieces before it left.

A node belongs to the first segment in which all that it reads is known. What a layer's node makes is known only after
the layer's stage, because then its weight is quantized: segment s runs, stage s quantizes the layers whose inputs are
there, segment s + 1 begins with the nodes of these layers. All segments together are one forward pass.

A node that depends on constants alone belongs to no segment; it is repeated in each that needs it. Bodies of control
flow are not cut.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from onnxcompress.codebook.layers import Layer
from onnxcompress.codebook.skips import find_skip
from onnxcompress.codebook.views import static_nodes
from onnxcompress.errors import QuantizationError
from onnxcompress.graph import Constant, Graph, Node, Tensor, bodies
from onnxcompress.model_io.stored import StoredValues
from onnxcompress.model_io.writing import Initializer, Writer

MAX_CUTS = 8  # only a weight with several readers needs more than one


@dataclass(eq=False)
class Operation:
    """A node as it stood when the calibration began.

    Attributes:
        proto: Its NodeProto, with the graphs that it holds.
        captured: Names of what the graphs in it read from around them.
        writes: Names of what it makes.
        origin: The node.
        is_probe: It runs a recurrence before its weights are quantized, for the hidden states of all steps.
        segment: Where it runs.
    """

    proto: NodeProto
    captured: tuple[str, ...]
    writes: tuple[str, ...]
    origin: Node
    is_probe: bool = False
    segment: int = 0

    @property
    def reads(self) -> list[str]:
        return [*self.proto.input, *self.captured]


@dataclass
class Replacements:
    """What nodes of the quantized net read instead: inputs by node and slot, and rows added to outputs."""

    inputs: dict[Node, dict[int, np.ndarray]] = field(default_factory=dict)
    added: dict[Node, np.ndarray] = field(default_factory=dict)

    def __contains__(self, node: Node) -> bool:
        return node in self.inputs or node in self.added

    def replace(self, layer: Layer, matrix: np.ndarray, bias: np.ndarray | None) -> None:
        """Let the readers of a layer use a decoded weight (outputs, D), and a bias (outputs,) where one is given."""
        for use in layer.uses:
            tensor = use.view.from_matrix(matrix).astype(use.origin.dtype)
            self.inputs.setdefault(use.node, {})[use.slot] = tensor
        if bias is None:
            return
        place = layer.uses[0].bias
        if place is None or not layer.has_bias:
            raise QuantizationError(f"{layer.name!r} has no place for a bias; quantize it with correct_bias=False")
        dtype = layer.uses[0].origin.dtype if place.origin is None else place.origin.dtype
        if place.new_add:
            self.added[place.node] = bias.astype(dtype)
        else:
            slots = self.inputs.setdefault(place.node, {})
            slots[place.slot] = place.with_part(bias, slots.get(place.slot)).astype(dtype)


class Network:
    """The nodes of a graph in segments, and models of some of them.

    Args:
        graph: The outermost graph; later changes to it are not seen.
        layers: What is to be quantized.
        inputs: Names of the graph inputs that the samples hold.
    """

    def __init__(self, graph: Graph, layers: Sequence[Layer], inputs: Collection[str]) -> None:
        self._graph = graph
        self._model = _without_graph(graph)
        self._constants = _constants(graph, inputs)
        self._static: dict[str, Operation] = {}
        self.operations: list[Operation] = []
        self.inputs = list(inputs)
        self.layers = [layer for layer in layers if not layer.in_body]
        rows = {name for layer in self.layers for use in layer.uses for name in use.rows.tensors}
        self._read_nodes(rows)
        self.stages = self._cut()
        self.skips = self._find_skips()
        self.needed_until = self._lifetimes()

    def constant(self, name: str) -> np.ndarray | None:
        """The value of an initializer of the outermost graph; None where there is none of this name."""
        entry = self._constants.get(name)
        return None if entry is None else entry.constant.values

    def segment(self, number: int) -> list[Operation]:
        return [operation for operation in self.operations if operation.segment == number]

    def model(
        self,
        operations: Sequence[Operation],
        given: Mapping[str, Any],
        outputs: Sequence[str],
        replacements: Replacements | None = None,
    ) -> bytes:
        """A model of some operations in order.

        Args:
            operations: They read constants, each other's outputs and ``given``.
            given: Inputs with a sample of each, for its type.
            outputs: Names of what it returns.
            replacements: Weights other than the graph's.
        """
        proto = ModelProto()
        proto.CopyFrom(self._model)
        body = proto.graph
        body.name = "segment"
        needed: list[str] = []
        for operation in operations:
            nodes = _replaced(operation, replacements, body)
            body.node.extend(nodes)
            needed += [*(name for node in nodes for name in node.input), *operation.captured]
        made = {*given, *(name for node in body.node for name in node.output), *(t.name for t in body.initializer)}
        body.input.extend(_declared(name, value) for name, value in given.items())
        body.output.extend(ValueInfoProto(name=name) for name in outputs)
        self._add_static(body, [name for name in needed if name and name not in made])
        data: bytes = proto.SerializeToString()
        return data

    # -- reading -----------------------------------------------------------------------------------------------------

    def _read_nodes(self, rows: set[str]) -> None:
        writer, static = Writer(self._graph), static_nodes(self._graph)
        names = {tensor.name for node in self._graph.nodes for tensor in node.outputs}
        names |= set(self._constants) | {tensor.name for tensor in self._graph.inputs}
        hidden = {
            use.node: use.rows.tensor for layer in self.layers for use in layer.uses if use.rows.form == "hidden states"
        }
        for node in self._graph.nodes:
            captured = tuple(name for name in _captured(node) if name in names)
            writes = tuple(tensor.name for tensor in node.outputs if not tensor.is_empty())
            operation = Operation(writer.node(node), captured, writes, node)
            if node in static and not rows.intersection(writes):
                self._static.update(dict.fromkeys(writes, operation))
                continue
            if node in hidden:
                probe = NodeProto()
                probe.CopyFrom(operation.proto)
                probe.output[:] = [hidden[node]]
                self.operations.append(Operation(probe, captured, (hidden[node],), node, is_probe=True))
            self.operations.append(operation)

    def _cut(self) -> list[list[Layer]]:
        """Give every operation its segment; returns the layers of each stage.

        A layer waits for the input of its last reader; those whose inputs were known before run with what stood there.
        """
        barriers = {layer.uses[-1].node for layer in self.layers}
        for _ in range(MAX_CUTS):
            starts = self._number(barriers)
            stage_of = {layer: max(starts[use.node] for use in layer.uses) for layer in self.layers}
            late = {use.node for layer in self.layers for use in layer.uses if starts[use.node] == stage_of[layer]}
            if late == barriers:
                break
            barriers = late
        stages: list[list[Layer]] = [[] for _ in range(max(stage_of.values(), default=-1) + 1)]
        for layer, number in stage_of.items():
            stages[number].append(layer)
        return stages

    def _number(self, barriers: Collection[Node]) -> dict[Node, int]:
        """Number the segments, where these nodes wait for their weights; returns when each node's inputs are known."""
        known = dict.fromkeys(self.inputs, 0)
        starts: dict[Node, int] = {}
        for operation in self.operations:
            operation.segment = max((known.get(name, 0) for name in operation.reads), default=0)
            starts[operation.origin] = operation.segment
            if operation.origin in barriers and not operation.is_probe:
                operation.segment += 1
            known.update(dict.fromkeys(operation.writes, operation.segment))
        return starts

    def _find_skips(self) -> dict[Layer, str]:
        """What the output of a layer is added to, where it is known by the layer's stage."""
        known = dict.fromkeys(self.inputs, 0)
        known.update((name, operation.segment) for operation in self.operations for name in operation.writes)
        found: dict[Layer, str] = {}
        for number, layers in enumerate(self.stages):
            for layer in layers:
                skip = find_skip(self._graph, layer)
                if skip is not None and known.get(skip.name, number + 1) <= number:
                    found[layer] = skip.name
        return found

    def read_by(self, layers: Iterable[Layer]) -> set[str]:
        """Names of the tensors that statistics of these layers are taken of."""
        rows = {name for layer in layers for use in layer.uses for name in use.rows.tensors}
        return rows | {self.skips[layer] for layer in layers if layer in self.skips}

    def _lifetimes(self) -> dict[str, int]:
        """The last segment or stage that reads each tensor."""
        until: dict[str, int] = {}
        for operation in self.operations:
            for name in operation.reads:
                until[name] = max(until.get(name, 0), operation.segment)
        for number, layers in enumerate(self.stages):
            for name in self.read_by(layers):
                until[name] = max(until.get(name, 0), number)
        return until

    def _add_static(self, body: GraphProto, names: Iterable[str]) -> None:
        """Put the initializers of these names, and the nodes that make them of constants, in front."""
        nodes: list[NodeProto] = []
        seen: set[str] = set()
        stack = [(name, False) for name in reversed(list(dict.fromkeys(names)))]
        while stack:
            name, done = stack.pop()
            operation = self._static.get(name)
            if done and operation is not None:
                nodes.append(operation.proto)
            elif name not in seen and name in self._constants:
                seen.add(name)
                body.initializer.append(TensorProto.FromString(self._constants[name].inline()))
            elif operation is not None and seen.isdisjoint(operation.writes):
                seen.update(operation.writes)
                stack.append((name, True))
                stack += [(read, False) for read in operation.reads if read]
        kept = list(body.node)
        del body.node[:]
        body.node.extend([*nodes, *kept])


def prune(operations: Sequence[Operation], outputs: Collection[str]) -> list[Operation]:
    """Those of the operations, in order, that the outputs depend on."""
    needed = set(outputs)
    kept = []
    for operation in reversed(operations):
        if needed.intersection(operation.writes):
            needed.update(operation.reads)
            kept.append(operation)
    return kept[::-1]


def _without_graph(graph: Graph) -> ModelProto:
    carrier = graph.model
    assert carrier is not None, "only the outermost graph is a model"
    model = ModelProto(ir_version=carrier.ir_version)
    model.opset_import.extend(carrier.opset_import)
    model.functions.extend(carrier.functions)
    # Before IR 4 every initializer must be an input as well; nothing else changes for a model that runs.
    model.ir_version = max(model.ir_version, 4)
    return model


def _constants(graph: Graph, inputs: Collection[str]) -> dict[str, Initializer]:
    """The initializers of the outermost graph, those that the caller leaves at their default included."""
    found: dict[str, Initializer] = {}
    for name, proto in graph.overridable.items():
        if name not in inputs:
            found[name] = Initializer(name, Constant(name, StoredValues(proto, graph.folder)), proto)
    for inner in graph.walk():
        for tensor in [*(t for node in inner.nodes for t in node.inputs), *inner.outputs]:
            if isinstance(tensor, Constant) and (tensor.home or inner) is graph:
                stored = tensor.stored
                original = stored.tensor if isinstance(stored, StoredValues) else None
                found[tensor.name] = Initializer(tensor.name, tensor, original)
    return found


def _captured(node: Node) -> list[str]:
    """Names that the graphs in a node read, their own among them."""
    tensors: list[Tensor] = []
    for body in bodies(node):
        for inner in body.walk():
            tensors += [tensor for nested in inner.nodes for tensor in nested.inputs]
            tensors += list(inner.outputs)
    return list(dict.fromkeys(tensor.name for tensor in tensors))


def _replaced(operation: Operation, replacements: Replacements | None, body: GraphProto) -> list[NodeProto]:
    """The nodes of an operation with other weights, which become initializers of ``body``."""
    node = operation.origin
    if replacements is None or node not in replacements:
        return [operation.proto]
    proto = NodeProto()
    proto.CopyFrom(operation.proto)
    label = f"onnxcompress/{len(body.node)}"
    for slot, array in replacements.inputs.get(node, {}).items():
        while len(proto.input) <= slot:
            proto.input.append("")
        proto.input[slot] = f"{label}/{slot}"
        body.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), proto.input[slot]))
    if node not in replacements.added:
        return [proto]
    total, proto.output[0] = proto.output[0], f"{label}/product"
    body.initializer.append(numpy_helper.from_array(replacements.added[node], f"{label}/bias"))
    return [proto, helper.make_node("Add", [proto.output[0], f"{label}/bias"], [total])]


def _declared(name: str, value: Any) -> ValueInfoProto:
    """The type of an input, of unknown shape."""
    if isinstance(value, np.ndarray):
        return helper.make_tensor_value_info(name, _element_type(value), None)
    if isinstance(value, list) and all(isinstance(item, np.ndarray) for item in value):
        kind = _element_type(value[0]) if value else TensorProto.FLOAT
        return helper.make_tensor_sequence_value_info(name, kind, None)
    raise QuantizationError(
        f"the model cannot be cut at {name!r}, which is a {type(value).__name__}; use --data none for it"
    )


def _element_type(array: np.ndarray) -> int:
    kind = TensorProto.STRING if array.dtype.kind in "OUS" else helper.np_dtype_to_tensor_dtype(array.dtype)
    return int(kind)
