"""The constant second input of a Reshape that makes a wanted shape, for every size of its input."""

from __future__ import annotations

from collections.abc import Sequence

from onnxcompress.sizes import Sizes
from onnxcompress.sizes.polynomial import Size


def constant_target(
    sizes: Sizes, source: Sequence[Size], wanted: Sequence[Size | None], left_over: int | None = None
) -> list[int] | None:
    """Numbers, 0 where an axis keeps its size (allowzero = 0), and at most one -1; None where they do not exist.

    The number of elements is the same in both shapes, so what a -1 takes is right without a proof. But a Reshape with
    -1 fails when another axis is empty, so the others must be proven not to be, unless it failed before for that.

    Args:
        sizes: What is known of the sizes.
        source: Shape of the input.
        wanted: Shape to make; None for a size about which nothing is known.
        left_over: The axis at which the original target has its -1.
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
    unknown = [axis for axis, size in enumerate(target) if size == -1]
    if not unknown or (len(unknown) == 1 and (nonempty or unknown[0] == left_over)):
        return target
    return None


def left_over_axis(target: Sequence[Size]) -> int | None:
    """The axis of a Reshape target's -1, when it has one."""
    return next((axis for axis, size in enumerate(target) if size.known == -1), None)
