"""A graph back to protobufs: all that no pass changed is copied from the carrier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxcompress.graph import Constant, Graph, Node
from onnxcompress.model_io.stored import StoredValues, all_tensors

PASS_KEY = "onnxcompress.pass"


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


class Writer:
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
    model, initializers = Writer(graph).model()
    for entry in initializers:
        if weights or int(np.prod(entry.constant.shape, dtype=np.int64)) <= 1024:
            model.graph.initializer.append(TensorProto.FromString(entry.inline()))
        elif entry.name not in {value.name for value in model.graph.input}:
            head = entry.header()
            model.graph.input.append(helper.make_tensor_value_info(entry.name, head.data_type, list(head.dims)))
    return model
