"""Put a quantized layer into the graph, in the form that ``recipes`` describes, and its bias where it belongs.

The decoded weight keeps the name of the stored one; its constants are called ``name/indices`` and so on, or
``w_7/indices`` where the name is long. onnxruntime folds the nodes when it loads the model; the weights
stay packed in memory where the session is told so, see ``LOW_MEMORY_HINT``.
"""

from __future__ import annotations

import numpy as np

from onnxcompress.codebook.biases import Bias
from onnxcompress.codebook.codebook import Choice, QuantizedLayer, index_type, order_shape
from onnxcompress.codebook.layers import Layer
from onnxcompress.codebook.narrow import Float16Layer, Int8Layer
from onnxcompress.codebook.recipes import MAX_NAME, Recipe
from onnxcompress.codebook.tables import decodes_rows, encode_rows
from onnxcompress.codebook.views import remove_moves
from onnxcompress.errors import QuantizationError
from onnxcompress.graph import Constant, Graph, Node, Tensor, Variable, bodies, is_constant
from onnxcompress.patterns.decoded_weights import CodebookWeight, decoding_nodes, find_codebooks

__all__ = [
    "HINT_KEY",
    "LOW_MEMORY_HINT",
    "CodebookWeight",
    "add_low_memory_hint",
    "decoding_nodes",
    "encode",
    "find_codebooks",
    "overhead_bytes",
]

HINT_KEY = "onnxcompress.low_memory"
LOW_MEMORY_HINT = (
    "weights are decoded when the model is loaded; to keep them packed: SessionOptions.add_session_config_entry("
    '"optimization.constant_folding_max_output_size_in_bytes", "65536")'
)
Stored = QuantizedLayer | Int8Layer | Float16Layer


def encode(graph: Graph, layer: Layer, quantized: Stored) -> None:
    """Put a quantized form and the nodes that decode it in the place of a layer's weight, and write its bias.

    Args:
        graph: The outermost graph; changed in place.
        layer: One of ``find_layers(graph)``, not encoded yet.
        quantized: What to store: a codebook, int8 or float16.

    Raises:
        QuantizationError: There is a corrected bias and no place for it.
    """
    if quantized.bias is not None and not layer.has_bias:
        raise QuantizationError(f"{layer.name!r} has no place for a bias; quantize it with correct_bias=False")
    if isinstance(quantized, QuantizedLayer) and decodes_rows(graph, layer):
        encode_rows(graph, layer, quantized, layer.name if len(layer.name) <= MAX_NAME else graph.scope.fresh("w"))
        return
    recipe = _recipe(graph, layer, quantized)
    weights = _place(graph, layer, recipe)
    views = list(recipe.views)
    for use in layer.uses:
        _read(use.node, use.slot, weights[views.index(use.view)])
    for use in layer.uses:
        remove_moves(use.origin)
    if quantized.bias is not None:
        write_bias(graph, layer, quantized.bias)


def overhead_bytes(graph: Graph, layer: Layer, choice: Choice | str) -> int:
    """Bytes that a form adds to the file beside its arrays: nodes, names and headers, to a few bytes.

    Args:
        graph: The outermost graph, for its opset.
        layer: One of ``find_layers(graph)``.
        choice: A codebook, "int8" or "float16".
    """
    recipe = _empty_recipe(graph, layer)
    recipe.name = layer.name if len(layer.name) <= MAX_NAME else "w_99"
    recipe.fresh = lambda name: name if "/" in name else f"{name}_99"
    shape = (layer.outputs, layer.length)
    if isinstance(choice, Choice):
        blocks, kind = layer.length // choice.block, np.dtype(choice.codebook_type)
        quantized = QuantizedLayer(
            choice,
            codebook=_nothing((choice.codewords, choice.block), kind),
            codebook_scale=_nothing((choice.block,), np.float32) if kind == np.int8 else None,
            indices=np.zeros((layer.outputs, blocks), index_type(choice.codewords)),
            scales=np.zeros(layer.outputs, np.float16) if choice.scaled else None,
            bias=None,
            error=0.0,
            held_out_error=None,
            order=empty_order(layer, choice),
        )
        return recipe.codebook(quantized).overhead_bytes()
    if choice == "int8":
        return recipe.int8(
            Int8Layer(_nothing(shape, np.int8), np.arange(layer.outputs, dtype=np.float32))
        ).overhead_bytes()
    if choice == "float16":
        return recipe.float16(Float16Layer(_nothing(shape, np.float16))).overhead_bytes()
    raise ValueError(f"choice is {choice!r}, allowed are a Choice, 'int8' and 'float16'")


