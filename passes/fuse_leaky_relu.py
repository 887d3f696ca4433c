"""Fuse the larger of x and a fraction of it into LeakyRelu (Maas et al. 2013).

    before   y = Max(x, a * x) with 0 < a < 1, Min(x, a * x) with a > 1
    after    y = LeakyRelu<alpha = a>(x)

Bitwise the same in onnxruntime, infinities and NaN included. Time on onnxruntime 1.31, one thread: 119 -> 84 us for
(1, 96, 56, 56), 21 -> 16 us for (1, 768, 7, 7).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxcompress.graph import Graph, Node, Tensor
from onnxcompress.patterns.cones import replace_cone, why_not_replace
from onnxcompress.patterns.scalar_algebra import float_dtype, read_polynomial
from onnxcompress.rewrite import Miss, RewritePass

OPSET_OF_DOUBLE = 16  # onnxruntime has no LeakyRelu for float64 before


@dataclass(frozen=True)
class Site:
    source: Tensor
    output: Tensor
    alpha: float
    nodes: tuple[Node, ...]


class FuseLeakyRelu(RewritePass[Site]):
    name = "fuse-leaky-relu"
    ops = ("Max", "Min")

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        if len(node.inputs) != 2:
            return None
        for source, other in (node.inputs, node.inputs[::-1]):
            slope = read_polynomial(graph, other, [source])
            if slope is None or slope.coefficients.keys() != {(1,)} or not slope.nodes:
                continue
            alpha = slope.coefficients[(1,)]
            if not (0 < alpha < 1 if node.op == "Max" else alpha > 1):
                return Miss(node.name, f"{node.op} of x and {alpha:.7g} x is no LeakyRelu")
            dtype = float_dtype(source)
            if dtype is None:
                return Miss(node.name, "the input is not known to be float16, float32 or float64")
            if dtype == np.float64 and (graph.opset < OPSET_OF_DOUBLE or float(np.float32(alpha)) != alpha):
                return Miss(node.name, "alpha would be rounded to float32")
            output, nodes = node.outputs[0], (node, *slope.nodes)
            reason = why_not_replace(graph, nodes, output)
            return Miss(node.name, reason) if reason is not None else Site(source, output, alpha, nodes)
        return None

    def rewrite(self, graph: Graph, site: Site) -> None:
        replace_cone(graph, site.nodes, site.output, "LeakyRelu", [site.source], {"alpha": site.alpha})
