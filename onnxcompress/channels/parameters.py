"""What nodes are told by attributes or constant inputs, depending on the opset."""

from __future__ import annotations

from onnxcompress.channels.trace import constant_input, ints
from onnxcompress.graph import Node, optional_input


def axes_given(node: Node, slot: int) -> list[int] | None:
    """Axes from the attribute or a constant input; None when there are none or they are not known."""
    given = node.attrs.get("axes")
    if given is None:
        given = constant_input(node, slot)
    return None if given is None else ints(given)


def slice_numbers(node: Node, rank: int) -> tuple[list[int], list[int], list[int], list[int]] | None:
    """(starts, ends, axes, steps) of a Slice; None where one is computed."""
    if "starts" in node.attrs:
        starts, ends = list(node.attrs["starts"]), list(node.attrs["ends"])
        axes, steps = list(node.attrs.get("axes") or range(len(starts))), [1] * len(starts)
    else:
        found = [constant_input(node, slot) for slot in range(1, 5)]
        if found[0] is None or found[1] is None:
            return None
        if any(found[s - 1] is None and optional_input(node, s) is not None for s in (3, 4)):
            return None
        starts, ends = ints(found[0]), ints(found[1])
        axes = list(range(len(starts))) if found[2] is None else ints(found[2])
        steps = [1] * len(starts) if found[3] is None else ints(found[3])
    return starts, ends, [axis % rank for axis in axes], steps