def empty_order(layer: Layer, choice: Choice) -> np.ndarray | None:
    """What takes the bytes of an order of input channels, where a form has one."""
    if not choice.permuted:
        return None
    shape, dtype = order_shape(layer.length // layer.kernel, choice.block // layer.kernel)
    return np.zeros(shape, dtype)


def _nothing(shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
    return np.broadcast_to(np.zeros((), dtype), shape)


def add_low_memory_hint(graph: Graph) -> None:
    """Say in the model's metadata how to keep the weights packed in memory."""
    assert graph.model is not None, "only the outermost graph is a model"
    for entry in [entry for entry in graph.model.metadata_props if entry.key == HINT_KEY]:
        graph.model.metadata_props.remove(entry)
    graph.model.metadata_props.add(key=HINT_KEY, value=LOW_MEMORY_HINT)


# -- the weight ------------------------------------------------------------------------------------------------------


def _recipe(graph: Graph, layer: Layer, quantized: Stored) -> Recipe:
    recipe = _empty_recipe(graph, layer)
    recipe.name = layer.name if len(layer.name) <= MAX_NAME else graph.scope.fresh("w")
    recipe.fresh = graph.scope.fresh
    if isinstance(quantized, QuantizedLayer):
        return recipe.codebook(quantized)
    return recipe.int8(quantized) if isinstance(quantized, Int8Layer) else recipe.float16(quantized)


def _empty_recipe(graph: Graph, layer: Layer) -> Recipe:
    views = list(dict.fromkeys(use.view for use in layer.uses))
    return Recipe(
        layer.name, views, layer.uses[0].origin.dtype, graph.opset, int(graph.ir_version or 0), layer.depthwise
    )


def _place(graph: Graph, layer: Layer, recipe: Recipe) -> list[Tensor]:
    """Make the constants and nodes of a recipe, in front of all readers; returns the weight of each view."""
    tensors: dict[str, Tensor] = {
        name: Constant(name, np.ascontiguousarray(array), home=graph) for name, array in recipe.constants.items()
    }
    tensors |= {name: _shared(graph, name, array) for name, array in recipe.shared.items()}
    nodes = []
    for step in recipe.steps:
        tensors[step.output] = Variable(step.output)
        nodes.append(
            Node(step.op, "", dict(step.attrs), [tensors[name] for name in step.inputs], [tensors[step.output]])
        )
    position = min(_position(graph, use.node) for use in layer.uses)
    for offset, node in enumerate(nodes):
        graph.nodes.insert(position + offset, node)
    weights = [tensors[name] for name in recipe.weights]
    # Before IR 4 the carrier lists every initializer as an input, and the name stays an input's.
    if (graph.ir_version or 0) >= 4:
        weights[0].name = layer.name
    for weight, view in zip(weights, recipe.views, strict=True):
        if isinstance(weight, Variable):
            weight.dtype, weight.shape = recipe.dtype, list(view.shape)
    return weights


def _shared(graph: Graph, name: str, array: np.ndarray) -> Constant:
    """A constant that several layers read."""
    for node in graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, Constant) and tensor.name == name and np.array_equal(tensor.values, array):
                return tensor
    return Constant(graph.scope.fresh(name), array, home=graph)


def _position(graph: Graph, node: Node) -> int:
    """Where a node of the graph, or the one that holds it in a body, stands."""
    for index, candidate in enumerate(graph.nodes):
        if candidate is node or any(node.graph is inner for body in bodies(candidate) for inner in body.walk()):
            return index
    raise ValueError(f"node {node.name!r} is not part of the graph")


def _read(node: Node, slot: int, tensor: Tensor) -> None:
    """Let a node read a tensor at an input, which may be the next free one."""
    inputs = list(node.inputs)
    inputs += [Variable.empty() for _ in range(slot + 1 - len(inputs))]
    inputs[slot] = tensor
    node.inputs = inputs


# -- the bias --------------------------------------------------------------------------------------------------------


def write_bias(graph: Graph, layer: Layer, vector: np.ndarray) -> None:
    """Store a layer's bias: in the old one's place, or as a new input or Add where there was none.

    Args:
        graph: The outermost graph.
        layer: A layer with ``has_bias``.
        vector: (outputs,) float32; nothing is added where there was none and these are zeros.
    """
    bias = layer.uses[0].bias
    assert bias is not None, "has_bias was not asked"
    if bias.origin is None and not vector.any() and not _is_there(bias):
        return
    node = bias.node
    home = node.graph
    assert home is not None
    dtype = layer.uses[0].origin.dtype if bias.origin is None else bias.origin.dtype
    old = node.inputs[bias.slot] if _is_there(bias) else None
    whole = old.values if is_constant(old) and old is not None else None
    values = bias.with_part(vector, whole).astype(dtype)
    if bias.new_add:
        _insert_add(home, node, Constant(graph.scope.fresh(f"{layer.name}/bias"), values, home=home))
        return
    alone = old is not None and is_constant(old) and len(old.outputs) == 1 and not home.is_output(old)
    name = old.name if alone and old is not None else graph.scope.fresh(f"{layer.name}/bias")
    home_of_old = getattr(old, "home", None) if alone else None
    _read(node, bias.slot, Constant(name, values, home=home_of_old or home))
    if bias.origin is not None:
        remove_moves(bias.origin)


def _is_there(bias: Bias) -> bool:
    return bias.slot < len(bias.node.inputs) and not bias.node.inputs[bias.slot].is_empty()


def _insert_add(graph: Graph, node: Node, constant: Constant) -> None:
    """Add a row to what a node makes; the sum takes the output's name."""
    total = node.outputs[0]
    product = graph.new_variable(f"{total.name}/product", total)
    node.outputs = [product]
    graph.nodes.insert(graph.nodes.index(node) + 1, Node("Add", "", {}, [product, constant], [total]))
