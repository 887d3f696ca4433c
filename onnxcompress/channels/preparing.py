"""Bring a graph into the form in which channels are found: cleaned up, and nothing folded into something else.

Equal vectors that several nodes share, such as biases of zeros, are given to each of them: two layers that share one
would lose the same channels.
"""

from __future__ import annotations

import math

from onnxcompress import pipeline
from onnxcompress.graph import Constant, Graph
from onnxcompress.model_io import load, to_proto
from onnxcompress.rewrite import Settings
from onnxcompress.runtime import Runtime
from onnxcompress.shapes import infer_shapes

# What stands for one operator becomes it: the channels of its mean are then known to be those of its input.
FUSED = frozenset({"fuse-layer-normalization", "fuse-rms-normalization"})
SHARING = frozenset({"deduplicate-initializers", "deduplicate-nodes"})
MAX_ELEMENTS = 1 << 14  # of a vector that is copied


def prepare(graph: Graph, runtime: Runtime) -> Graph:
    """A copy in which channels can be found; it computes the same.

    Args:
        graph: Not changed.
        runtime: Where constants are evaluated.
    """
    copied = load(to_proto(graph), folder=graph.folder)
    selected = {cls.name for stage in pipeline.ORDER if stage.name == "cleanup" for cls in stage.passes} - SHARING
    selected |= FUSED
    settings = Settings(evaluate=lambda model, feeds: runtime.run(model.SerializeToString(), [feeds])[0])
    pipeline.run(copied, selected, settings)
    _part(copied)
    seen: set[str] = set()
    for node in copied.nodes:  # what a node makes names it; names of nodes and of tensors may be equal
        name = node.name or node.outputs[0].name or node.op
        node.name = copied.scope.fresh(name) if name in seen else name
        seen.add(node.name)
    infer_shapes(copied)
    return copied


def _part(graph: Graph) -> None:
    """Give each reader its own copy of a vector."""
    seen: set[int] = set()
    for node in graph.nodes:
        inputs = list(node.inputs)
        for slot, tensor in enumerate(inputs):
            if not isinstance(tensor, Constant) or tensor.home not in (None, graph) or graph.is_output(tensor):
                continue
            if sum(size > 1 for size in tensor.shape) > 1 or math.prod(tensor.shape) > MAX_ELEMENTS:
                continue
            if id(tensor) in seen:
                inputs[slot] = graph.new_constant(tensor.name, tensor.values)
            else:
                seen.add(id(tensor))
        if inputs != list(node.inputs):
            node.inputs = inputs
            graph.touch(node)
