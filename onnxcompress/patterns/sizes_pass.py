"""The base of passes that ask what is known of computed sizes."""

from __future__ import annotations

from onnxcompress.graph import Graph
from onnxcompress.rewrite import PassResult, RewritePass, S
from onnxcompress.sizes import Sizes


class SizesPass(RewritePass[S]):
    """A pass that asks for ``Sizes``: made at most once per graph and sweep."""

    def sweep(self, graph: Graph, result: PassResult) -> None:
        if graph.outer is None:
            self._sizes: dict[Graph, Sizes] = {}  # shapes were inferred anew
        super().sweep(graph, result)

    def sizes(self, graph: Graph) -> Sizes:
        """What is known of the sizes in ``graph``."""
        if graph not in self._sizes:
            self._sizes[graph] = Sizes(graph, None if graph.outer is None else self.sizes(graph.outer))
        return self._sizes[graph]
