"""A ModelProto to a graph, with damage named."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from onnxcompress.errors import ModelError
from onnxcompress.graph import STANDARD_DOMAINS, Constant, Graph, Node, Scope, Tensor, Variable
from onnxcompress.model_io.stored import StoredValues, packed_bytes


def read_proto(path: str | os.PathLike[str]) -> ModelProto:
    """Parse a model file without its external data.

    Raises:
        ModelError: The file is missing, unreadable, empty, or not an ONNX model.
    """
    path = Path(path)
    try:
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            raise ModelError(f"{path} is a folder, not an ONNX model")
        if not stat.S_ISREG(kind):  # a pipe can be read once only, and /dev/zero has no end
            raise ModelError(f"{path} is a pipe or a device, not a file; save the model to a file first")
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    return parse_proto(data, str(path))


def parse_proto(data: bytes, label: str) -> ModelProto:
    """Parse model bytes; ``label`` names them in the error."""
    if not data:
        raise ModelError(f"{label} is empty, not an ONNX model")
    try:
        proto: ModelProto = ModelProto.FromString(data)
    except (DecodeError, RuntimeError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{label} is not an ONNX model, or it is damaged: {len(data)} bytes could not be parsed"
        ) from error
    if not proto.HasField("graph") or proto.ir_version == 0 or not proto.opset_import:
        missing = "graph" if not proto.HasField("graph") else "IR version" if proto.ir_version == 0 else "opset"
        raise ModelError(f"{label} is not an ONNX model, or it is truncated: it has no {missing}")
    return proto


def load(model: str | os.PathLike[str] | ModelProto | bytes, *, folder: Path | None = None) -> Graph:
    """Read a model into a graph; weights stay where they are until they are asked for.

    Args:
        model: Path, parsed ModelProto (it becomes the carrier and must not be changed by the caller), or bytes.
        folder: Where external data of a ModelProto or bytes lies; for a path it is the path's folder.

    Raises:
        ModelError: The file is missing, damaged, or names tensors that nothing defines.
    """
    if isinstance(model, ModelProto):
        proto = model
    elif isinstance(model, bytes):
        proto = parse_proto(model, "the given bytes")
    else:
        proto, folder = read_proto(model), Path(model).parent
    return _Reader(proto, folder).read()


class _Reader:
    """Turns one ModelProto into a Graph."""

    def __init__(self, proto: ModelProto, folder: Path | None) -> None:
        self.proto = proto
        self.folder = folder
        self.scope = Scope()
        versions = [entry.version for entry in proto.opset_import if entry.domain in STANDARD_DOMAINS]
        self.opset = versions[0] if versions else 1

    def read(self) -> Graph:
        graph = self.graph(self.proto.graph, None, {})
        graph.model = self.proto
        graph.import_domains = list(self.proto.opset_import)
        graph.ir_version = self.proto.ir_version
        graph.producer_name = self.proto.producer_name
        graph.folder = self.folder
        return graph

    def graph(self, proto: GraphProto, outer: Graph | None, outer_tensors: dict[str, Tensor]) -> Graph:
        check_names(proto)
        graph = Graph(name=proto.name, opset=self.opset, scope=self.scope, outer=outer)
        graph.carrier = proto
        tensors = dict(outer_tensors)
        local = self._declare(graph, proto)
        tensors.update(local)
        for node_proto in proto.node:
            graph.nodes.append(self.node(node_proto, graph, tensors, local))
        graph.inputs = [local[value.name] for value in proto.input]
        for value in proto.output:
            tensor = tensors.get(value.name)
            if tensor is None:
                raise ModelError(f"graph {proto.name!r}: no node makes its output {value.name!r}; the model is damaged")
            if value.name not in local:
                self.scope.pinned.add(tensor)
            if outer is None and any(tensor is output for output in graph.outputs):
                raise ModelError(f"graph {proto.name!r} lists its output {value.name!r} twice")
            graph.outputs.append(tensor)
        graph.unread = [
            t for t in local.values() if isinstance(t, Constant) and not t.outputs and not graph.is_output(t)
        ]
        return graph

    def _declare(self, graph: Graph, proto: GraphProto) -> dict[str, Tensor]:
        """Inputs, initializers and node outputs of one graph by name, before any node is read."""
        local: dict[str, Tensor] = {}
        inputs = {value.name: value for value in proto.input}
        # Up to IR 3 every initializer is listed as an input and none can be overridden.
        overridable = self.proto.ir_version >= 4
        for tensor in proto.initializer:
            if tensor.name in local:
                raise ModelError(f"graph {proto.name!r} defines initializer {tensor.name!r} twice")
            if tensor.name in inputs and overridable:
                graph.overridable[tensor.name] = tensor
                continue
            check_tensor(tensor)
            local[tensor.name] = Constant(tensor.name, StoredValues(tensor, self.folder), home=graph)
        for value in proto.input:
            if value.name not in local:
                local[value.name] = variable_of(value)
        for sparse in proto.sparse_initializer:
            local.setdefault(sparse.values.name, Variable(sparse.values.name))
        for node in proto.node:
            for name in node.output:
                if not name:
                    continue
                if name in local:
                    raise ModelError(f"graph {proto.name!r} defines tensor {name!r} twice; the model is damaged")
                local[name] = Variable(name)
        self.scope.names.update(local)
        graph.imported_names = set(local)
        return local

    def node(self, proto: NodeProto, graph: Graph, tensors: dict[str, Tensor], local: dict[str, Tensor]) -> Node:
        inputs = []
        for name in proto.input:
            if name and name not in tensors:
                raise ModelError(f"node {proto.name or proto.op_type!r} reads {name!r}, which nothing defines")
            inputs.append(tensors[name] if name else Variable.empty())
        outputs = [local[name] if name else Variable.empty() for name in proto.output]
        attrs = {attr.name: self.attribute(attr, graph, tensors) for attr in proto.attribute}
        node = Node(proto.op_type, proto.name, attrs, inputs, outputs, proto.domain or None)
        node.carrier = proto
        node.imported_attrs = {k: list(v) if isinstance(v, list) else v for k, v in attrs.items()}
        self.scope.names.add(proto.name)
        return node

    def attribute(self, attr: AttributeProto, graph: Graph, tensors: dict[str, Tensor]) -> Any:
        """The Python value of an attribute; kinds that no pass reads stay the AttributeProto itself."""
        kind = attr.type
        if attr.ref_attr_name:
            return attr
        if kind == AttributeProto.FLOAT:
            return attr.f
        if kind == AttributeProto.INT:
            return attr.i
        if kind == AttributeProto.STRING:
            return _text(attr.s)
        if kind == AttributeProto.FLOATS:
            return list(attr.floats)
        if kind == AttributeProto.INTS:
            return list(attr.ints)
        if kind == AttributeProto.STRINGS:
            return [_text(item) for item in attr.strings]
        if kind == AttributeProto.TENSOR:
            check_tensor(attr.t)
            return Constant(attr.t.name, StoredValues(attr.t, self.folder))
        if kind == AttributeProto.GRAPH:
            return self.graph(attr.g, graph, tensors)
        if kind == AttributeProto.GRAPHS:
            return [self.graph(body, graph, tensors) for body in attr.graphs]
        return attr


def check_names(proto: GraphProto) -> None:
    """Refuse names that are not UTF-8: protobuf gives them as bytes, and nothing could write them in a report.

    Raises:
        ModelError: Such a name.
    """
    names = [proto.name, *(value.name for values in (proto.input, proto.output, proto.value_info) for value in values)]
    names += [tensor.name for tensor in proto.initializer]
    for node in proto.node:
        names += [node.name, node.op_type, node.domain, *node.input, *node.output]
        names += [attr.name for attr in node.attribute]
    for name in names:
        if not isinstance(name, str):
            raise ModelError(f"the name {name!r} is not UTF-8 text; the model is damaged")


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


def check_tensor(tensor: TensorProto) -> None:
    """Refuse a tensor whose data do not fill its shape.

    Raises:
        ModelError: Unknown element type, negative dimension, or a wrong number of bytes.
    """
    count = 1
    for dim in tensor.dims:
        if dim < 0:
            raise ModelError(f"tensor {tensor.name!r} has a negative dimension: {list(tensor.dims)}")
        count *= dim
    try:
        helper.tensor_dtype_to_np_dtype(tensor.data_type)
    except (KeyError, ValueError) as error:
        raise ModelError(f"tensor {tensor.name!r} has an unknown element type: {tensor.data_type}") from error
    if tensor.data_location == TensorProto.EXTERNAL:
        return
    if tensor.HasField("raw_data"):
        # ByteSize of a copy would copy the bytes; len(raw_data) copies once and frees at once.
        have, need = len(tensor.raw_data), packed_bytes(tensor.data_type, count)
        if have != need:
            raise ModelError(f"tensor {tensor.name!r} holds {have} bytes, its shape {list(tensor.dims)} needs {need}")


def variable_of(value: onnx.ValueInfoProto) -> Variable:
    """The Variable of a declared input or output; dtype and shape where it declares a tensor."""
    tensor = Variable(value.name)
    if value.type.HasField("tensor_type"):
        kind = value.type.tensor_type
        if kind.elem_type:
            tensor.dtype = element_dtype(kind.elem_type)
        if kind.HasField("shape"):
            tensor.shape = [
                dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in kind.shape.dim
            ]
    return tensor


def element_dtype(elem_type: int) -> np.dtype | None:
    """NumPy type of an ONNX element type, None when there is none."""
    try:
        return np.dtype(helper.tensor_dtype_to_np_dtype(elem_type))
    except (KeyError, ValueError):
        return None
