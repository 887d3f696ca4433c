"""Fuse two Casts of which the first loses nothing.

    before   y = Cast<to = int32>(Cast<to = int64>(x))      with x of type int32
    after    x

Exact. The first type must represent every value of the input's type, and the second Cast must then do the same from
either: it loses nothing as well, or it wraps integers, or it rounds once to float32 or float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxcompress.graph import Graph, Node, is_op, numpy_dtype
from onnxcompress.model_io import element_dtype
from onnxcompress.rewrite import Miss, RewritePass, remove_if_unread

# Bits of the significand, and the exponent of the largest power of two.
FLOATS = {"bfloat16": (8, 127), "float16": (11, 15), "float32": (24, 127), "float64": (53, 1023)}


@dataclass(frozen=True)
class Site:
    first: Node
    second: Node
    undone: bool


class FuseCastChain(RewritePass[Site]):
    name = "fuse-cast-chain"
    ops = ("Cast",)

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        first = graph.producer(node.inputs[0])
        if first is None or not is_op(first, "Cast"):
            return None
        source = numpy_dtype(first.inputs[0])
        middle, target = (element_dtype(int(cast.attrs["to"])) for cast in (first, node))
        if source is None or middle is None or target is None:
            return None
        if not loses_nothing(source, middle):
            return Miss(node.name, f"{source.name} to {middle.name} may lose something")
        if not same_cast(source, middle, target):
            return Miss(node.name, f"{source.name} to {target.name} may differ from {middle.name} to {target.name}")
        undone = source == target and graph.why_not_bypass(node.outputs[0], first.inputs[0]) is None
        return Site(first, node, undone)

    def rewrite(self, graph: Graph, site: Site) -> None:
        first, second = site.first, site.second
        if site.undone:
            graph.bypass(second.outputs[0], first.inputs[0])
            graph.remove(second)
        else:
            second.inputs = [first.inputs[0]]
            graph.touch(second)
        remove_if_unread(graph, [first])


def is_integer(dtype: np.dtype) -> bool:
    """Whether it is an integer type of 8 bits or more."""
    return dtype.kind in "iu" and dtype.isbuiltin == 1


def loses_nothing(source: np.dtype, target: np.dtype) -> bool:
    """Whether every value of ``source`` is one of ``target``."""
    if source == target:
        return source == np.bool_ or is_integer(source) or source.name in FLOATS
    if source == np.bool_:
        return is_integer(target) or target.name in FLOATS
    if is_integer(source):
        limits = np.iinfo(source)
        if is_integer(target):
            return bool(np.iinfo(target).min <= limits.min and limits.max <= np.iinfo(target).max)
        return target.name in FLOATS and limits.bits <= FLOATS[target.name][0]
    if source.name in FLOATS and target.name in FLOATS:
        return all(a <= b for a, b in zip(FLOATS[source.name], FLOATS[target.name], strict=True))
    return False


def same_cast(source: np.dtype, middle: np.dtype, target: np.dtype) -> bool:
    """Whether a value of ``source`` becomes the same in ``target``, come from ``source`` or from ``middle``."""
    if loses_nothing(source, target) or target == np.bool_:
        return True
    if is_integer(source) and is_integer(middle) and is_integer(target):
        return True  # wraps modulo 2^n from either
    return target.name in ("float32", "float64") and (source.kind == middle.kind or middle.kind == "f")
