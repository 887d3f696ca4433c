"""``.onnx`` files to graphs and back, losing nothing that no pass changed.

The ModelProto that was read stays as the *carrier*. Writing copies from it every node, attribute, initializer, doc
string and metadata entry that is still what it was; only what a pass made or changed is encoded anew. Weights are read
one at a time: from the carrier, or from memory-mapped external files, which must lie inside the model's folder.

A file is written to a temporary folder beside its target and renamed into place, so it appears whole or not at all.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxcompress.errors import ModelError, OutputError
from onnxcompress.graph import STANDARD_DOMAINS, Constant, Graph, Node, Scope, Tensor, Variable

logger = logging.getLogger(__name__)

PASS_KEY = "onnxcompress.pass"
PROTO_LIMIT_BYTES = (1 << 31) - (1 << 16)  # protobuf refuses messages of 2 GiB
EXTERNAL_THRESHOLD_BYTES = 1024
SMALL_MESSAGE_BYTES = 4096


class StoredValues(LazyValues):
    """A tensor of the file, read when asked for.

    Args:
        tensor: The TensorProto.
        folder: The model's folder, for external data.
    """

    def __init__(self, tensor: TensorProto, folder: Path | None) -> None:
        self.tensor = tensor
        self.folder = folder
        self.shape = tuple(tensor.dims)
        self.dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
        self.nbytes = packed_bytes(tensor.data_type, int(np.prod(self.shape, dtype=np.int64)))

    def load(self) -> np.ndarray:
        if self.tensor.data_location != TensorProto.EXTERNAL:
            return np.asarray(numpy_helper.to_array(self.tensor)).reshape(self.shape)
        data = self.external_bytes()
        if self.tensor.data_type in _PACKED_BITS:
            inline = TensorProto(data_type=self.tensor.data_type, dims=self.tensor.dims, raw_data=data.tobytes())
            return numpy_helper.to_array(inline)
        return data.view(self.dtype).reshape(self.shape)

    def external_bytes(self) -> np.ndarray:
        """The external bytes as a memory map, uint8.

        Raises:
            ModelError: The file is missing, too short, or outside the model's folder.
        """
        path, offset, length = external_location(self.tensor, self.folder)
        if length is None:
            length = self.nbytes
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ModelError(
                f"tensor {self.tensor.name!r}: external data {path} cannot be read: {error.strerror}"
            ) from error
        if length != self.nbytes or offset < 0 or offset + length > size:
            raise ModelError(
                f"tensor {self.tensor.name!r}: external data {path.name} holds {size} bytes, "
                f"and {self.nbytes} bytes are needed at offset {offset} (length given: {length})"
            )
        if length == 0:
            return np.zeros(0, np.uint8)
        return np.memmap(path, dtype=np.uint8, mode="r", offset=offset, shape=(length,))


def external_alignment(size_bytes: int) -> int:
    """Where a tensor may start in a data file: large ones on a page, small ones so that padding adds less than 1 %."""
    return 4096 if size_bytes >= 1 << 20 else 64 if size_bytes >= 1 << 13 else 1


_PACKED_BITS = {
    getattr(TensorProto, name): bits
    for name, bits in {
        **dict.fromkeys(["INT4", "UINT4", "FLOAT4E2M1"], 4),
        **dict.fromkeys(["INT2", "UINT2"], 2),
        **dict.fromkeys(["FLOAT6E2M3", "FLOAT6E3M2"], 6),
    }.items()
    if hasattr(TensorProto, name)
}


def packed_bytes(data_type: int, count: int) -> int:
    """Bytes of ``count`` elements of an ONNX type on disk; strings count as zero."""
    if data_type in _PACKED_BITS:
        return (count * _PACKED_BITS[data_type] + 7) // 8
    if data_type == TensorProto.STRING:
        return 0
    return int(np.dtype(helper.tensor_dtype_to_np_dtype(data_type)).itemsize) * count


def external_location(tensor: TensorProto, folder: Path | None) -> tuple[Path, int, int | None]:
    """Path, offset and length (bytes) of a tensor's external data.

    Raises:
        ModelError: The location is malformed or leads outside the model's folder.
    """
    entry = {pair.key: pair.value for pair in tensor.external_data}
    location = entry.get("location", "")
    if folder is None:
        raise ModelError(f"tensor {tensor.name!r} has external data, and a model given as bytes has no folder")
    base = folder.resolve()
    path = (folder / location).resolve() if location and "\0" not in location else base
    if os.path.isabs(location) or path == base or base not in path.parents:
        raise ModelError(f"tensor {tensor.name!r}: external data {location!r} lies outside the model's folder {folder}")
    try:
        return path, int(entry.get("offset", 0)), int(entry["length"]) if "length" in entry else None
    except ValueError as error:
        raise ModelError(f"tensor {tensor.name!r}: external data offset or length is not a number") from error


# -- reading ---------------------------------------------------------------------------------------------------------


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
            if any(tensor is output for output in graph.outputs):
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


# -- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Initializer:
    """One initializer on its way out: the untouched original, or a header with new bytes."""

    name: str
    constant: Constant
    proto: TensorProto | None

    @property
    def nbytes(self) -> int:
        return self.constant.nbytes

    @property
    def external(self) -> bool:
        return self.proto is not None and self.proto.data_location == TensorProto.EXTERNAL

    def header(self) -> TensorProto:
        """Name, type, shape, doc string and metadata, without data."""
        if self.proto is None:
            values = self.constant.values
            dtype = helper.np_dtype_to_tensor_dtype(values.dtype)
            return TensorProto(name=self.name, data_type=dtype, dims=values.shape)
        head = TensorProto(name=self.name, data_type=self.proto.data_type, dims=self.proto.dims)
        if self.proto.HasField("doc_string"):
            head.doc_string = self.proto.doc_string
        head.metadata_props.extend(self.proto.metadata_props)
        return head

    def data(self) -> Any:
        """The raw bytes, as bytes or as a uint8 memory map."""
        stored = self.constant.stored
        if self.external and isinstance(stored, StoredValues):
            return stored.external_bytes()
        return numpy_helper.from_array(self.constant.values).raw_data

    def inline(self) -> bytes:
        """The serialized TensorProto with its data inside."""
        if self.proto is None:
            tensor = numpy_helper.from_array(np.asarray(self.constant.values), self.name)
        elif self.external:
            tensor = self.header()
            tensor.raw_data = bytes(self.data())
        elif self.proto.name == self.name:
            tensor = self.proto
        else:
            tensor = TensorProto()
            tensor.CopyFrom(self.proto)
            tensor.name = self.name
        message: bytes = tensor.SerializeToString()
        return message


class _Writer:
    """Turns a Graph back into protobufs: the skeleton (all but initializers) and the list of initializers."""

    def __init__(self, root: Graph) -> None:
        self.root = root
        self.by_home: dict[Graph, dict[str, Constant]] = {}
        for graph in root.walk():
            for tensor in [*(t for node in graph.nodes for t in node.inputs), *graph.outputs, *graph.unread]:
                if hasattr(tensor, "_values"):
                    home = getattr(tensor, "home", None) or graph
                    self.by_home.setdefault(home, {})[tensor.name] = tensor

    def model(self) -> tuple[ModelProto, list[Initializer]]:
        carrier = self.root.model
        assert carrier is not None, "only the outermost graph is a model"
        model = ModelProto()
        _copy_fields(carrier, model, leave_out={"graph"})
        skeleton, initializers = self.graph(self.root)
        model.graph.CopyFrom(skeleton)
        for tensor in all_tensors(model):  # in attributes and functions; the outermost initializers are not in it yet
            if tensor.data_location == TensorProto.EXTERNAL:
                tensor.raw_data = StoredValues(tensor, self.root.folder).external_bytes().tobytes()
                tensor.ClearField("external_data")
                tensor.ClearField("data_location")
        return model, initializers

    def graph(self, graph: Graph) -> tuple[GraphProto, list[Initializer]]:
        carrier = graph.carrier if graph.carrier is not None else GraphProto(name=graph.name)
        proto = GraphProto()
        changing = {"node", "initializer", "value_info", "quantization_annotation", "input", "output"}
        _copy_fields(carrier, proto, leave_out=changing)
        proto.node.extend(self.node(node) for node in graph.nodes)
        constants = self.by_home.get(graph, {})
        present = {t.name for node in graph.nodes for t in node.outputs} | set(constants) | set(graph.overridable)
        present |= {t.name for t in graph.inputs if not isinstance(t, Constant)}
        listed = {t.name for t in carrier.initializer}
        ir3 = self.root.ir_version is not None and self.root.ir_version < 4
        for value in carrier.input:
            if value.name not in listed or value.name in present:
                proto.input.append(value)
        proto.output.extend(carrier.output)
        # What is said of a tensor goes with the tensor; what was said of a name that never existed stays.
        gone = graph.imported_names - present
        proto.value_info.extend(value for value in carrier.value_info if value.name not in gone)
        proto.quantization_annotation.extend(
            note for note in carrier.quantization_annotation if note.tensor_name not in gone
        )
        initializers = []
        for tensor in carrier.initializer:
            if tensor.name in graph.overridable:
                stored = Constant(tensor.name, StoredValues(tensor, self.root.folder))
                initializers.append(Initializer(tensor.name, stored, tensor))
            elif tensor.name in constants:
                initializers.append(_initializer(constants.pop(tensor.name)))
        for constant in constants.values():
            entry = _initializer(constant)
            initializers.append(entry)
            if ir3:
                head = entry.header()
                proto.input.append(helper.make_tensor_value_info(entry.name, head.data_type, list(head.dims)))
        return proto, initializers

    def node(self, node: Node) -> NodeProto:
        proto = NodeProto()
        carrier = getattr(node, "carrier", None)
        if carrier is not None:
            bodies = {attr.name for attr in carrier.attribute if attr.type in _GRAPH_KINDS}
            if bodies:
                _copy_fields(carrier, proto, leave_out={"attribute"})
            else:
                proto.CopyFrom(carrier)
        _set_names(proto.input, [t.name for t in node.inputs])
        _set_names(proto.output, [t.name for t in node.outputs])
        if proto.op_type != node.op:
            proto.op_type = node.op
        if proto.name != node.name:
            proto.name = node.name
        if proto.domain != (node.domain or ""):
            proto.domain = node.domain or ""
        self._attributes(node, proto)
        made_by = getattr(node, "made_by", "")
        if made_by:
            for entry in [entry for entry in proto.metadata_props if entry.key == PASS_KEY]:
                proto.metadata_props.remove(entry)
            proto.metadata_props.add(key=PASS_KEY, value=made_by)
        return proto

    def _attributes(self, node: Node, proto: NodeProto) -> None:
        imported = getattr(node, "imported_attrs", {})
        carrier = getattr(node, "carrier", None)
        original = {attr.name: attr for attr in carrier.attribute} if carrier is not None else {}
        unchanged = {
            name
            for name, value in node.attrs.items()
            if name in original and not _holds_graph(value) and _same(value, imported.get(name, _MISSING))
        }
        if unchanged == set(original) == set(node.attrs):
            return
        del proto.attribute[:]
        for name, value in node.attrs.items():
            proto.attribute.append(original[name] if name in unchanged else self.attribute(name, value, original))

    def attribute(self, name: str, value: Any, original: dict[str, AttributeProto]) -> AttributeProto:
        if isinstance(value, AttributeProto):
            return value
        attr = AttributeProto(name=name)
        if name in original and original[name].HasField("doc_string"):
            attr.doc_string = original[name].doc_string
        if isinstance(value, Graph):
            attr.type = AttributeProto.GRAPH
            attr.g.CopyFrom(self.whole(value))
        elif isinstance(value, list) and value and isinstance(value[0], Graph):
            attr.type = AttributeProto.GRAPHS
            attr.graphs.extend(self.whole(body) for body in value)
        elif hasattr(value, "_values"):
            attr.type = AttributeProto.TENSOR
            attr.t.CopyFrom(numpy_helper.from_array(np.asarray(value.values), value.name))
        else:
            if isinstance(value, (np.integer, np.floating)):
                value = value.item()
            made = helper.make_attribute(name, value, attr_type=AttributeProto.INTS if value == [] else None)
            if attr.HasField("doc_string"):
                made.doc_string = attr.doc_string
            return made
        return attr

    def whole(self, graph: Graph) -> GraphProto:
        """A subgraph with its initializers inside."""
        proto, initializers = self.graph(graph)
        for entry in initializers:
            if entry.external and entry.proto is not None:
                tensor = entry.header()
                tensor.raw_data = bytes(entry.data())
                proto.initializer.append(tensor)
            else:
                proto.initializer.append(TensorProto.FromString(entry.inline()))
        return proto


_GRAPH_KINDS = {AttributeProto.GRAPH, AttributeProto.GRAPHS}
_MISSING = object()


def _holds_graph(value: Any) -> bool:
    return isinstance(value, Graph) or (isinstance(value, list) and bool(value) and isinstance(value[0], Graph))


def _same(value: Any, imported: Any) -> bool:
    return value is imported or (type(value) is type(imported) and not hasattr(value, "_values") and value == imported)


def _initializer(constant: Constant) -> Initializer:
    stored = getattr(constant, "stored", None)
    return Initializer(constant.name, constant, stored.tensor if isinstance(stored, StoredValues) else None)


def _set_names(field: Any, names: list[str]) -> None:
    if list(field) != names:
        del field[:]
        field.extend(names)


def _copy_fields(source: Any, target: Any, *, leave_out: set[str]) -> None:
    for field, value in source.ListFields():
        if field.name in leave_out:
            continue
        if hasattr(value, "CopyFrom"):
            getattr(target, field.name).CopyFrom(value)
        elif isinstance(value, (str, bytes, int, float)):
            setattr(target, field.name, value)
        else:
            getattr(target, field.name).extend(value)


def to_proto(graph: Graph, *, weights: bool = True) -> ModelProto:
    """The graph as a ModelProto. Without ``weights``, initializers of more than 1,024 elements become inputs.

    The form without weights is small and can be checked and shape-inferred in a moment, whatever the model's size.
    """
    model, initializers = _Writer(graph).model()
    for entry in initializers:
        if weights or int(np.prod(entry.constant.shape, dtype=np.int64)) <= 1024:
            model.graph.initializer.append(TensorProto.FromString(entry.inline()))
        elif entry.name not in {value.name for value in model.graph.input}:
            head = entry.header()
            model.graph.input.append(helper.make_tensor_value_info(entry.name, head.data_type, list(head.dims)))
    return model


# Wire format, https://protobuf.dev/programming-guides/encoding: tag = field number << 3 | 2 for length-delimited.
_GRAPH_TAG = bytes([ModelProto.DESCRIPTOR.fields_by_name["graph"].number << 3 | 2])
_INITIALIZER_TAG = bytes([GraphProto.DESCRIPTOR.fields_by_name["initializer"].number << 3 | 2])


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def check_replaceable(target: Path, sources: Collection[Path] = ()) -> None:
    """Refuse a target that renaming a file over it would destroy.

    Args:
        target: Where a file is to be written.
        sources: Data files of the input.

    Raises:
        OutputError: The target is a folder, a device, a pipe, or a file where the input keeps its weights.
    """
    if target.is_dir():
        raise OutputError(f"cannot write {target}: it is a folder")
    # /dev/stdout leads to a file of any kind by way of /proc, and the link itself would be replaced.
    through_proc = target.is_symlink() and os.readlink(target).startswith("/proc/")
    if through_proc or (target.exists() and not target.is_file()):
        raise OutputError(f"cannot write {target}: it is a device or a pipe, and would be replaced by a file")
    if target.resolve() in sources:
        raise OutputError(f"cannot write {target}: the input keeps its weights in it")


class StagedFile:
    """A model written in full beside its target, not yet visible under its name.

    Used as a context manager: leaving it without ``commit`` removes everything that was written.
    """

    def __init__(self, graph: Graph, target: str | os.PathLike[str]) -> None:
        self.target = Path(target)
        self.committed = False
        assert graph.model is not None, "only the outermost graph is a model"
        self.sources = set(external_files(graph.model, graph.folder))
        check_replaceable(self.target, self.sources)
        try:
            self.folder = Path(tempfile.mkdtemp(prefix=".onnxcompress-", dir=self.target.parent or "."))
        except OSError as error:
            raise OutputError(f"cannot write into {self.target.parent}: {error.strerror}") from error
        self.path = self.folder / self.target.name
        self.data_path: Path | None = None
        try:
            self._write(graph)
        except OSError as error:
            self.discard()
            raise OutputError(f"cannot write {self.target}: {error.strerror or error}") from error
        except BaseException:
            self.discard()
            raise

    def _write(self, graph: Graph) -> None:
        model, initializers = _Writer(graph).model()
        names = {entry.proto is not None and entry.external for entry in initializers}
        inline_bytes = sum(entry.nbytes for entry in initializers if not entry.external)
        external = True in names or inline_bytes > PROTO_LIMIT_BYTES
        data_file: IO[bytes] | None = None
        data_name = self._data_name() if external else ""
        skeleton = model.graph.SerializeToString()
        model.ClearField("graph")
        length = 0
        try:
            if external:
                self.data_path = self.folder / data_name
                data_file = open(self.data_path, "wb")  # noqa: SIM115  # closed below, with the model half-written
            # The length stands before the content, so every message is made once to be measured; only small ones stay.
            heads: list[bytes] = []
            kept: list[bytes | None] = []
            for entry in initializers:
                if data_file is not None and self._goes_external(entry, inline_bytes):
                    message = _write_external(entry, data_file, data_name).SerializeToString()
                else:
                    message = entry.inline()
                heads.append(_INITIALIZER_TAG + _varint(len(message)))
                kept.append(message if len(message) <= SMALL_MESSAGE_BYTES else None)
                length += len(heads[-1]) + len(message)
            with open(self.path, "wb") as out:
                out.write(model.SerializeToString())
                out.write(_GRAPH_TAG + _varint(len(skeleton) + length))
                out.write(skeleton)
                for entry, head, small in zip(initializers, heads, kept, strict=True):
                    out.write(head)
                    out.write(entry.inline() if small is None else small)
                out.flush()
                os.fsync(out.fileno())
        finally:
            if data_file is not None:
                data_file.close()

    @staticmethod
    def _goes_external(entry: Initializer, inline_bytes: int) -> bool:
        if entry.external:
            return True
        if entry.constant.dtype == object or entry.nbytes < EXTERNAL_THRESHOLD_BYTES:
            return False
        return entry.proto is None or inline_bytes > PROTO_LIMIT_BYTES

    def _data_name(self) -> str:
        """Name of the data file: never that of a file which the input itself reads."""
        name, n = f"{self.target.name}.data", 0
        while (self.target.parent / name).resolve() in self.sources:
            n += 1
            name = f"{self.target.name}.{n}.data"
        return name

    @property
    def size_bytes(self) -> int:
        """Bytes of the model file and its data file."""
        return self.path.stat().st_size + (self.data_path.stat().st_size if self.data_path is not None else 0)

    def commit(self) -> None:
        """Rename into place, the data file first.

        Raises:
            OutputError: The target cannot be replaced.
        """
        try:
            check_replaceable(self.target, self.sources)
            if self.data_path is not None:
                os.replace(self.data_path, self.target.parent / self.data_path.name)
            os.replace(self.path, self.target)
            self.committed = True
        except OSError as error:
            raise OutputError(f"cannot write {self.target}: {error.strerror}") from error
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove the temporary folder and what is left in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> StagedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def _write_external(entry: Initializer, data_file: IO[bytes], data_name: str) -> TensorProto:
    """Append an initializer's bytes to the data file; returns the TensorProto that points at them."""
    position = data_file.tell()
    data = entry.data()
    padding = -position % external_alignment(len(data))
    data_file.write(b"\0" * padding)
    for start in range(0, len(data), 1 << 24):
        data_file.write(data[start : start + (1 << 24)])
    head = entry.header()
    head.data_location = TensorProto.EXTERNAL
    for key, value in (("location", data_name), ("offset", position + padding), ("length", len(data))):
        head.external_data.add(key=key, value=str(value))
    return head


def save(graph: Graph, path: str | os.PathLike[str]) -> int:
    """Write a graph to ``path``, whole or not at all.

    Returns:
        Bytes written, external data included.

    Raises:
        OutputError: The folder is missing or read-only, or the disk is full.
    """
    with StagedFile(graph, path) as staged:
        size = staged.size_bytes
        staged.commit()
    return size


def all_tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """Initializers and tensors in attributes, those of subgraphs and functions included."""
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for attr in (attr for node in nodes for attr in node.attribute):
        if attr.type == AttributeProto.TENSOR:
            yield attr.t
        yield from attr.tensors
        if attr.type == AttributeProto.GRAPH:
            yield from _graph_tensors(attr.g)
        for body in attr.graphs:
            yield from _graph_tensors(body)


def external_files(proto: ModelProto, folder: Path | None) -> Iterator[Path]:
    """Data files that a model reads, each once.

    Raises:
        ModelError: A location is malformed or leads outside the model's folder.
    """
    seen = set()
    for tensor in all_tensors(proto):
        if tensor.data_location == TensorProto.EXTERNAL:
            path = external_location(tensor, folder)[0]
            if path not in seen:
                seen.add(path)
                yield path
