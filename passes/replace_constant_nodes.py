"""Turn Constant nodes into initializers, so that every other pass sees one kind of constant.

    before   c = Constant<value = ...>()    y = Add(x, c)
    after    y = Add(x, c)                  with initializer c

Exact. Tensors are handed over unread: a large one keeps the very bytes it has in the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxcompress.graph import Constant, Graph, Node
from onnxcompress.rewrite import Miss, RewritePass


@dataclass(frozen=True)
class Site:
    node: Node
    values: np.ndarray | LazyValues


class ReplaceConstantNodes(RewritePass[Site]):
    name = "replace-constant-nodes"
    ops = ("Constant",)

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        if len(node.outputs) != 1 or len(node.attrs) != 1:
            return None
        ((kind, value),) = node.attrs.items()
        values = constant_values(kind, value)
        if values is None:
            return Miss(node.name, f"a Constant with {kind} cannot be a dense initializer")
        if graph.is_output(node.outputs[0]):
            return Miss(node.name, "the constant is a graph output")
        if graph.outer is not None and _is_before_ir4(graph):
            return Miss(node.name, "before IR version 4 a subgraph holds no initializers of its own")
        return Site(node, values)

    def rewrite(self, graph: Graph, site: Site) -> None:
        old = site.node.outputs[0]
        graph.remove(site.node)
        graph.redirect(old, Constant(old.name, site.values, home=graph))


def constant_values(kind: str, value: Any) -> np.ndarray | LazyValues | None:
    """What a Constant node holds in the attribute ``kind``; None when it is not a dense tensor."""
    if kind == "value" and isinstance(value, Constant):
        return value.stored if value.stored is not None else value.values
    if kind in ("value_float", "value_floats"):
        return np.asarray(value, np.float32)
    if kind in ("value_int", "value_ints"):
        return np.asarray(value, np.int64)
    if kind == "value_string":
        return np.asarray(value, object)
    if kind == "value_strings":
        return np.asarray([*value, None], object)[:-1]  # a list of equal-length bytes must not become 2-D
    return None


def _is_before_ir4(graph: Graph) -> bool:
    while graph.outer is not None:
        graph = graph.outer
    return graph.ir_version is not None and graph.ir_version < 4
