"""Let an AveragePool or MaxPool do the padding that a Pad did before it, where the two agree.

    before   y = AveragePool<pads = q>(Pad<pads = p, value = 0>(x))      q = 0, or count_include_pad = 1
    after    y = AveragePool<pads = p + q, count_include_pad = 1>(x)

    before   y = MaxPool<pads = q>(Pad<pads = p, value = v>(x))          v below everything in x
    after    y = MaxPool<pads = p + q>(x)

A MaxPool leaves its padding out, so the value must never win: -inf, the lowest float, or, where x cannot be negative
(it comes from a Relu, say), 0 or less. A zero Pad before a MaxPool of anything else stays: its zeros win over the
negatives. Exact, and bitwise so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcompress.graph import Graph, Node, Tensor, is_op, numpy_dtype, optional_input, scalar_value
from onnxcompress.linear.nodes import FLOATS, explicit_pads
from onnxcompress.passes.fuse_pad_into_conv import Padding, is_data_reader, read_pad
from onnxcompress.rewrite import Miss, RewritePass

NEVER_NEGATIVE = ("Relu", "Sigmoid", "HardSigmoid", "Softplus", "Softmax", "Abs", "Exp", "Sqrt")
SAME_SIGN = ("MaxPool", "AveragePool", "Identity", "Transpose", "Reshape")


@dataclass(frozen=True)
class Site:
    pad: Node
    pool: Node
    attrs: dict[str, Any]


class FusePadIntoPool(RewritePass[Site]):
    name = "fuse-pad-into-pool"
    ops = ("Pad",)

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        pool = next((reader for reader in node.outputs[0].outputs if is_op(reader, "AveragePool", "MaxPool")), None)
        if pool is None:
            return None
        if not graph.feeds_only(node.outputs[0], pool) or not is_data_reader(graph, pool, node, pool.op):
            return Miss(node.name, "the padded tensor is read elsewhere")
        kernel = list(pool.attrs["kernel_shape"])
        padding = read_pad(graph, node, len(kernel) + 2)
        if isinstance(padding, str):
            return Miss(node.name, padding)
        own = explicit_pads(pool, kernel)
        reason = "the pads of the pool depend on a size that is not known" if own is None else None
        if own is not None:
            total = [p + q for p, q in zip(padding.pads, own, strict=True)]
            reason = why_not_pool(pool, kernel, own, total) or why_not_value(graph, node, pool, padding, own)
        if own is None or reason is not None:
            return Miss(node.name, str(reason))
        return Site(node, pool, {"pads": total} | ({"count_include_pad": 1} if pool.op == "AveragePool" else {}))

    def rewrite(self, graph: Graph, site: Site) -> None:
        site.pool.inputs = [site.pad.inputs[0]]
        site.pool.attrs.pop("auto_pad", None)
        site.pool.attrs.update(site.attrs)
        graph.touch(site.pool)
        graph.remove(site.pad)


def why_not_pool(pool: Node, kernel: list[int], own: list[int], total: list[int]) -> str | None:
    """The reason why a pool cannot have these pads, whatever the value, or None."""
    if pool.attrs.get("ceil_mode", 0):
        return "the pool rounds its output size up (ceil_mode=1), and how far it may reach depends on its pads"
    if min(own) < 0:
        return f"the pool has pads {own}"
    # A window must hold data; onnxruntime refuses anything else.
    if any(pad >= k for pad, k in zip(total, kernel * 2, strict=True)):
        return f"pads of {total} are not smaller than the kernel {kernel}"
    if any(d != 1 for d in pool.attrs.get("dilations") or []):
        return "a dilated window may see nothing but padding"
    return None


def why_not_value(graph: Graph, node: Node, pool: Node, padding: Padding, own: list[int]) -> str | None:
    """The reason why the value of the padding is not what the pool pads with, or None."""
    if pool.op == "AveragePool":
        if padding.value != 0:
            return f"an AveragePool pads with 0, not {padding.value:.4g}"
        if any(own) and not pool.attrs.get("count_include_pad", 0):
            return "the AveragePool counts the zeros of the Pad and not its own (count_include_pad=0)"
        return None
    if len(pool.outputs) > 1 and not pool.outputs[1].is_empty():
        return "the indices of the MaxPool count the padding"
    dtype = numpy_dtype(node.inputs[0])
    if dtype is None or dtype.name not in FLOATS:
        return f"the element type is {dtype}, not floating point"
    if padding.value <= np.finfo(dtype).min or (padding.value <= 0 and is_never_negative(graph, node.inputs[0])):
        return None
    return f"a MaxPool leaves its padding out, and {padding.value:.4g} can be the largest of a window"


def is_never_negative(graph: Graph, tensor: Tensor) -> bool:
    """Whether the operator that makes ``tensor`` gives no negative numbers."""
    node = graph.producer(tensor)
    while node is not None and is_op(node, *SAME_SIGN):
        node = graph.producer(node.inputs[0])
    if node is None or not is_op(node, "Clip", *NEVER_NEGATIVE):
        return False
    if node.op != "Clip":
        return True
    low = node.attrs.get("min") if graph.opset < 11 else scalar_value(optional_input(node, 1))
    return low is not None and low >= 0
