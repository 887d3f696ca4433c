"""Operators that work along rows and columns: convolutions, pools, Resize, pixel blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcompress.graph import Node, constant_value, is_op, optional_input, static_shape
from onnxcompress.resolution.axes import Axes, Axis, Factor, axis_of
from onnxcompress.resolution.walk import Walk, constant_ints


@dataclass(frozen=True)
class Window:
    """How a kernel moves along one axis."""

    kernel: int
    stride: int
    dilation: int
    pad: int
    before: int
    auto_pad: str = "NOTSET"
    ceil: bool = False

    def count(self, size: int) -> int:
        """How many places it has; below 1 where it does not fit."""
        reach = self.dilation * (self.kernel - 1) + 1
        if self.auto_pad.startswith("SAME"):
            return -(-size // self.stride)
        room = size + (0 if self.auto_pad == "VALID" else self.pad) - reach
        if room < 0:
            return 0
        if not self.ceil:
            return room // self.stride + 1
        places = -(-room // self.stride) + 1
        return places - 1 if (places - 1) * self.stride >= size + self.before else places  # none begins in the padding


def _windows(node: Node, kernel: Sequence[int]) -> list[Window]:
    rank = len(kernel)
    strides = list(node.attrs.get("strides") or [1] * rank)
    dilations = list(node.attrs.get("dilations") or [1] * rank)
    pads = list(node.attrs.get("pads") or [0] * 2 * rank)
    auto, ceil = node.attrs.get("auto_pad") or "NOTSET", bool(node.attrs.get("ceil_mode", 0))
    return [
        Window(kernel[i], strides[i], dilations[i], pads[i] + pads[i + rank], pads[i], auto, ceil) for i in range(rank)
    ]


def like(axis: Axis, old: int, new: int) -> Axis:
    """An axis that still counts what ``axis`` counts."""
    return Axis(((Factor(old, new, axis.side),),))


def conv(walk: Walk, node: Node) -> None:
    """Conv and its integer forms."""
    weight = node.inputs[3 if node.op == "QLinearConv" else 1]
    shape, x = static_shape(weight), walk.of(node.inputs[0])
    _want_unchanged(walk, node, x[1:2], "its channels")
    if shape is None or walk.changed(weight):
        raise walk.refuse(node, "has a weight whose size changes")
    found = []
    for axis, window in zip(x[2:], _windows(node, shape[2:]), strict=True):
        old, new = window.count(axis.old), window.count(axis.new)
        if axis.changed and (new < 1 or (old == 1 and new != 1)):
            raise walk.refuse(
                node,
                f"has a kernel of {window.kernel}, which fits {axis.old} and not {axis.new}: it is tied to the size",
            )
        tiles = window.kernel == window.stride > 1 and not window.pad and window.auto_pad in ("NOTSET", "VALID")
        if tiles and axis.new % window.stride and not axis.old % window.stride:
            walk.lose(node, f"{axis.new % window.stride} of {axis.new} {axis.side or 'places'} are in no patch")
        found.append(like(axis, old, new))
    walk.set(node.outputs[0], (x[0], axis_of(_channels(node)), *found))


def _channels(node: Node) -> int:
    """Output channels; the shape that was inferred holds them."""
    return int(node.outputs[0].shape[1])


def conv_transpose(walk: Walk, node: Node) -> None:
    """ConvTranspose."""
    shape, x = static_shape(node.inputs[1]), walk.of(node.inputs[0])
    _want_unchanged(walk, node, x[1:2], "its channels")
    if shape is None or walk.changed(node.inputs[1]):
        raise walk.refuse(node, "has a weight whose size changes")
    if node.attrs.get("output_shape"):
        raise walk.refuse(node, "has a fixed output_shape")
    extra = list(node.attrs.get("output_padding") or [0] * (len(shape) - 2))
    found = []
    for i, (axis, window) in enumerate(zip(x[2:], _windows(node, shape[2:]), strict=True)):
        sizes = []
        for size in (axis.old, axis.new):
            reach = window.dilation * (window.kernel - 1) + 1
            if window.auto_pad.startswith("SAME"):
                sizes.append(size * window.stride)
            else:
                pad = 0 if window.auto_pad == "VALID" else window.pad
                sizes.append(window.stride * (size - 1) + extra[i] + reach - pad)
        found.append(like(axis, *sizes))
    walk.set(node.outputs[0], (x[0], axis_of(_channels(node)), *found))


def pool(walk: Walk, node: Node) -> None:
    """AveragePool, MaxPool, LpPool; a kernel as large as its input was a global pool, and becomes one."""
    x = walk.of(node.inputs[0])
    kernel = list(node.attrs["kernel_shape"])
    windows = _windows(node, kernel)
    _want_unchanged(walk, node, x[1:2], "its channels")
    whole = all(w.kernel == axis.old and not w.pad for w, axis in zip(windows, x[2:], strict=True))
    if whole and any(axis.changed for axis in x[2:]) and max(kernel) > 1:
        sizes = [axis.new for axis in x[2:]]
        steps = [new if w.stride == w.kernel else w.stride for w, new in zip(windows, sizes, strict=True)]

        def act() -> None:
            node.attrs["kernel_shape"] = sizes
            if node.attrs.get("strides"):
                node.attrs["strides"] = steps
            walk.graph.touch(node)

        walk.later(node, f"kernel {kernel} of the whole image is now {sizes}", act)
        walk.set(node.outputs[0], (*x[:2], *(axis_of(1) for _ in sizes)))
    else:
        found = [like(axis, w.count(axis.old), w.count(axis.new)) for axis, w in zip(x[2:], windows, strict=True)]
        walk.set(node.outputs[0], (*x[:2], *found))
    if len(node.outputs) > 1 and not node.outputs[1].is_empty():
        raise walk.refuse(node, "gives places as numbers, which mean another place at another size")


def global_pool(walk: Walk, node: Node) -> None:
    """GlobalAveragePool and its kind."""
    x = walk.of(node.inputs[0])
    walk.set(node.outputs[0], (*x[:2], *(axis_of(1) for _ in x[2:])))


def resize(walk: Walk, node: Node) -> None:
    """Resize and Upsample: scales stay, sizes change with their input."""
    x, y = walk.of(node.inputs[0]), node.outputs[0]
    old = walk.old_shape(y)
    assert old is not None
    given = optional_input(node, 3) if is_op(node, "Resize") else None
    axes = [int(a) % len(x) for a in node.attrs.get("axes") or range(len(x))]
    if given is not None:
        _resize_to_sizes(walk, node, x, old, axes)
        return
    scales = constant_value(optional_input(node, 1 if node.op == "Upsample" or walk.graph.opset < 11 else 2))
    factors = node.attrs.get("scales") if scales is None else scales.reshape(-1)
    if factors is None:
        raise walk.refuse(node, "has scales that are computed")
    found = list(x)
    for axis, factor in zip(axes, factors, strict=True):
        found[axis] = like(x[axis], old[axis], int(np.floor(np.float32(x[axis].new) * np.float32(factor))))
        if not x[axis].changed and found[axis].old == x[axis].old:
            found[axis] = x[axis]
    walk.set(y, tuple(found))


def _resize_to_sizes(walk: Walk, node: Node, x: Axes, old: Sequence[int], axes: Sequence[int]) -> None:
    if node.attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise walk.refuse(node, "keeps the aspect ratio, which is not followed")
    sizes = constant_value(node.inputs[3])
    computed = walk.new_values(node.inputs[3])
    found = list(x)
    if sizes is None:
        if computed is None:
            raise walk.refuse(node, "has sizes that are computed in a way that is not followed")
        for axis, size in zip(axes, computed, strict=True):
            found[axis] = (
                x[axis] if x[axis].old == old[axis] and x[axis].new == size else like(x[axis], old[axis], size)
            )
        walk.set(node.outputs[0], tuple(found))
        return
    wanted = sizes.copy()
    for index, axis in enumerate(axes):
        target = _target(walk, x, axis, old[axis])
        found[axis] = x[axis] if x[axis].old == old[axis] and x[axis].new == target.new else target
        wanted[index] = found[axis].new
    if (wanted != sizes).any():
        walk.new_input(node, 3, wanted, f"sizes {sizes.tolist()} are now {wanted.tolist()}")
    walk.set(node.outputs[0], tuple(found))


def _target(walk: Walk, x: Axes, axis: int, old: int) -> Axis:
    """What an axis is resized to: the new length of what had that length, or in proportion."""
    source = x[axis]
    if source.old == old:
        return source
    if not source.changed:
        # One number for the whole image is spread over all of it.
        new = (
            walk.like("rows" if axis == 2 else "columns", old) if source.old == 1 and len(x) == 4 and axis > 1 else None
        )
        return axis_of(old, old if new is None else new, "" if new is None else "rows" if axis == 2 else "columns")
    new = walk.like(source.side, old)
    return like(source, old, max(1, round(source.new * old / source.old)) if new is None else new)


def depth_to_space(walk: Walk, node: Node) -> None:
    """DepthToSpace (PixelShuffle)."""
    x, block = walk.of(node.inputs[0]), int(node.attrs["blocksize"])
    _want_unchanged(walk, node, x[1:2], "its channels")
    found = [like(axis, axis.old * block, axis.new * block) for axis in x[2:]]
    walk.set(node.outputs[0], (x[0], axis_of(x[1].old // block**2), *found))


def space_to_depth(walk: Walk, node: Node) -> None:
    """SpaceToDepth."""
    x, block = walk.of(node.inputs[0]), int(node.attrs["blocksize"])
    _want_unchanged(walk, node, x[1:2], "its channels")
    if any(axis.new % block for axis in x[2:]):
        raise walk.refuse(node, f"needs multiples of {block}, not {[axis.new for axis in x[2:]]}")
    found = [like(axis, axis.old // block, axis.new // block) for axis in x[2:]]
    walk.set(node.outputs[0], (x[0], axis_of(x[1].old * block**2), *found))


def _want_unchanged(walk: Walk, node: Node, axes: Sequence[Axis], what: str) -> None:
    for axis in axes:
        if axis.changed:
            raise walk.refuse(node, f"would have {axis.new} for {axis.old} as {what}")


def pad(walk: Walk, node: Node) -> None:
    """Pad by numbers that are known."""
    x = walk.of(node.inputs[0])
    old, new = (constant_ints(node, 1, "pads") or values(optional_input(node, 1)) for values in _both(walk))
    axes = list(range(len(x)))
    if optional_input(node, 3) is not None:
        given = constant_ints(node, 3, "")
        if given is None:
            raise walk.refuse(node, "pads axes that are computed")
        axes = [axis % len(x) for axis in given]
    if old is None or new is None:
        raise walk.refuse(node, "pads by numbers that are not known")
    found = list(x)
    for index, axis in enumerate(axes):
        more = [numbers[index] + numbers[index + len(axes)] for numbers in (old, new)]
        if any(more):
            found[axis] = like(x[axis], x[axis].old + more[0], x[axis].new + more[1])
            if (
                node.attrs.get("mode", "constant") == "reflect"
                and max(new[index], new[index + len(axes)]) >= x[axis].new
            ):
                raise walk.refuse(node, f"mirrors {max(new[index], new[index + len(axes)])} of {x[axis].new} places")
    walk.set(node.outputs[0], tuple(found))


def _both(walk: Walk) -> tuple[Callable[..., list[int] | None], ...]:
    return walk.old_values, walk.new_values
