"""Names in a model's protos: who reads which value, and what is known of it, through subgraphs and local functions.

Read only, and on the protos alone: this is how checks look at a model. Passes work on ``onnxcompress.graph``.
"""

from __future__ import annotations

import logging

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

logger = logging.getLogger(__name__)

Dim = int | str | None
Dims = tuple[Dim, ...]

SMALL_ELEMENTS = 1024  # Constants above this are weights, not numbers that steer shapes or comparisons.
_SAME_SHAPE = {"Cast", "Identity", "DequantizeLinear", "QuantizeLinear", "Relu", "Neg", "Abs", "Sigmoid", "Tanh"}


def attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute, or its default."""
    return next((int(attr.i) for attr in node.attribute if attr.name == name), default)


class Scope:
    """One graph, branch, loop body or function call: who reads which name, and what is known of it."""

    def __init__(
        self,
        model: Model,
        body: GraphProto | FunctionProto,
        parent: Scope | None = None,
        owner: tuple[NodeProto, Scope] | None = None,
    ) -> None:
        self.model, self.parent, self.owner = model, parent, owner
        self.nodes = list(body.node)  # kept: id(node) is a key, and protobuf makes a new wrapper for a forgotten one
        self.inputs = [v if isinstance(v, str) else v.name for v in body.input]
        self.outputs = [v if isinstance(v, str) else v.name for v in body.output]
        self.producers: dict[str, NodeProto] = {name: node for node in self.nodes for name in node.output if name}
        self.tensors: dict[str, TensorProto] = {}
        self.dims_of: dict[str, Dims] = {}
        self.aliases: dict[str, tuple[Scope, str]] = {}  # an inner input: what it is called outside
        self.uses: dict[str, list[tuple[NodeProto, int, Scope]]] = {}
        self.calls: dict[int, Scope] = {}
        self.bodies: dict[int, list[Scope]] = {}
        if isinstance(body, GraphProto):
            self.tensors = {tensor.name: tensor for tensor in body.initializer}
        for value in (
            body.value_info if isinstance(body, FunctionProto) else [*body.value_info, *body.input, *body.output]
        ):
            dims = value_dims(value.type)
            if dims is not None:
                self.dims_of[value.name] = dims
        self.names = {*self.inputs, *self.tensors, *self.producers}
        for node in self.nodes:
            self._add(node)

    def _add(self, node: NodeProto) -> None:
        for index, name in enumerate(node.input):
            if name:
                self._home(name).uses.setdefault(name, []).append((node, index, self))
        graphs = [graph for attr in node.attribute for graph in ([attr.g] if attr.HasField("g") else attr.graphs)]
        for graph in graphs:
            inner = Scope(self.model, graph, self, (node, self))
            self.bodies.setdefault(id(node), []).append(inner)
            # A Scan body sees its scanned inputs with one axis less, so only the states are the same values.
            same = {"Loop": len(node.input), "Scan": len(node.input) - attribute(node, "num_scan_inputs", 0)}
            pairs = zip(inner.inputs, node.input[: same.get(node.op_type, 0)], strict=False)
            inner.aliases = {formal: (self, actual) for formal, actual in pairs if actual}

    def _home(self, name: str) -> Scope:
        scope: Scope | None = self
        while scope is not None and name not in scope.names:
            scope = scope.parent
        return scope or self

    def call(self, node: NodeProto, function: FunctionProto) -> Scope:
        """The scope of one function call, made when first needed."""
        if id(node) not in self.calls:
            inner = Scope(self.model, function, None, (node, self))
            pairs = zip(inner.inputs, node.input, strict=False)
            inner.aliases = {formal: (self, actual) for formal, actual in pairs if actual}
            self.calls[id(node)] = inner
        return self.calls[id(node)]

    def constant(self, name: str) -> np.ndarray | None:
        """The value of a small constant, as a NumPy array."""
        home = self._home(name)
        if name in home.aliases:
            scope, outer = home.aliases[name]
            return scope.constant(outer)
        tensor = home.tensors.get(name)
        node = home.producers.get(name)
        if tensor is None and node is not None and node.op_type == "Constant" and node.attribute:
            return _constant_value(node.attribute[0])
        return None if tensor is None else _small(tensor)

    def dims(self, name: str, depth: int = 0) -> Dims | None:
        """The shape of a value: declared, of a constant, kept by the node that makes it, or inferred."""
        home = self._home(name)
        if name in home.tensors:
            return tuple(home.tensors[name].dims)
        if name in home.aliases:
            scope, outer = home.aliases[name]
            return scope.dims(outer, depth + 1)
        known = home.dims_of.get(name)
        if known is not None and all(dim is not None for dim in known):
            return known
        node = home.producers.get(name)
        if node is not None and node.op_type == "Constant" and node.attribute:
            return _constant_dims(node.attribute[0])
        if node is not None and depth < 8 and node.input and node.op_type in _SAME_SHAPE:
            return home.dims(node.input[0], depth + 1) or known
        return known or (self.model.inferred().get(name) if home.owner is None else None)


def value_dims(value: onnx.TypeProto) -> Dims | None:
    """The dimensions of a tensor type: sizes, names, or None where neither is given; None without a shape."""
    kind = value.WhichOneof("value")
    if kind not in ("tensor_type", "sparse_tensor_type") or not getattr(value, kind).HasField("shape"):
        return None
    dims: list[Dim] = []
    for dim in getattr(value, kind).shape.dim:
        if dim.HasField("dim_value") and dim.dim_value >= 0:
            dims.append(int(dim.dim_value))
        else:
            dims.append(dim.dim_param or None)
    return tuple(dims)


def _small(tensor: TensorProto) -> np.ndarray | None:
    if tensor.data_location == TensorProto.EXTERNAL or np.prod(tensor.dims, dtype=np.float64) > SMALL_ELEMENTS:
        return None
    if tensor.data_type == TensorProto.STRING:
        return None
    try:
        return numpy_helper.to_array(tensor)
    except (ValueError, TypeError):
        return None  # malformed: the checker names it, here it is only not known


def _constant_value(attr: AttributeProto) -> np.ndarray | None:
    if attr.name == "value":
        return _small(attr.t)
    if attr.name in ("value_int", "value_ints", "value_float", "value_floats"):
        return np.asarray(onnx.helper.get_attribute_value(attr))
    return None


def _constant_dims(attr: AttributeProto) -> Dims | None:
    if attr.name == "value":
        return tuple(attr.t.dims)
    value = _constant_value(attr)
    return None if value is None else value.shape


class Model:
    """The model's functions, and shapes inferred the first time that one is asked for."""

    def __init__(self, model: ModelProto) -> None:
        self.proto = model
        self.functions = {(f.domain, f.name): f for f in model.functions}
        self._inferred: dict[str, Dims] | None = None

    def inferred(self) -> dict[str, Dims]:
        if self._inferred is None:
            self._inferred = {}
            try:
                inferred = onnx.shape_inference.infer_shapes(_without_weights(self.proto))
            except (ValueError, RuntimeError, onnx.shape_inference.InferenceError) as error:
                logger.debug("no inferred shapes: %s", error)  # then unknown limits are read as 2
            else:
                pairs = ((value.name, value_dims(value.type)) for value in inferred.graph.value_info)
                self._inferred = {name: dims for name, dims in pairs if dims is not None}
        return self._inferred


def _without_weights(model: ModelProto) -> ModelProto:
    """A copy for shape inference in which large initializers are inputs: no weight is copied."""
    light = ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    graph = light.graph
    graph.name = model.graph.name or "g"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    graph.value_info.extend(model.graph.value_info)
    declared = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL and tensor.ByteSize() <= 8 * SMALL_ELEMENTS:
            graph.initializer.append(tensor)
        elif tensor.name not in declared:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return light
