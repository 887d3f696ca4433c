"""Let a Conv do the padding with zeros that a Pad did before it.

    before   y = Conv<pads = q>(Pad<pads = p, value = 0>(x), W, b)
    after    y = Conv<pads = p + q>(x, W, b)

All readers of the Pad must be Convs. Exact, and bitwise so: the same products are summed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxcompress.graph import (
    Graph,
    Node,
    Tensor,
    constant_value,
    is_op,
    optional_input,
    rank,
    scalar_value,
    static_shape,
)
from onnxcompress.linear.nodes import explicit_pads
from onnxcompress.rewrite import Miss, RewritePass


@dataclass(frozen=True)
class Site:
    pad: Node
    changes: tuple[tuple[Node, list[int]], ...]  # each reader with its new pads


class FusePadIntoConv(RewritePass[Site]):
    name = "fuse-pad-into-conv"
    ops = ("Pad",)

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        readers = list(dict.fromkeys(node.outputs[0].outputs))
        if not any(is_op(reader, "Conv") for reader in readers):
            return None
        if graph.is_output(node.outputs[0]) or not all(
            is_data_reader(graph, reader, node, "Conv") for reader in readers
        ):
            return Miss(node.name, "the padded tensor is read elsewhere")
        padding = read_pad(graph, node, rank(node.inputs[0]) or rank(readers[0].inputs[1]))
        if isinstance(padding, str):
            return Miss(node.name, padding)
        if padding.value != 0:
            return Miss(node.name, f"a Conv pads with 0, not {padding.value:.4g}")
        changes = []
        for reader in readers:
            kernel = static_shape(reader.inputs[1])
            own = None if kernel is None else explicit_pads(reader, kernel[2:])
            if own is None:
                return Miss(node.name, "the pads of the Conv depend on a size that is not known")
            if len(own) != len(padding.pads) or any(pad < 0 for pad in own):
                return Miss(node.name, f"the Conv has pads {own}")
            changes.append((reader, [p + q for p, q in zip(padding.pads, own, strict=True)]))
        return Site(node, tuple(changes))

    def rewrite(self, graph: Graph, site: Site) -> None:
        for reader, pads in site.changes:
            reader.inputs = [site.pad.inputs[0], *reader.inputs[1:]]
            reader.attrs.pop("auto_pad", None)
            reader.attrs["pads"] = pads
            graph.touch(reader)
        graph.remove(site.pad)


@dataclass(frozen=True)
class Padding:
    """A Pad along spatial axes with one constant: every begin, then every end, and the value."""

    pads: list[int]
    value: float


def read_pad(graph: Graph, node: Node, axes: int | None) -> Padding | str:
    """A Pad node, or the reason why it is not a constant padding of spatial axes.

    Args:
        graph: Its graph.
        node: The Pad; amounts are attributes before opset 11, ``axes`` exist from opset 18 on.
        axes: Rank of its input, None where it is not known.
    """
    mode = node.attrs.get("mode", "constant")
    if mode != "constant":
        return f"the Pad repeats the border (mode {mode!r})"
    if graph.opset < 11:
        amounts, value = node.attrs.get("pads"), node.attrs.get("value", 0.0)
        along: Tensor | None = None
    else:
        found = constant_value(optional_input(node, 1))
        amounts = None if found is None else [int(pad) for pad in found.reshape(-1)]
        given, along = optional_input(node, 2), optional_input(node, 3)
        value = 0.0 if given is None else scalar_value(given)
    if amounts is None or value is None:
        return "the amounts or the value of the Pad are not constants"
    if axes is None:
        return "the rank of what is padded is not known"
    chosen = constant_value(along) if along is not None else np.arange(axes)
    if chosen is None:
        return "the axes of the Pad are not constants"
    count = len(chosen)
    if len(amounts) != 2 * count:
        return f"the Pad has {len(amounts)} amounts for {count} axes"
    begin, end = [0] * axes, [0] * axes
    for i, axis in enumerate(chosen.reshape(-1)):
        begin[int(axis)], end[int(axis)] = int(amounts[i]), int(amounts[i + count])
    if any(begin[:2]) or any(end[:2]):
        return "the Pad adds samples or channels"
    if min(begin + end) < 0:
        return "the Pad takes away from the border"
    return Padding(begin[2:] + end[2:], float(value))


def is_data_reader(graph: Graph, reader: Node, node: Node, *ops: str) -> bool:
    """Whether ``reader`` is one of ``ops``, in this graph, and reads the output of ``node`` as its data and once."""
    places = [i for i, tensor in enumerate(reader.inputs) if tensor is node.outputs[0]]
    return is_op(reader, *ops) and reader.graph is graph and places == [0]
