"""Operators that make, measure and rearrange tensors: Shape, Reshape, Transpose, Concat, Split, Constant and their kin.

Shapes travel as int64 tensors on the CPU, whatever device the data is on, so that reading one as numbers never waits
for an accelerator. What a node's constants decide is decided in the builder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onnxcompress.train.ops.call import Builder, Call, Function, integers


def tensor_of(values: Any, call: Call) -> Tensor:
    """An attribute's tensor (array, or graphsurgeon Constant) as torch has it: half and single precision as float_type.

    Raises:
        ModelError: torch has no such element type.
    """
    array = np.asarray(getattr(values, "values", values))
    dtype = call.torch_type(array.dtype)
    if array.dtype.kind not in "biuf":  # bfloat16 and four-bit numbers, which torch does not take from NumPy
        array = array.astype(np.float32 if dtype.is_floating_point else np.int64)
    return torch.tensor(array).to(dtype)


def on_one_device(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, all on the accelerator when one is: shapes and made-up values come from the CPU."""
    for tensor in tensors:
        if not tensor.is_cpu:
            return tuple(other.to(tensor.device) for other in tensors)
    return tensors


def constant(call: Call) -> Function:
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        value = call.attribute(name)
        if value is None:
            continue
        if name.startswith("value_float"):
            held = torch.tensor(value, dtype=call.float_type)
        elif name.startswith("value_int"):
            held = torch.tensor(value, dtype=torch.int64)
        else:
            held = tensor_of(value, call)
        return lambda: held
    raise call.refuse(f"a constant given as {', '.join(call.attributes) or 'nothing'}")


def constant_of_shape(call: Call) -> Function:
    value = call.attribute("value")
    fill = torch.zeros((), dtype=call.float_type) if value is None else tensor_of(value, call).reshape(())
    sizes = call.integers(0)
    # A view with stride 0: nothing writes into its input, so no memory is needed.
    if sizes is not None:
        held = fill.expand(sizes)
        return lambda shape=None: held
    return lambda shape: fill.expand(shape.tolist())


def eye_like(call: Call) -> Function:
    dtype = call.attribute("dtype")
    wanted = None if dtype is None else call.torch_type(dtype)
    shift = call.attribute("k", 0)

    def run(x: Tensor) -> Tensor:
        rows, columns = (torch.arange(size, device=x.device) for size in x.shape)
        return torch.eq(columns - rows[:, None], shift).to(wanted or x.dtype)

    return run


