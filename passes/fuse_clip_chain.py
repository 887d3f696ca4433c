"""Fuse Clip and Relu that follow each other into one Clip.

    before   y = Clip(Relu(x), a, b)
    after    y = Clip(x, max(a, 0), max(b, 0))

An outer interval that holds the inner one is dropped; otherwise the ends of the inner interval, clamped by the outer
one, are those of both. Exact: onnxruntime lets NaN and -0.0 pass through Relu and through Clip at 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcompress.graph import Graph, Node, Tensor, Variable
from onnxcompress.patterns.clamps import Clamp, read_clamp
from onnxcompress.rewrite import Miss, RewritePass


@dataclass(frozen=True)
class Site:
    first: Node
    second: Node
    clamp: Clamp | None  # None when the second does nothing


class FuseClipChain(RewritePass[Site]):
    name = "fuse-clip-chain"
    ops = ("Clip", "Relu")

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        first = graph.producer(node.inputs[0])
        inner, outer = read_clamp(graph, first), read_clamp(graph, node)
        if first is None or inner is None or outer is None:
            return None
        low, high = outer.of(inner.low), outer.of(inner.high)
        if low == inner.low and high == inner.high:
            reason = graph.why_not_bypass(node.outputs[0], first.outputs[0])
            return Miss(node.name, reason) if reason is not None else Site(first, node, None)
        if not graph.feeds_only(first.outputs[0], node):
            return Miss(node.name, f"the {first.op} output is read elsewhere")
        if high == np.inf or (inner.dtype.kind in "iu" and graph.opset < 12) or graph.opset < 6:
            return None
        clamps = (inner, outer)
        default_low = any(clamp.low_is_default and clamp.low == low for clamp in clamps)
        default_high = any(clamp.high_is_default and clamp.high == high for clamp in clamps)
        return Site(first, node, Clamp(low, high, inner.dtype, default_low, default_high))

    def rewrite(self, graph: Graph, site: Site) -> None:
        first, second, clamp = site.first, site.second, site.clamp
        if clamp is None:
            graph.bypass(second.outputs[0], first.outputs[0])
            graph.remove(second)
            return
        source, output = first.inputs[0], second.outputs[0]
        inputs: list[Tensor] = [source]
        attrs: dict[str, Any] = {}
        bounds = [("min", clamp.low, clamp.low_is_default), ("max", clamp.high, clamp.high_is_default)]
        for name, value, default in bounds:
            if graph.opset >= 11:
                label = f"{second.name or output.name}.{name}"
                inputs.append(Variable.empty() if default else graph.new_constant(label, np.asarray(value)))
            elif not default:
                attrs[name] = float(value)
        graph.insert("Clip", inputs, [output], attrs, before=second)
        graph.remove(second, first)
