"""Let initializers with the same type, shape and bytes be one initializer.

    before   y = Add(Mul(x, a), b)      with a and b equal, bit for bit
    after    y = Add(Mul(x, a), a)

Exact. Large tensors are compared by a SHA-256 digest, read one at a time. Those of a subgraph may give way to an equal
one of a graph around it, never the other way. Graph outputs and initializers that the caller may override stay.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from onnxcompress.graph import Constant, Graph
from onnxcompress.rewrite import PassResult, Rewrite, RewritePass


@dataclass(frozen=True)
class Site:
    kept: Constant
    dropped: Constant


class DeduplicateInitializers(RewritePass[Site]):
    name = "deduplicate-initializers"

    def sweep(self, graph: Graph, result: PassResult) -> None:
        if graph.outer is not None:
            return  # seen from the outermost graph
        homes = constants_by_home(graph)
        counts = Counter(kind(constant) for constants in homes.values() for constant in constants)
        seen: dict[Graph, dict[Hashable, Constant]] = {}
        digests: dict[Constant, Hashable] = {}
        for home in graph.walk():
            known = dict(seen[home.outer]) if home.outer in seen else {}
            seen[home] = known
            for constant in homes.get(home, []):
                if counts[kind(constant)] < 2:
                    continue
                digest = digests.setdefault(constant, (kind(constant), content(constant)))
                kept = known.setdefault(digest, constant)
                if kept is not constant and not home.is_output(constant):
                    self.rewrite(home, Site(kept, constant))
                    result.done.append(Rewrite(constant.name, detail=f"the same as {kept.name}"))

    def rewrite(self, graph: Graph, site: Site) -> None:
        graph.redirect(site.dropped, site.kept)


def constants_by_home(root: Graph) -> dict[Graph, list[Constant]]:
    """Initializers that are read, by the graph that holds them, in the order of their first reader."""
    homes: dict[Graph, dict[Constant, None]] = {}
    for graph in root.walk():
        for tensor in [*(t for node in graph.nodes for t in node.inputs), *graph.outputs]:
            if isinstance(tensor, Constant):
                homes.setdefault(tensor.home or graph, {})[tensor] = None
    return {home: list(constants) for home, constants in homes.items()}


def kind(constant: Constant) -> tuple[str, tuple[int, ...]]:
    """Type and shape, known without reading the values."""
    return str(np.dtype(constant.dtype)), tuple(constant.shape)


def content(constant: Constant) -> Hashable:
    """The elements, or their digest when they are many."""
    values = constant.values
    if values.dtype == object:
        return tuple(values.reshape(-1).tolist())
    if values.nbytes <= 64:
        return values.tobytes()
    return hashlib.sha256(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data).digest()
