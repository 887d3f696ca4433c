"""Merge a pruned graph by the ordinary passes; what a block costs before and after: MACs, bytes, measured latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ValueInfoProto, helper, numpy_helper

from onnxcompress import pipeline
from onnxcompress.cost import CostModel, MacsAndBytes, OperatorSpec, Price, count, known_shape
from onnxcompress.errors import RecipeError
from onnxcompress.graph import Constant, Graph, Tensor, is_constant
from onnxcompress.measure import LatencyFigures, compare_latency
from onnxcompress.model_io import load, to_proto
from onnxcompress.runtime import Runtime
from onnxcompress.shapes import infer_shapes
from onnxcompress.train.depth.blocks import Block
from onnxcompress.train.depth.preparation import copy_graph, run_passes
from onnxcompress.train.depth.supernet import Flows, build_pruned

LINEAR = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class FewestOperators:
    """Prices every operator the same, so that whatever can be merged is, faster or not."""

    def price(self, specs: Sequence[OperatorSpec]) -> Price:
        return Price(float(len(specs)), 0)


def merge(graph: Graph, *, cost: CostModel | None = None, runtime: Runtime | None = None) -> Graph:
    """A copy with every ordinary pass run over it: what ``optimize`` does at level 3, without its checks.

    Args:
        graph: Not changed.
        cost: Decides which merges are done; by default the estimate from MACs and bytes.
        runtime: Where constants are evaluated; one of its own when None.
    """
    merged = copy_graph(graph)
    run_passes(merged, pipeline.select(level=3), cost or MacsAndBytes(), runtime)
    return merged


@dataclass(frozen=True)
class BlockCost:
    """A block alone: optimized as it is, and pruned and merged.

    Attributes:
        block: Its name.
        nodes: Operators before and after.
        linear: Of these, Conv, Gemm and MatMul.
        macs: Multiply-accumulates at batch 1, before and after.
        weight_bytes: Bytes of the initializers, before and after.
        operators: What is left, in order; empty where the block is deleted.
        latency: Measured in turns on onnxruntime; None where nothing is left, or it was not asked for.
    """

    block: str
    nodes: tuple[int, int]
    linear: tuple[int, int]
    macs: tuple[int, int]
    weight_bytes: tuple[int, int]
    operators: tuple[str, ...]
    latency: LatencyFigures | None

    @property
    def is_slower(self) -> bool:
        """Whether the second form is slower beyond doubt of the clock."""
        return self.latency is not None and self.latency.high < 1.0


def block_costs(
    graph: Graph,
    block: Block,
    *,
    deleted: bool = False,
    runtime: Runtime | None = None,
    flows: Flows | None = None,
    cost: CostModel | None = None,
    threads: int = 1,
    budget_s: float = 0.5,
    seed: int = 0,
) -> BlockCost:
    """What a block costs now, and once it is pruned and merged.

    Args:
        graph: Prepared; not changed.
        block: Of this graph.
        deleted: Compare with nothing in its place; a block of kind "residual" always is.
        runtime: Where it is timed; without one, latency is not measured.
        flows: Choices by kind.
        cost: Decides which merges are done, see ``merge``; ``FewestOperators`` shows one operator also where the passes
            would leave two as the faster form.
        threads: Of onnxruntime.
        budget_s: Time to spend on the clock.
        seed: Of the random input.
    """
    alone = extract_block(graph, block)
    before = merge(alone, runtime=runtime)
    if deleted or block.kind == "residual":
        after, latency = Graph(), None
    else:
        after = merge(build_pruned(alone, [block], [block.name], flows=flows), cost=cost, runtime=runtime)
        latency = None if runtime is None else _time(runtime, before, after, threads, budget_s, seed)
    both = (before, after)
    return BlockCost(
        block=block.name,
        nodes=(len(before.nodes), len(after.nodes)),
        linear=(_linear(before), _linear(after)),
        macs=(count(before).macs, count(after).macs),
        weight_bytes=(sum(constant_bytes(both[0])), sum(constant_bytes(both[1]))),
        operators=tuple(node.op for node in after.nodes),
        latency=latency,
    )


def _time(runtime: Runtime, before: Graph, after: Graph, threads: int, budget_s: float, seed: int) -> LatencyFigures:
    rng = np.random.default_rng(seed)
    feed = {str(t.name): rng.normal(size=t.shape).astype(t.dtype) for t in before.inputs}
    first, second = (to_proto(one).SerializeToString() for one in (before, after))
    return compare_latency(runtime, first, second, feed, threads=threads, budget_s=budget_s)


def _linear(graph: Graph) -> int:
    return sum(node.op in LINEAR for node in graph.nodes)


def constant_bytes(graph: Graph) -> list[int]:
    """Bytes of each initializer that a node reads."""
    constants = dict.fromkeys(t for node in graph.nodes for t in node.inputs if isinstance(t, Constant))
    return [tensor.nbytes for tensor in constants]


def extract_block(graph: Graph, block: Block) -> Graph:
    """A graph of the block alone: what it reads are the inputs, at batch 1 and nominal sizes where they are not known.

    Raises:
        RecipeError: The block is not in the graph.
    """
    wanted = {*block.nodes, *block.shortcut}
    nodes = [node for node in graph.nodes if node.name in wanted]
    made = dict.fromkeys(tensor for node in nodes for tensor in node.outputs)
    output = next((tensor for tensor in made if tensor.name == block.output), None)
    if len(nodes) != len(wanted) or output is None:
        raise RecipeError(f"block {block.name!r} is not in this graph")
    read = dict.fromkeys(t for node in nodes for t in node.inputs if t not in made and not t.is_empty())
    constants = [tensor for tensor in read if isinstance(tensor, Constant)]
    proto = to_proto(graph, weights=False)
    kept = [node for node in proto.graph.node if node.name in wanted]
    for field in ("node", "input", "output", "value_info", "initializer", "quantization_annotation"):
        proto.graph.ClearField(field)
    proto.graph.node.extend(kept)
    proto.graph.input.extend(_value_info(tensor) for tensor in read if not is_constant(tensor))
    proto.graph.output.append(_value_info(output))
    proto.graph.initializer.extend(numpy_helper.from_array(tensor.values, tensor.name) for tensor in constants)
    alone = load(proto)
    infer_shapes(alone)
    return alone


def _value_info(tensor: Tensor) -> ValueInfoProto:
    shape, _ = known_shape(tensor)
    if tensor.dtype is None or shape is None:
        raise RecipeError(f"shape and type of {tensor.name!r} are not known: the block cannot run alone")
    return helper.make_tensor_value_info(tensor.name, helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)), shape)