def range_of(call: Call) -> Function:
    def run(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
        first, end, step = start.item(), limit.item(), delta.item()
        if not start.dtype.is_floating_point:
            count = max(-((first - end) // step), 0)
            return torch.arange(first, first + count * step, step, dtype=start.dtype)
        count = max(math.ceil((end - first) / step), 0)
        return torch.arange(count, dtype=start.dtype, device=start.device) * delta + start

    return run


def one_hot(call: Call) -> Function:
    axis = call.attribute("axis", -1)
    depths = call.integers(1)

    def run(indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
        size = int(depths[0] if depths is not None else depth.item())
        indices = indices.to(values.device, torch.int64)
        position = axis % (indices.dim() + 1)
        places = torch.arange(size, device=values.device).reshape([-1] + [1] * (indices.dim() - position))
        hot = torch.where(indices < 0, indices + size, indices).unsqueeze(position) == places
        return torch.where(hot, values[1], values[0])

    return run


def shape(call: Call) -> Function:
    kept = slice(call.attribute("start", 0), call.attribute("end"))
    return lambda x: torch.tensor(x.shape[kept], dtype=torch.int64)


def size(call: Call) -> Function:
    return lambda x: torch.tensor(x.numel())


def reshape(call: Call) -> Function:
    target = call.attribute("shape") if call.opset < 5 else call.integers(1)
    literal = bool(call.attribute("allowzero", 0))
    if target is not None and (literal or 0 not in target):
        sizes = tuple(target)
        return lambda x, shape=None: x.reshape(sizes)

    def run(x: Tensor, shape: Tensor | None = None) -> Tensor:
        wanted = target if shape is None or target is not None else integers(shape)
        assert wanted is not None
        if not literal and 0 in wanted:
            wanted = [x.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
        return x.reshape(wanted)

    return run


def flatten(call: Call) -> Function:
    axis = call.attribute("axis", 1)
    return lambda x: x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def fixed_axes(call: Call) -> tuple[bool, list[int] | None]:
    """Axes of Squeeze and Unsqueeze, and whether they are known: (True, None) says that none are given."""
    if call.opset < 13:
        return True, call.attribute("axes")
    if not call.has(1):
        return True, None
    axes = call.integers(1)
    return axes is not None, axes


def squeeze(call: Call) -> Function:
    known, axes = fixed_axes(call)
    if not known:
        return lambda x, axes: x.squeeze(tuple(axes.tolist()))
    if axes is None:
        return lambda x, axes=None: x.squeeze()
    dims = tuple(axes)
    return lambda x, axes=None: x.squeeze(dims)


def unsqueeze(call: Call) -> Function:
    known, axes = fixed_axes(call)
    if known and axes is not None and len(axes) == 1:
        axis = axes[0]
        return lambda x, axes=None: x.unsqueeze(axis)

    def run(x: Tensor, given: Tensor | None = None) -> Tensor:
        places = axes if axes is not None or given is None else integers(given)
        assert places is not None
        rank = x.dim() + len(places)
        for place in sorted(place % rank for place in places):
            x = x.unsqueeze(place)
        return x

    return run


def transpose(call: Call) -> Function:
    order = call.attribute("perm")
    if order is None:
        return lambda x: x.permute(tuple(range(x.dim() - 1, -1, -1)))
    axes = tuple(order)
    return lambda x: x.permute(axes)


def expand_to(x: Tensor, target: Sequence[int]) -> Tensor:
    """x broadcast together with a tensor of the target shape: 1 in the target keeps the size of x."""
    rank = x.dim()
    sizes = [1] * (rank - len(target)) + list(target)
    new = len(sizes) - rank
    return x.expand([-1 if size == 1 and axis >= new else size for axis, size in enumerate(sizes)])


def expand(call: Call) -> Function:
    target = call.integers(1)
    if target is None:
        return lambda x, shape: expand_to(x, shape.tolist())
    return lambda x, shape=None: expand_to(x, target)


def tile(call: Call) -> Function:
    if call.opset < 6:

        def along_one_axis(x: Tensor, tiles: Tensor, axis: Tensor) -> Tensor:
            repeats = [1] * x.dim()
            repeats[int(axis.item())] = int(tiles.item())
            return x.repeat(repeats)

        return along_one_axis
    repeats = call.integers(1)
    if repeats is None:
        return lambda x, repeats: x.repeat(repeats.tolist())
    return lambda x, given=None: x.repeat(repeats)


def concat(call: Call) -> Function:
    axis = call.attribute("axis", 1)
    return lambda *tensors: torch.cat(on_one_device(*tensors), axis)


def split(call: Call) -> Function:
    axis = call.attribute("axis", 0)
    count = len(call.outputs)
    sizes = call.integers(1) if call.has(1) else call.attribute("split")
    if sizes is not None:
        fixed = list(sizes)
        return lambda x, sizes=None: torch.split_with_sizes(x, fixed, axis)
    if call.has(1):
        return lambda x, sizes: torch.split_with_sizes(x, sizes.tolist(), axis)

    def run(x: Tensor) -> Sequence[Tensor]:
        total = x.shape[axis]
        part = -(-total // count)
        parts = [max(min(part, total - part * place), 0) for place in range(count)]
        return torch.split_with_sizes(x, parts, axis)

    return run


def depth_to_space(call: Call) -> Function:
    block = call.attribute("blocksize")
    if call.attribute("mode", "DCR") == "CRD":
        return lambda x: torch.nn.functional.pixel_shuffle(x, block)

    def run(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        blocks = x.reshape(n, block, block, c // block**2, h, w)
        return blocks.permute(0, 3, 4, 1, 5, 2).reshape(n, c // block**2, h * block, w * block)

    return run


def space_to_depth(call: Call) -> Function:
    block = call.attribute("blocksize")
    if call.attribute("mode", "DCR") == "CRD":
        return lambda x: torch.nn.functional.pixel_unshuffle(x, block)

    def run(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        blocks = x.reshape(n, c, h // block, block, w // block, block)
        return blocks.permute(0, 3, 5, 1, 2, 4).reshape(n, c * block**2, h // block, w // block)

    return run


def trilu(call: Call) -> Function:
    triangle = torch.triu if call.attribute("upper", 1) else torch.tril
    fixed = [0] if not call.has(1) else call.integers(1)
    if fixed is None:
        return lambda x, k: triangle(x, int(k.item()))
    diagonal = fixed[0]
    return lambda x, k=None: triangle(x, diagonal)


OPERATORS: dict[str, Builder] = {
    "Concat": concat,
    "Constant": constant,
    "ConstantOfShape": constant_of_shape,
    "DepthToSpace": depth_to_space,
    "Expand": expand,
    "EyeLike": eye_like,
    "Flatten": flatten,
    "OneHot": one_hot,
    "Range": range_of,
    "Reshape": reshape,
    "Shape": shape,
    "Size": size,
    "SpaceToDepth": space_to_depth,
    "Split": split,
    "Squeeze": squeeze,
    "Tile": tile,
    "Transpose": transpose,
    "Trilu": trilu,
    "Unsqueeze": unsqueeze,
}
