"""Bytes of a file that say nothing about its numbers, shaved off where a small file needs them for its weights.

    PLAIN   no notes on nodes, no hint, no shapes between nodes, no attributes that state ONNX's defaults; small float
            constants in float16 behind a Cast, where that is smaller
    NAMES   the same, and short names for the tensors between nodes
    PACKED  the same, weights and vectors decoded together (``packing.py``), and short names for them as well

Names of nodes stay, up to NAMES those of initializers and of decoded weights, too, and so does the interface.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from onnxcompress.codebook.narrow import LARGEST_FLOAT16
from onnxcompress.codebook.packing import pack
from onnxcompress.graph import Constant, Graph, Node, Tensor, Variable, is_constant, is_op, numpy_dtype, optional_input
from onnxcompress.patterns.decoded_weights import WEIGHT_SLOTS, decoding_nodes, find_codebooks, narrow_weights

SMALL_FILE_BYTES = 256 * 1024
NAMES_PAY = 0.02  # of the file, from which on short names are worth it
MAX_NARROW_ELEMENTS = 1 << 16  # larger constants are layers, or meant to be exact
# What reads constants that float16 is good enough for: biases, norms, factors, positions.
TOLERANT = (
    *("Conv", "ConvTranspose", "Gemm", "LSTM", "GRU", "RNN", "Add", "Sub", "Mul", "Concat", "PRelu"),
    *("BatchNormalization", "LayerNormalization", "InstanceNormalization", "GroupNormalization"),
)
VARIANCE = 4  # input of a BatchNormalization, of which the root is taken
# Attributes with a default that no schema holds: by operator, what each of their numbers is.
WINDOWS = {
    "Conv": {"strides": 1, "dilations": 1, "pads": 0},
    "ConvTranspose": {"strides": 1, "dilations": 1, "pads": 0, "output_padding": 0},
    "MaxPool": {"strides": 1, "dilations": 1, "pads": 0},
    "AveragePool": {"strides": 1, "dilations": 1, "pads": 0},
}


class Shaving(IntEnum):
    """How much is shaved off."""

    NONE = 0
    PLAIN = 1
    NAMES = 2
    PACKED = 3


def shave(graph: Graph, amount: Shaving) -> None:
    """Make the file of a quantized graph smaller without touching its weights.

    Args:
        graph: The outermost graph, about to be written; changed in place, its carriers too.
        amount: How far to go.
    """
    if amount == Shaving.NONE:
        return
    for inner in graph.walk():
        _forget_shapes(inner)
        for node in inner.nodes:
            _forget_notes(node)
            _drop_defaults(node, graph.opset)
            if amount == Shaving.PACKED:
                _drop_kernel_shape(node)
    if (graph.ir_version or 0) >= 4:  # before it every initializer is an input, too
        if amount == Shaving.PACKED:
            decoding = decoding_nodes(graph)
            pack(graph, lambda tensor: _may_be_narrow(graph, tensor, decoding))
        _narrow_constants(graph)
    if amount >= Shaving.NAMES:
        _shorten_names(graph, weights=amount == Shaving.PACKED)


# -- notes -----------------------------------------------------------------------------------------------------------


def _forget_shapes(graph: Graph) -> None:
    """Shapes of inner tensors, which onnxruntime finds by itself where it knows every operator."""
    if graph.carrier is not None and all(is_op(node, node.op) for node in graph.nodes):
        graph.carrier.ClearField("value_info")


def _forget_notes(node: Node) -> None:
    node.made_by = ""
    carrier = getattr(node, "carrier", None)
    if carrier is not None and (carrier.doc_string or carrier.metadata_props):
        plain = NodeProto()
        plain.CopyFrom(carrier)
        plain.ClearField("doc_string")
        plain.ClearField("metadata_props")
        node.carrier = plain


def _drop_defaults(node: Node, opset: int) -> None:
    if not is_op(node, node.op):
        return
    try:
        schema = onnx.defs.get_schema(node.op, opset, "")
    except onnx.defs.SchemaError:
        return
    padded = node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", b"NOTSET")
    for name, value in list(node.attrs.items()):
        known = schema.attributes.get(name)
        window = WINDOWS.get(node.op, {}).get(name)
        if window is not None and not padded:
            default = all(number == window for number in value)
        else:
            default = known is not None and known.default_value.name == name and _states(value, known.default_value)
        if default:
            del node.attrs[name]


def _drop_kernel_shape(node: Node) -> None:
    """The kernel's shape where the kernel has it: Conv and ConvTranspose infer it then."""
    stated = node.attrs.get("kernel_shape")
    if is_op(node, "Conv", "ConvTranspose") and stated is not None:
        shape = node.inputs[1].shape
        if shape is not None and list(shape[2:]) == list(stated):
            del node.attrs["kernel_shape"]


