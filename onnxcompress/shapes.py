"""Element types and shapes of every tensor, from onnx's own inference; only what the operators prove is believed.

What a file *declares* about its inner tensors and outputs is left out: exporters write sizes there that held for one
example, and an optimizer that believes a batch of 1 makes a model that fails on a batch of 2. Declared shapes are used
for the model's inputs alone, where the runtime enforces the numbers. A size that is not given there, -1, or a name that
is none ("?", "None": some exporters give it to every axis) gets a name of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, ValueInfoProto, shape_inference

from onnxcompress.graph import STANDARD_DOMAINS, Graph, Tensor, Variable
from onnxcompress.model_io import element_dtype, to_proto
from onnxcompress.sizes import Sizes
from onnxcompress.sizes.rules import SHAPES

logger = logging.getLogger(__name__)

MAX_REFINEMENTS = 8  # inferences, each going on from shapes that were computed after the one before


def infer_shapes(graph: Graph, *, known: Mapping[str, Tensor] | None = None) -> None:
    """Set ``dtype`` and ``shape`` of every Variable of the graph and its subgraphs.

    Symbolic dimensions are strings; within one call equal strings mean equal sizes. A model on which the inference
    fails keeps what it had: passes then find nothing known and leave it alone.

    Args:
        graph: Its Variables are set.
        known: Tensors of the same name elsewhere, whose static sizes are believed.
    """
    skeleton = to_proto(graph, weights=False)
    _forget_declared(skeleton.graph)
    for name, tensor in (known or {}).items():
        shape = [dim if isinstance(dim, int) else None for dim in tensor.shape or []]
        if tensor.dtype is not None and any(shape):
            elem_type = onnx.helper.np_dtype_to_tensor_dtype(tensor.dtype)
            skeleton.graph.value_info.append(onnx.helper.make_tensor_value_info(name, elem_type, shape))
    for value in skeleton.graph.input:
        _name_sizes(value)
    _read_inputs(graph, skeleton.graph)
    for _ in range(MAX_REFINEMENTS):
        try:
            inferred = shape_inference.infer_shapes(skeleton, check_type=False, strict_mode=False, data_prop=True)
        except (shape_inference.InferenceError, RuntimeError, ValueError) as error:
            logger.info("shape inference failed: %s", str(error).splitlines()[0])
            return
        _read(graph, inferred.graph)
        told = {value.name for value in [*skeleton.graph.value_info, *skeleton.graph.output]}
        more = [value for value in _computed_shapes(graph) if value.name not in told]
        if not more:
            return
        skeleton.graph.value_info.extend(more)


def _computed_shapes(graph: Graph) -> list[ValueInfoProto]:
    """Shapes that onnx's inference leaves open where they are computed, for it to go on from."""
    open_nodes = [node for node in graph.nodes if node.op in SHAPES and node.outputs and node.outputs[0].shape is None]
    if not open_nodes:
        return []
    sizes, found = Sizes(graph), []
    for node in open_nodes:
        output, dims = node.outputs[0], sizes.output_dims(node)
        dtype = node.inputs[0].dtype if node.op == "GroupNormalization" else output.dtype
        if dims is not None and dtype is not None:
            kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
            found.append(onnx.helper.make_tensor_value_info(output.name, kind, [sizes.name(dim) for dim in dims]))
    return found


def _forget_declared(proto: GraphProto) -> None:
    """Drop declared shapes of inner tensors, outputs and subgraph inputs; types of foreign operators' outputs stay."""
    foreign = {name for node in proto.node if node.domain not in STANDARD_DOMAINS for name in node.output}
    keep = [value for value in proto.value_info if value.name in foreign]
    del proto.value_info[:]
    for value in keep:
        proto.value_info.append(_without_shape(value))
    for value in proto.output:
        value.CopyFrom(_without_shape(value))
    for node in proto.node:
        for attr in node.attribute:
            for body in [attr.g] if attr.type == onnx.AttributeProto.GRAPH else attr.graphs:
                # A state of a Loop may change its shape from turn to turn, whatever the file says.
                for value in body.input:
                    value.CopyFrom(_without_shape(value))
                _forget_declared(body)


def _name_sizes(value: ValueInfoProto) -> None:
    for axis, dim in enumerate(value.type.tensor_type.shape.dim):
        if dim.dim_value < 0 or (not dim.HasField("dim_value") and _is_no_name(dim.dim_param)):
            dim.dim_param = f"{value.name}[{axis}]"


def _is_no_name(text: str) -> bool:
    return not any(map(str.isalpha, text)) or text.lower() in {
        "none",
        "null",
        "nan",
        "unk",
        "unknown",
        "dynamic",
        "any",
    }


def _without_shape(value: ValueInfoProto) -> ValueInfoProto:
    bare = ValueInfoProto()
    bare.CopyFrom(value)
    if bare.type.HasField("tensor_type"):
        bare.type.tensor_type.ClearField("shape")
    return bare


def _read_inputs(graph: Graph, proto: GraphProto) -> None:
    declared = {value.name: value for value in proto.input}
    for tensor in graph.inputs:
        if tensor.name in declared and isinstance(tensor, Variable):  # up to IR 3 initializers are inputs as well
            _apply(tensor, declared[tensor.name])
    for inner in graph.walk():
        if inner is not graph:
            for tensor in inner.inputs:
                tensor.shape = None


def _read(graph: Graph, proto: GraphProto) -> None:
    known = {value.name: value for value in [*proto.value_info, *proto.output]}
    inputs = set(graph.inputs)
    bodies = {node.name: node for node in proto.node}
    outputs_of = {tuple(node.output): node for node in proto.node}
    for node in graph.nodes:
        for tensor in node.outputs:
            if tensor.name in known and tensor not in inputs:
                _apply(tensor, known[tensor.name])
        for name, value in node.attrs.items():
            nested = value if isinstance(value, list) else [value]
            if not any(isinstance(body, Graph) for body in nested):
                continue
            counterpart = outputs_of.get(tuple(t.name for t in node.outputs)) or bodies.get(node.name)
            attr = next((a for a in counterpart.attribute if a.name == name), None) if counterpart is not None else None
            if attr is not None:
                protos = [attr.g] if attr.type == onnx.AttributeProto.GRAPH else list(attr.graphs)
                for body, body_proto in zip(nested, protos, strict=True):
                    _read_inputs(body, body_proto)
                    _read(body, body_proto)


def _apply(tensor: Tensor, value: ValueInfoProto) -> None:
    if not value.type.HasField("tensor_type"):
        return
    kind = value.type.tensor_type
    tensor.dtype = element_dtype(kind.elem_type) if kind.elem_type else None
    tensor.shape = None
    if kind.HasField("shape"):
        tensor.shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in kind.shape.dim]


def skeleton(graph: Graph) -> ModelProto:
    """The model with its large weights as inputs: what checks and inference need, small for any model."""
    return to_proto(graph, weights=False)
