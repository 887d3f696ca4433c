"""The constant second input of a Reshape that makes a wanted shape, for every size of its input."""

from __future__ import annotations

from collections.abc import Sequence

from onnxcompress.polynomial import Size
from onnxcompress.sizes import Sizes


def constant_target(sizes: Sizes, source: Sequence[Size], wanted: Sequence[Size | None]) -> list[int] | None:
    """Numbers, 0 where an axis keeps its size (allowzero = 0), and at most one -1; None where they do not exist.

    The number of elements is the same in both shapes, so what a -1 takes is right without a proof. But a Reshape with
    -1 fails when another axis is empty, so the others must be proven not to be.

    Args:
        sizes: What is known of the sizes.
        source: Shape of the input.
        wanted: Shape to make; None for a size about which nothing is known.
    """
    target: list[int] = []
    nonempty = True
    for axis, size in enumerate(wanted):
        if size is not None and size.known is not None and size.known > 0:
            target.append(size.known)
        elif size is not None and axis < len(source) and size == source[axis]:
            target.append(0)
            nonempty = nonempty and sizes.is_positive(size)
        else:
            target.append(-1)
    unknown = target.count(-1)
    return target if unknown == 0 or (unknown == 1 and nonempty) else None