def _states(value: Any, default: onnx.AttributeProto) -> bool:
    """Whether an attribute's value is the default's: a number, a text, or a list of them."""
    stated = helper.get_attribute_value(default)
    if isinstance(value, str):
        value = value.encode()
    if isinstance(stated, float) and isinstance(value, (int, float)):
        return bool(np.float32(value) == np.float32(stated))
    return type(value) is type(stated) and isinstance(value, (int, bytes, list)) and value == stated


# -- float16 ---------------------------------------------------------------------------------------------------------


def _narrow_constants(graph: Graph) -> None:
    """Store small float constants in float16, each behind one Cast in front of its readers."""
    decoding = decoding_nodes(graph)
    places = {id(node): index for index, node in enumerate(graph.nodes)}
    first: dict[int, tuple[int, Constant]] = {}
    for node in graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, Constant) and _may_be_narrow(graph, tensor, decoding):
                first.setdefault(id(tensor), (places[id(node)], tensor))
    for place, tensor in sorted(first.values(), key=lambda found: -found[0]):
        wide = Variable(graph.scope.fresh("v"), dtype=np.dtype(np.float32), shape=list(tensor.shape))
        cast = Node("Cast", "", {"to": int(TensorProto.FLOAT)}, [], [wide])
        proto = helper.make_node("Cast", [tensor.name], [wide.name], to=int(TensorProto.FLOAT))
        if 2 * int(np.prod(tensor.shape)) <= proto.ByteSize() + 2:
            continue
        narrow = Constant(tensor.name, tensor.values.astype(np.float16), home=graph)
        for reader in list(dict.fromkeys(tensor.outputs)):
            reader.inputs = [wide if one is tensor else one for one in reader.inputs]
        cast.inputs = [narrow]
        graph.nodes.insert(place, cast)


def _may_be_narrow(graph: Graph, tensor: Constant, decoding: set[Node]) -> bool:
    if numpy_dtype(tensor) != np.float32 or not 1 < np.prod(tensor.shape) <= MAX_NARROW_ELEMENTS:
        return False
    if graph.is_output(tensor) or getattr(tensor, "home", None) not in (None, graph):
        return False
    for node in tensor.outputs:
        if node.graph is not graph or node in decoding or not is_op(node, *TOLERANT):
            return False
        if is_op(node, "BatchNormalization") and any(one is tensor for one in node.inputs[VARIANCE:]):
            return False
    # Weights of operators are layers: each is as it was chosen to be.
    for node in tensor.outputs:
        if any(optional_input(node, slot) is tensor for slot in WEIGHT_SLOTS.get(node.op, ())):
            return False
    largest = float(np.abs(tensor.values).max())
    return bool(np.isfinite(tensor.values).all()) and largest <= LARGEST_FLOAT16


# -- names -----------------------------------------------------------------------------------------------------------


def _shorten_names(graph: Graph, *, weights: bool) -> None:
    """Give the tensors between nodes names of one to three letters, the most often read ones first; weights, too?"""
    kept: set[Tensor] = set() if weights else {one.weight for one in find_codebooks(graph)} | set(narrow_weights(graph))
    inner = [
        tensor
        for each in graph.walk()
        for node in each.nodes
        for tensor in node.outputs
        if tensor.name and not each.is_output(tensor) and tensor not in kept and not is_constant(tensor)
    ]
    taken = graph.scope.names | {str(tensor.name) for tensor in graph.tensors().values()}
    names = (name for name in _letters() if name not in taken)
    for tensor in sorted(inner, key=lambda tensor: -len(tensor.outputs)):
        tensor.name = next(names)


def _letters() -> Iterator[str]:
    for length in itertools.count(1):
        for letters in itertools.product(string.ascii_lowercase, repeat=length):
            yield "".join(letters)
