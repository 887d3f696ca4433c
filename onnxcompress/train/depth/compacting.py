"""Make one operator of those that stand one behind the other in a pruned block, before it is trained.

Between two matrices whose activation is gone hundreds of numbers are sums of a few, and they grow and shrink together:
a step of Adam moves each weight by the learning rate, and their product by many times that. From fits whose accuracy
was 79 % a ConvNeXt fell to 23 % in ten steps. Of one matrix a step is a step, and it costs a part of the time. Arora,
Cohen & Hazan (ICML 2018, arXiv 1802.06509) describe what such a product does to a gradient. The BatchNormalization
that took the place of a normalization in front of them goes along; that of the original stays, for a network that has
it learns better with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from onnxcompress.graph import Graph, Node, Tensor, is_constant, is_op, rank
from onnxcompress.rewrite import remove_if_unread
from onnxcompress.shapes import infer_shapes
from onnxcompress.train.depth.blocks import Block
from onnxcompress.train.depth.edits import float_type, insert_node, take_over
from onnxcompress.train.torch_graph import TorchGraph

LAST = -1  # the axis of channels of a matrix; of a Conv it is 1
AFFINE = ("Add", "Sub", "Mul", "Div", "Identity")


@dataclass(frozen=True, eq=False)
class _Run:
    """Nodes in a row, each of which does the same linear map at every position."""

    nodes: list[Node]
    axis: int
    channels: tuple[int, int]  # that are read, and made
    weights: int  # numbers in its matrices
    matrices: int

    @property
    def pays(self) -> bool:
        return self.matrices > 1 and math.prod(self.channels) < self.weights


def compact(graph: Graph, blocks: Sequence[Block]) -> list[str]:
    """Merge matrices and pointwise convolutions that follow each other in pruned blocks.

    Args:
        graph: With the blocks pruned and their weights in place; rewritten.
        blocks: Those that were pruned.

    Returns:
        Names of the operators that were made.
    """
    made = []
    for block in blocks:
        number = 0
        while (run := _find(graph, block)) is not None:
            made.append(_merge(graph, run, f"{block.name}.merged{number or ''}"))
            number += 1
    if made:
        graph.sort()
        infer_shapes(graph)
    return made


def _find(graph: Graph, block: Block) -> _Run | None:
    """The next run of a block that has several matrices."""
    inside = _between(graph, block)
    for node in graph.nodes:
        if id(node) in inside and _matrix(node) is not None and (run := _run_from(graph, node, inside)).pays:
            return replace(run, nodes=[*_norm_before(graph, node, block), *run.nodes])
    return None


def _between(graph: Graph, block: Block) -> set[int]:
    """Nodes between what a block reads and what it makes."""
    tensors = {str(tensor.name): tensor for node in graph.nodes for tensor in node.outputs}
    found: set[int] = set()
    waiting = [tensors[block.output]] if block.output in tensors else []
    while waiting:
        node = graph.producer(waiting.pop())
        if node is None or id(node) in found:
            continue
        found.add(id(node))
        waiting += [tensor for tensor in node.inputs if tensor.name != block.source]
    return found


def _run_from(graph: Graph, first: Node, inside: set[int]) -> _Run:
    matrix = _matrix(first)
    assert matrix is not None
    (axis, reads, makes), nodes = matrix, [first]
    weights, matrices = reads * makes, 1
    while True:
        tensor = nodes[-1].outputs[0]
        if len(tensor.outputs) != 1 or graph.is_output(tensor):
            break
        node = tensor.outputs[0]
        if id(node) not in inside:
            break
        then = _matrix(node) if node.inputs and node.inputs[0] is tensor else None
        if then is not None and then[0] == axis:
            makes = then[2]
            weights, matrices = weights + then[1] * then[2], matrices + 1
        elif not _is_affine(node, tensor, axis, makes):
            break
        nodes.append(node)
    return _Run(nodes, axis, (reads, makes), weights, matrices)


def _norm_before(graph: Graph, node: Node, block: Block) -> list[Node]:
    """The BatchNormalization in place of a normalization, and its Transposes, that a node alone reads."""
    found: list[Node] = []
    while True:
        tensor = (found[0] if found else node).inputs[0]
        maker = graph.producer(tensor)
        if maker is None or len(tensor.outputs) != 1 or graph.is_output(tensor):
            break
        if not str(maker.name).startswith(f"{block.name}.norm"):
            break
        found.insert(0, maker)
    return found


def _matrix(node: Node) -> tuple[int, int, int] | None:
    """The axis of channels, and how many are read and made, of an operator that is one matrix at every position."""
    if not is_op(node, "Conv", "MatMul", "Gemm") or is_constant(node.inputs[0]) or rank(node.inputs[0]) is None:
        return None
    if not all(_is_fixed(tensor) for tensor in node.inputs[1:]):
        return None
    shape = node.inputs[1].shape
    if shape is None or not all(isinstance(size, int) for size in shape):
        return None
    if node.op == "Conv":
        plain = (
            len(shape) > 2
            and math.prod(shape[2:]) == 1
            and node.attrs.get("group", 1) == 1
            and all(stride == 1 for stride in node.attrs.get("strides", [1]))
            and not any(node.attrs.get("pads", []))
        )
        return (1, shape[1], shape[0]) if plain else None
    if len(shape) != 2 or node.attrs.get("transA", 0):
        return None
    return (LAST, shape[1], shape[0]) if node.attrs.get("transB", 0) else (LAST, shape[0], shape[1])


def _is_affine(node: Node, tensor: Tensor, axis: int, channels: int) -> bool:
    """Whether a node scales and shifts channels by constants."""
    if not is_op(node, *AFFINE):
        return False
    if node.op == "Identity":
        return True
    others = [other for other in node.inputs if other is not tensor]
    if len(others) != 1 or not _is_fixed(others[0]) or (node.op in ("Sub", "Div") and node.inputs[0] is not tensor):
        return False
    shape, whole = others[0].shape, rank(tensor)
    if shape is None or whole is None or len(shape) > whole:
        return False
    place = whole - 1 if axis == LAST else axis
    aligned = [1] * (whole - len(shape)) + list(shape)
    return all(size == 1 or (i == place and size == channels) for i, size in enumerate(aligned))


def _is_fixed(tensor: Tensor) -> bool:
    """Whether a tensor is made of constants alone."""
    if is_constant(tensor) or tensor.is_empty():
        return True
    return bool(tensor.inputs) and all(_is_fixed(other) for other in tensor.inputs[0].inputs)


def _merge(graph: Graph, run: _Run, name: str) -> str:
    """Put one operator in the place of a run."""
    source, output = run.nodes[0].inputs[0], run.nodes[-1].outputs[0]
    matrix, bias = _measured(graph, run, source, output)
    dtype, before = float_type(output), run.nodes[-1]
    shift = graph.new_constant(f"{name}.bias", bias.astype(dtype))
    if run.axis == LAST:
        weight = graph.new_constant(f"{name}.weight", matrix.astype(dtype))
        product = insert_node(graph, "MatMul", [source, weight], before, name)
        product.dtype, product.shape = output.dtype, output.shape
        last = graph.insert("Add", [product, shift], before=before, name=f"{name}.shift")
    else:
        ones = [1] * (len(source.shape or ()) - 2)
        kernel = graph.new_constant(f"{name}.weight", matrix.T.reshape(*matrix.T.shape, *ones).astype(dtype))
        attrs = {"kernel_shape": ones}
        last = graph.insert("Conv", [source, kernel, shift], attrs=attrs, before=before, name=name)
    take_over(graph, output)
    last.outputs = [output]
    remove_if_unread(graph, run.nodes[::-1])
    return name


def _measured(graph: Graph, run: _Run, source: Tensor, output: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What a run does to each channel alone, (reads, makes), and to nothing, (makes,)."""
    reads = run.channels[0]
    rows = torch.cat([torch.zeros(1, reads), torch.eye(reads)]).double()
    whole = rank(source)
    assert whole is not None
    positions = whole - 2
    shape = (reads + 1, *[1] * positions, reads) if run.axis == LAST else (reads + 1, reads, *[1] * positions)
    twin = TorchGraph(graph, float_type=torch.float64)
    with torch.no_grad():
        found = twin({str(source.name): rows.reshape(shape)}, [str(output.name)])[str(output.name)]
    values = found.reshape(reads + 1, -1).numpy()
    return values[1:] - values[0], values[0]
