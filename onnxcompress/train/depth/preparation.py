"""Bring a graph into the form in which blocks are found and trained: cleaned up, named, and nothing folded away.

Cleanup and the fusion of decomposed operators run, and padding joins its Conv. BatchNormalization stays, and equal
initializers stay apart.
"""

from __future__ import annotations

from onnxcompress import pipeline
from onnxcompress.cost import CostModel, MacsAndBytes
from onnxcompress.graph import Graph
from onnxcompress.model_io import load, to_proto
from onnxcompress.rewrite import Settings
from onnxcompress.runtime import Runtime
from onnxcompress.shapes import infer_shapes

# Made one, equal initializers would be trained as one.
SHARING = frozenset({"deduplicate-initializers", "deduplicate-nodes"})
PREPARING = frozenset(
    cls.name for stage in pipeline.ORDER if stage.name in ("cleanup", "fusion") for cls in stage.passes
) - SHARING | {"fuse-pad-into-conv"}


def copy_graph(graph: Graph) -> Graph:
    """A graph of its own with the same names and numbers, shapes inferred."""
    copied = load(to_proto(graph), folder=graph.folder)
    infer_shapes(copied)
    return copied


def prepare(graph: Graph, *, runtime: Runtime | None = None) -> Graph:
    """A copy in which blocks can be found; it computes the same.

    Args:
        graph: Not changed.
        runtime: Where constants are evaluated; one of its own when None.
    """
    prepared = copy_graph(graph)
    run_passes(prepared, set(PREPARING), MacsAndBytes(), runtime)
    seen: set[str] = set()
    for inner in prepared.walk():
        for node in inner.nodes:
            if not node.name or node.name in seen:
                node.name = prepared.scope.fresh(node.name or node.outputs[0].name or node.op)
            seen.add(node.name)
    return prepared


def run_passes(graph: Graph, selected: set[str], cost: CostModel, runtime: Runtime | None) -> None:
    """Run passes over a graph in place, constants evaluated by onnxruntime."""
    own = None if runtime is not None else Runtime()
    try:
        used = runtime or own
        assert used is not None
        settings = Settings(cost=cost, evaluate=lambda model, feeds: used.run(model.SerializeToString(), [feeds])[0])
        pipeline.run(graph, selected, settings)
    finally:
        if own is not None:
            own.close()
    infer_shapes(graph)
