"""Runs of linear operators in a graph: convolutions, average pools and affine maps per channel, each read by the next.

A ``Path`` is found by the form of its nodes; ``read_path`` then reads it as convolutions for ``linear_chain``, which
says whether and as what they merge; ``path_specs`` and ``plan_specs`` say what both forms cost, and ``insert_merged``
makes the nodes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcompress.cost import GROWTH_ALLOWANCE_BYTES, CostModel, OperatorSpec, known_shape, why_not_pay
from onnxcompress.graph import Constant, Graph, Node, Tensor, is_constant, is_op, optional_input
from onnxcompress.linear import ConvOp, average_pool_as_conv
from onnxcompress.linear.chain import BiasMap, Merged, Plan
from onnxcompress.linear.nodes import conv_spec_at, explicit_pads, insert_conv, read_conv
from onnxcompress.merging.channel_affine import (
    AFFINE_OPS,
    ChannelAffine,
    live_operand,
    read_affine_node,
    why_not_same_shape,
)

MAX_STEPS = 8
# A bias map is stored folded if that saves more; constant folding would unfold it for a growth of 1 KB, not for this.
FOLDING_GAIN_BYTES = 8192


@dataclass(frozen=True, eq=False)
class Path:
    """Linear operators between two tensors.

    Attributes:
        source: What the first node reads; what the path leads to, if there is no node.
        nodes: In order of execution; the output of each is read by the next alone, that of the last by the reader.
    """

    source: Tensor
    nodes: tuple[Node, ...]

    @property
    def has_conv(self) -> bool:
        """Whether a Conv is on the path."""
        return any(node.op == "Conv" for node in self.nodes)

    @property
    def is_affine(self) -> bool:
        """Whether every node acts on each position alone, without a Conv."""
        return not any(node.op in ("Conv", "AveragePool") for node in self.nodes)


def path_to(graph: Graph, tensor: Tensor, reader: Node) -> Path:
    """The longest path to ``tensor`` that nothing but ``reader`` reads the end of."""
    nodes: list[Node] = []
    while len(nodes) < MAX_STEPS and graph.feeds_only(tensor, reader):
        node = graph.producer(tensor)
        if node is None or not looks_linear(node):
            break
        source = live_operand(node) if is_op(node, *AFFINE_OPS) else node.inputs[0]
        assert source is not None
        if is_constant(source):
            break
        nodes.insert(0, node)
        tensor, reader = source, node
    return Path(tensor, tuple(nodes))


def looks_linear(node: Node) -> bool:
    """Whether the node can be on a path, by its form: its numbers are constants."""
    if is_op(node, "Conv"):
        bias = optional_input(node, 2)
        return is_constant(node.inputs[1]) and (bias is None or is_constant(bias))
    if is_op(node, "AveragePool"):
        return why_not_pool(node) is None
    return is_op(node, *AFFINE_OPS) and live_operand(node) is not None


def why_not_pool(node: Node) -> str | None:
    """The reason why an AveragePool divides by less than its window at some places, or is not a window at all."""
    kernel = node.attrs.get("kernel_shape")
    if not kernel:
        return "AveragePool has no kernel_shape"
    pads = explicit_pads(node, kernel)
    if pads is None:
        return "auto_pad of AveragePool depends on an input size that is not known"
    if node.attrs.get("ceil_mode", 0):
        return "AveragePool rounds its output size up (ceil_mode=1)"
    if any(pads) and not node.attrs.get("count_include_pad", 0):
        return "AveragePool leaves the padding out of its mean (count_include_pad=0)"
    return "a pad is negative" if any(pad < 0 for pad in pads) else None


def read_path(graph: Graph, path: Path, like: ConvOp | None = None) -> list[ConvOp] | str:
    """The path as convolutions in order of execution, or the reason why one of them is none.

    Args:
        graph: The graph of the path.
        path: From ``path_to``; a path without nodes becomes the identity.
        like: A convolution of the same input, needed where the path has no Conv.
    """
    convs: dict[Node, ConvOp] = {}
    for node in path.nodes:
        if is_op(node, "Conv"):
            conv = read_conv(node)
            if isinstance(conv, str):
                return conv
            convs[node] = conv
    known = next(iter(convs.values()), like)
    assert known is not None, "a path without a Conv needs one beside it"
    channels = known.in_channels
    if not path.nodes:
        return [_diagonal(np.ones(channels), np.zeros(channels), known)]
    ops: list[ConvOp] = []
    for node in path.nodes:
        op = convs.get(node) or _read_other(graph, node, channels, known)
        if isinstance(op, str):
            return op
        ops.append(op)
        channels = op.out_channels
    return ops


def _read_other(graph: Graph, node: Node, channels: int, like: ConvOp) -> ConvOp | str:
    if is_op(node, "AveragePool"):
        kernel = node.attrs["kernel_shape"]
        pads, axes = explicit_pads(node, kernel), len(kernel)
        if pads is None or axes != like.spatial_rank:
            return "the geometry of AveragePool is not known"
        strides, dilations = node.attrs.get("strides") or [1] * axes, node.attrs.get("dilations") or [1] * axes
        return average_pool_as_conv(channels, kernel, strides, pads[:axes], pads[axes:], like.weight.dtype, dilations)
    tensor_rank = like.spatial_rank + 2
    affine = read_affine_node(graph, node, channels, tensor_rank)
    if not isinstance(affine, ChannelAffine):
        return affine or f"{node.op} is not an affine map per channel"
    return why_not_same_shape(affine, tensor_rank, 1) or _diagonal(affine.scale, affine.shift, like)


def _diagonal(scale: np.ndarray, shift: np.ndarray, like: ConvOp) -> ConvOp:
    """scale * x + shift as a convolution of one tap, float64 rounded to the dtype of ``like``."""
    ones, zeros, dtype = (1,) * like.spatial_rank, (0,) * like.spatial_rank, like.weight.dtype
    weight = scale.reshape(-1, 1, *ones).astype(dtype)
    return ConvOp(weight, shift.astype(dtype) if shift.any() else None, ones, ones, zeros, zeros, len(scale))


# -- what it costs ---------------------------------------------------------------------------------------------------


def nominal_shape(source: Tensor, spatial_rank: int) -> tuple[int, ...]:
    """Batch and spatial sizes of ``source``, nominal ones where they are not known."""
    shape, _ = known_shape(source)
    if shape is None or len(shape) != spatial_rank + 2:
        return (1, *[32] * spatial_rank)
    return (shape[0], *shape[2:])


def path_specs(nodes: Sequence[Node], ops: Sequence[ConvOp], batch_and_size: Sequence[int]) -> list[OperatorSpec]:
    """What the nodes of a path cost; an affine map per channel counts as a Mul."""
    specs, at = [], tuple(batch_and_size)
    for node, op in zip(nodes, ops, strict=False):  # a path without nodes is the identity, which has no cost
        shape, dtype = (at[0], op.in_channels, *at[1:]), op.weight.dtype.name
        if is_op(node, "Conv"):
            spec = conv_spec_at(op, at)
        elif is_op(node, "AveragePool"):
            attrs = (("kernel_shape", op.kernel), ("pads", op.pads), ("strides", op.strides))
            spec = OperatorSpec("AveragePool", shape, attrs=attrs, dtype=dtype)
        else:
            spec = OperatorSpec("Mul", shape, ((op.in_channels, *(1,) * op.spatial_rank),), dtype=dtype)
        specs.append(spec)
        at = (at[0], *spec.output_shape[2:])
    return specs


def plan_specs(plan: Plan, batch_and_size: Sequence[int]) -> list[OperatorSpec]:
    """What a merged convolution costs, with the Add of its bias map."""
    spec = conv_spec_at(plan.conv, batch_and_size)
    if not plan.has_map:
        return [spec]
    full, folded = map_bytes(plan.conv.out_channels, plan.places, plan.conv.weight.itemsize)
    stored = folded if full - folded > FOLDING_GAIN_BYTES else full
    return [spec, OperatorSpec("Add", spec.output_shape, (plan.map_shape,), dtype=spec.dtype, stored_bytes=stored)]


def map_bytes(channels: int, places: Sequence[np.ndarray | None], itemsize: int) -> tuple[int, int]:
    """Bytes of a bias map as it is, and as its different values and the place of each."""
    axes = [axis for axis in places if axis is not None]
    full = channels * math.prod(axis.size for axis in axes) * itemsize
    values = channels * math.prod(int(axis.max()) + 1 for axis in axes) * itemsize
    return full, values + sum(axis.size for axis in axes) * np.dtype(np.int32).itemsize


def why_not_merge(
    cost: CostModel, before: Sequence[OperatorSpec], after: Sequence[OperatorSpec], replaced: Iterable[Node]
) -> str | None:
    """The reason why ``after`` does not pay in place of the nodes ``replaced``, whose specs are ``before``, or None."""
    kept = kept_bytes(replaced)
    reason = why_not_pay(cost, before, after, growth_bytes=GROWTH_ALLOWANCE_BYTES - kept)
    if reason is None or not kept or why_not_pay(cost, before, after) is not None:
        return reason
    return f"weights would grow: {kept} bytes of those replaced stay, as other nodes share them"


def kept_bytes(replaced: Iterable[Node]) -> int:
    """Bytes that the specs of these nodes count but whose removal does not free: initializers shared with others."""
    gone = set(replaced)
    uses = Counter(tensor for node in gone for tensor in node.inputs if isinstance(tensor, Constant))
    kept = 0
    for tensor, count in uses.items():
        freed = all(reader in gone for reader in tensor.outputs)
        kept += tensor.nbytes * (count - 1 if freed else count)
    return kept


def change_in_macs(before: Sequence[OperatorSpec], after: Sequence[OperatorSpec]) -> str:
    """``1,234,000 -> 700,000 MACs`` for the report."""
    return f"{sum(spec.macs for spec in before):,} -> {sum(spec.macs for spec in after):,} MACs"


def kernel_text(conv: ConvOp) -> str:
    """``3x3``, with the group if there is one."""
    size = "x".join(map(str, conv.kernel))
    return size if conv.group == 1 else f"{size} in {conv.group} groups"


# -- making nodes ----------------------------------------------------------------------------------------------------


def insert_merged(
    graph: Graph, merged: Merged, source: Tensor, outputs: Sequence[Tensor] | None, *, before: Node, name: str
) -> Tensor:
    """Make the Conv, and the Add of its bias map if it has one; returns what they make."""
    bias_map = merged.bias_map
    if bias_map is None:
        made: Tensor = insert_conv(graph, merged.conv, source, outputs, before=before, name=name).outputs[0]
        return made
    conv = insert_conv(graph, merged.conv, source, None, before=before, name=name)
    bias = insert_map(graph, bias_map, before=before, name=f"{name}.bias_map")
    added = graph.insert("Add", [conv.outputs[0], bias], outputs, before=before, name=f"{name}.bias_map")
    result: Tensor = added.outputs[0]
    return result


def insert_map(graph: Graph, bias_map: BiasMap, *, before: Node, name: str) -> Tensor:
    """A tensor that holds a bias map: a constant, or Gathers of one, which onnxruntime computes at load."""
    full, folded = map_bytes(bias_map.values.shape[1], bias_map.places, bias_map.values.itemsize)
    if full - folded <= FOLDING_GAIN_BYTES:
        return graph.new_constant(name, bias_map.full)
    value: Tensor = graph.new_constant(name, bias_map.values)
    for axis, places in enumerate(bias_map.places):
        if places is not None:
            indices = graph.new_constant(f"{name}.places", places.astype(np.int32))
            gather = graph.insert("Gather", [value, indices], None, {"axis": axis + 2}, before=before, name=name)
            value = gather.outputs[0]
    return value
