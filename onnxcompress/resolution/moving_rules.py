"""Operators that move elements, or take some: Reshape, Concat, Slice, reductions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from onnxcompress.graph import Node, Tensor, constant_value, is_constant, is_op, optional_input
from onnxcompress.resolution.axes import Axes, Axis, Factor, axis_of, cut, joined, regrouped
from onnxcompress.resolution.old_shapes import range_bounds
from onnxcompress.resolution.walk import Walk, constant_ints
from onnxcompress.sizes import known_or, slice_bounds

# A cut so near to the border that it is a border, not a share of the image.
BORDER = 2


def reshape(walk: Walk, node: Node) -> None:
    """Reshape: the target gets the new sizes."""
    x, y = walk.of(node.inputs[0]), node.outputs[0]
    old = walk.old_shape(y)
    assert old is not None
    axes = regrouped(x, old)
    if axes is None:
        sizes = [axis.old for axis in x]
        raise walk.refuse(node, f"makes {list(old)} of {sizes}, and where rows and columns go is not known")
    _give_target(walk, node, x, axes)
    walk.set(y, axes)


def _give_target(walk: Walk, node: Node, x: Axes, axes: Axes) -> None:
    """Let the target of a Reshape make these axes, if it does not yet."""
    wanted = [axis.new for axis in axes]
    given = optional_input(node, 1)
    target = walk.new_values(given) if given is not None else list(node.attrs.get("shape", []))
    source, allow_zero = [a.new for a in x], bool(node.attrs.get("allowzero", 0))
    if target is not None and _made(target, source, allow_zero) == wanted:
        return
    if target is not None and given is not None and is_constant(given):
        kept = [n if n in (0, -1) else axis.new for n, axis in zip(target, axes, strict=True)]
        if _made(kept, source, allow_zero) == wanted:
            walk.new_input(node, 1, np.array(kept, np.int64), f"target {target} is now {kept}")
            return
    numbers = [_open_or(axis, i, x) for i, axis in enumerate(axes)]
    unknown = [i for i, number in enumerate(numbers) if number is None]
    if len(unknown) > 1 or given is None or allow_zero:
        raise walk.refuse(node, f"has a target that {wanted} cannot be put into")
    values = np.array([-1 if number is None else number for number in numbers], np.int64)
    before = "a computed one" if target is None or not is_constant(given) else str(target)
    walk.new_input(node, 1, values, f"target {before} is now {values.tolist()}")


def _open_or(axis: Axis, index: int, x: Axes) -> int | None:
    """What stands for an axis in a target: its number, 0 where it is copied, None where it is open."""
    if not axis.is_free:
        return axis.new
    return 0 if index < len(x) and x[index] == axis else None


def _made(target: Sequence[int], source: Sequence[int], allow_zero: bool) -> list[int] | None:
    """The shape that a Reshape makes; None when it fails."""
    shape = [source[i] if n == 0 and not allow_zero and i < len(source) else n for i, n in enumerate(target)]
    if shape.count(-1) == 1:
        rest = math.prod(n for n in shape if n != -1)
        if not rest or math.prod(source) % rest:
            return None
        shape[shape.index(-1)] = math.prod(source) // rest
    return shape if math.prod(shape) == math.prod(source) else None


def flatten(walk: Walk, node: Node) -> None:
    """Flatten to two axes."""
    x = walk.of(node.inputs[0])
    axis = int(node.attrs.get("axis", 1))
    axis += len(x) if axis < 0 else 0
    halves = [math.prod(a.old for a in part) for part in (x[:axis], x[axis:])]
    axes = regrouped(x, halves)
    if axes is None:
        raise walk.refuse(node, f"makes {halves} of {[a.old for a in x]}, and where places go is not known")
    walk.set(node.outputs[0], axes)


def transpose(walk: Walk, node: Node) -> None:
    """Transpose."""
    x = walk.of(node.inputs[0])
    order = node.attrs.get("perm") or list(range(len(x)))[::-1]
    walk.set(node.outputs[0], tuple(x[i] for i in order))


def squeeze(walk: Walk, node: Node) -> None:
    """Squeeze and Unsqueeze."""
    x, y = walk.of(node.inputs[0]), node.outputs[0]
    axes = constant_ints(node, 1, "axes") or walk.new_values(optional_input(node, 1))
    if is_op(node, "Unsqueeze"):
        if axes is None:
            raise walk.refuse(node, "has axes that are not known")
        rank = len(x) + len(axes)
        rest = iter(x)
        walk.set(y, tuple(axis_of(1) if i in {a % rank for a in axes} else next(rest) for i in range(rank)))
        return
    gone = [a % len(x) for a in axes] if axes is not None else [i for i, axis in enumerate(x) if axis.old == 1]
    if axes is None and any(axis.old > 1 and axis.new == 1 for axis in x):
        raise walk.refuse(node, "would take away an axis that has become 1")
    walk.set(y, tuple(axis for i, axis in enumerate(x) if i not in gone))


def concat(walk: Walk, node: Node) -> None:
    """Concat: one behind the other; other axes must stay equal."""
    parts = [walk.of(tensor) for tensor in node.inputs]
    rank = len(parts[0])
    along = int(node.attrs["axis"]) % rank
    found: list[Axis] = []
    for i in range(rank):
        if i == along:
            found.append(joined([part[i] for part in parts]))
            continue
        sizes = {part[i].new for part in parts}
        if len(sizes) > 1:
            raise walk.refuse(node, f"joins parts that would be {sorted(sizes)} long, and were {parts[0][i].old}")
        found.append(max((part[i] for part in parts), key=lambda a: (a.is_free, a.changed, bool(a.side))))
    walk.set(node.outputs[0], tuple(found))


def slice_(walk: Walk, node: Node) -> None:
    """Slice: what is tied to the size of an axis follows it."""
    x = walk.of(node.inputs[0])
    bounds = slice_bounds(walk.new, node)
    if bounds is None:
        raise walk.refuse(node, "has limits that are not known")
    old_bounds = slice_bounds(walk.old, node)
    starts, ends = bounds[0].known, bounds[1].known
    old_starts, old_ends = (old_bounds[0].known, old_bounds[1].known) if old_bounds is not None else (None, None)
    if starts is None or ends is None or old_starts is None or old_ends is None:
        raise walk.refuse(node, "has limits that are not known")
    found, new_starts, new_ends = list(x), list(starts), list(ends)
    for index, (axis, step) in enumerate(zip(bounds[2], bounds[3], strict=True)):
        axis %= len(x)
        own = x[axis]
        if not own.changed:
            begin, end, _ = slice(starts[index], ends[index], step).indices(own.old)
            kept = len(range(begin, end, step))
            found[axis] = own if kept == own.old else axis_of(kept)
            continue
        if (starts[index], ends[index]) != (old_starts[index], old_ends[index]):  # computed, and so followed
            old = len(range(*slice(old_starts[index], old_ends[index], step).indices(own.old)))
            new = len(range(*slice(starts[index], ends[index], step).indices(own.new)))
            found[axis] = own if (old, new) == (own.old, own.new) else Axis(((Factor(old, new, own.side),),))
            continue
        found[axis], new_starts[index], new_ends[index] = _cut(walk, node, own, starts[index], ends[index], step)
    _give_limits(walk, node, (list(starts), new_starts), (list(ends), new_ends))
    walk.set(node.outputs[0], tuple(found))


def _cut(walk: Walk, node: Node, axis: Axis, start: int, end: int, step: int) -> tuple[Axis, int, int]:
    """What a Slice takes of an axis that changes, and its new limits."""
    begin, stop, _ = slice(start, end, step).indices(axis.old)
    if step < 0:
        if begin != axis.old - 1 or stop != -1 or step != -1:
            raise walk.refuse(node, f"takes [{start}:{end}:{step}] of {axis.old} places, which is not followed")
        return axis, start if start < 0 or start >= axis.old else axis.new - 1, end
    new_start = start if start < 0 else _moved(walk, node, axis, begin)
    new_end = end if end < 0 or end > axis.old else _moved(walk, node, axis, stop)
    low, high, _ = slice(new_start, new_end).indices(axis.new)
    taken = cut(axis, begin, stop) if step == 1 else None
    if taken is None or taken.new != high - low:
        old, new = len(range(begin, stop, step)), len(range(low, high, step))
        taken = Axis(((Factor(old, new, axis.side),),))
    return taken, new_start, new_end


def _moved(walk: Walk, node: Node, axis: Axis, at: int) -> int:
    """Where a place that was counted from the beginning is now."""
    if at in (0, axis.old):
        return axis.new if at else 0
    ahead = cut(axis, 0, at)
    if ahead is not None and len(axis.pieces) > 1:
        return ahead.new
    if at <= BORDER:
        return at
    if axis.old - at <= BORDER:
        return axis.new - (axis.old - at)
    if 2 * at == axis.old and axis.new % 2 == 0:
        return axis.new // 2
    raise walk.refuse(node, f"cuts {axis.old} places at {at}: where that is in {axis.new} is not known")


def _give_limits(
    walk: Walk, node: Node, starts: tuple[list[int], list[int]], ends: tuple[list[int], list[int]]
) -> None:
    for slot, name, (old, new) in ((1, "starts", starts), (2, "ends", ends)):
        if old == new:
            continue
        if name in node.attrs:
            walk.later(node, f"{name} {old} are now {new}", lambda name=name, new=new: node.attrs.update({name: new}))  # type: ignore[misc]
        else:
            walk.new_input(node, slot, np.array(new, np.int64), f"{name} {old} are now {new}")


def split(walk: Walk, node: Node) -> None:
    """Split: along an axis that changes, between pieces or in equal parts."""
    x = walk.of(node.inputs[0])
    axis = int(node.attrs.get("axis", 0)) % len(x)
    lengths = []
    for output in node.outputs:
        shape = walk.old_shape(output)
        assert shape is not None
        lengths.append(shape[axis])
    if not x[axis].changed:
        for output, length in zip(node.outputs, lengths, strict=True):
            walk.set(output, tuple(axis_of(length) if i == axis else a for i, a in enumerate(x)))
        return
    edges = np.cumsum([0, *lengths]).tolist()
    parts = [cut(x[axis], a, b) for a, b in itertools.pairwise(edges)]
    if any(part is None for part in parts):
        raise walk.refuse(
            node, f"takes {lengths} of {x[axis].old} places apart: how many of {x[axis].new} is not known"
        )
    sizes = [part.new for part in parts if part is not None]
    for output, part in zip(node.outputs, parts, strict=True):
        walk.set(output, tuple((part or a) if i == axis else a for i, a in enumerate(x)))
    if optional_input(node, 1) is not None:
        walk.new_input(node, 1, np.array(sizes, np.int64), f"parts {lengths} are now {sizes}")
    elif "split" in node.attrs:
        walk.later(node, f"parts {lengths} are now {sizes}", lambda: node.attrs.update(split=sizes))


def gather(walk: Walk, node: Node) -> None:
    """Gather: of an axis that changes, a place that is the same as before."""
    x, picks = walk.of(node.inputs[0]), walk.of(node.inputs[1])
    axis = int(node.attrs.get("axis", 0)) % len(x)
    if x[axis].changed:
        indices = constant_value(node.inputs[1])
        if indices is None:
            raise walk.refuse(node, f"takes some of {x[axis].old} places, and which is not known")
        for index in np.unique(indices).tolist():
            place = cut(x[axis], index % x[axis].old, index % x[axis].old + 1)
            before = cut(x[axis], 0, index) if index > 0 else None
            moved = index > 0 and (before is None or before.new != index)
            if (place is None and index not in (0, -1)) or moved:
                raise walk.refuse(
                    node, f"takes place {index} of {x[axis].old}: where that is in {x[axis].new} is not known"
                )
    walk.set(node.outputs[0], (*x[:axis], *picks, *x[axis + 1 :]))


def expand(walk: Walk, node: Node) -> None:
    """Expand: sizes that are tied to the image follow it."""
    x, y = walk.of(node.inputs[0]), node.outputs[0]
    old = walk.old_shape(y)
    assert old is not None
    source: Axes = (*(axis_of(1) for _ in range(len(old) - len(x))), *x)
    target = walk.new_values(node.inputs[1])
    found: list[Axis] = []
    for i, (own, size) in enumerate(zip(source, old, strict=True)):
        given = None if target is None else target[i - (len(old) - len(target))] if i >= len(old) - len(target) else 1
        if own.old > 1 or size == 1:
            found.append(own)
        elif given is not None and not is_constant(node.inputs[1]):
            found.append(axis_of(size, given))
        else:
            side = {2: "rows", 3: "columns"}.get(i, "") if len(old) == 4 else ""
            new = walk.like(side, size) if side else None  # type: ignore[arg-type]
            found.append(axis_of(size) if new is None else axis_of(size, new, side))  # type: ignore[arg-type]
    _give_expansion(walk, node, found, target)
    walk.set(y, tuple(found))


def _give_expansion(walk: Walk, node: Node, axes: Sequence[Axis], target: list[int] | None) -> None:
    if target is None:
        if is_constant(node.inputs[1]) or any(axis.changed for axis in axes):
            raise walk.refuse(node, "has a target that is not followed")
        return
    wanted = list(target)
    for i, axis in enumerate(axes[len(axes) - len(target) :]):
        wanted[i] = axis.new if target[i] != 1 else 1
    if wanted != target:
        if not is_constant(node.inputs[1]):
            raise walk.refuse(node, f"has a computed target {target} where {wanted} is needed")
        walk.new_input(node, 1, np.array(wanted, np.int64), f"target {target} is now {wanted}")


def tile(walk: Walk, node: Node) -> None:
    """Tile by constant repeats."""
    x, repeats = walk.of(node.inputs[0]), walk.new_values(node.inputs[1])
    if repeats is None or repeats != walk.old_values(node.inputs[1]):
        raise walk.refuse(node, "repeats so often as the size says")
    walk.set(node.outputs[0], tuple(a if n == 1 else joined([a] * n) for a, n in zip(x, repeats, strict=True)))


def reduce(walk: Walk, node: Node) -> None:
    """Reductions, ArgMax and ArgMin."""
    x = walk.of(node.inputs[0])
    if node.op in ("ArgMax", "ArgMin"):
        axes: list[int] | None = [int(node.attrs.get("axis", 0))]
    else:
        axes = constant_ints(node, 1, "axes")
        if axes is None and optional_input(node, 1) is not None:
            raise walk.refuse(node, "has axes that are computed")
        if not axes:
            axes = [] if node.attrs.get("noop_with_empty_axes", 0) else list(range(len(x)))
    gone = {axis % len(x) for axis in axes or ()}
    if node.op in ("ArgMax", "ArgMin") and any(x[axis].changed for axis in gone):
        raise walk.refuse(node, "gives a place as a number, which means another place at another size")
    keep = bool(node.attrs.get("keepdims", 1))
    walk.set(node.outputs[0], tuple(axis_of(1) if i in gone else a for i, a in enumerate(x) if keep or i not in gone))


def shape(walk: Walk, node: Node) -> None:
    """Shape and Size: numbers that follow the size; what they are is known when they are used."""
    _as_before(walk, node.outputs[0])


def _as_before(walk: Walk, tensor: Tensor) -> None:
    old = walk.old_shape(tensor)
    assert old is not None
    walk.set(tensor, tuple(axis_of(size) for size in old))


def range_(walk: Walk, node: Node) -> None:
    """Range between known numbers."""
    lengths = []
    for sizes in (walk.old, walk.new):
        bounds = range_bounds(sizes, node)
        if bounds is None:
            raise walk.refuse(node, "has limits that are not known")
        lengths.append(len(range(*bounds)))
    walk.set(node.outputs[0], (axis_of(lengths[0], lengths[1]),))


def constant_of_shape(walk: Walk, node: Node) -> None:
    """ConstantOfShape of known sizes."""
    sizes = [known_or(each, node.inputs[0], ()) for each in (walk.old, walk.new)]
    if sizes[0] is None or sizes[1] is None:
        raise walk.refuse(node, "has sizes that are not known")
    walk.set(node.outputs[0], tuple(axis_of(a, b) for a, b in zip(sizes[0], sizes[1], strict=True)))
