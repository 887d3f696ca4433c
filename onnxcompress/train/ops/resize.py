"""Resize and Upsample: separable interpolation, one matrix or one list of indices for each axis.

The place of an output element in the input is computed in single precision, in the order that onnxruntime computes it,
since which neighbour is nearest hangs on the last bit. Where torch's own interpolation gives the same it is used.
What a shape leads to is worked out once for each shape that occurs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from onnxcompress.train.ops.call import Builder, Call, Function

Array = np.ndarray[Any, np.dtype[Any]]
Resizer = Callable[[Tensor], Tensor]

ONE, HALF = np.float32(1), np.float32(0.5)
TRANSFORMATIONS = (
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
    "tf_half_pixel_for_nn",
    "tf_crop_and_resize",
)
ROUNDINGS: dict[str, Callable[[Array], Array]] = {
    "round_prefer_floor": lambda place: np.ceil(place - HALF),
    "round_prefer_ceil": lambda place: np.floor(place + HALF),
    "floor": np.floor,
    "ceil": np.ceil,
}
KEPT_SHAPES = 64


@dataclass(frozen=True)
class Settings:
    """Attributes of the node, by their names in the specification."""

    mode: str
    transformation: str
    rounding: str
    cubic_a: float = -0.75
    exclude_outside: bool = False
    antialias: bool = False
    extrapolation: float = 0.0
    policy: str = "stretch"


@dataclass(frozen=True)
class Axis:
    """One axis to be resized.

    Args:
        axis: Which.
        size: In the input.
        resized: In the output.
        scale: Of the coordinates, about resized / size.
        roi: First and last place of the region of interest, as fractions.
    """

    axis: int
    size: int
    resized: int
    scale: np.float32
    roi: tuple[np.float32, np.float32]


def places(one: Axis, transformation: str) -> Array:
    """Where each output element lies in the input, (resized,) float32."""
    x: Array = np.arange(one.resized, dtype=np.float32)
    size, resized = np.float32(one.size), np.float32(one.resized)
    centre: Array = (x + HALF) / one.scale
    if transformation == "asymmetric":
        x = x / one.scale
    elif transformation == "align_corners":
        x = x * (size - ONE) / (resized - ONE) if one.resized > 1 else x
    elif transformation == "tf_crop_and_resize":
        start, end = one.roi
        first, whole = start * (size - ONE), (end - start) * (size - ONE)
        x = first + x * (end - start) * (size - ONE) / (resized - ONE) if one.resized > 1 else first + whole * HALF + x
    elif transformation == "tf_half_pixel_for_nn":
        x = centre
    elif transformation == "half_pixel_symmetric":
        adjustment = resized / (one.scale * size)
        x = size * HALF * (ONE - adjustment) + centre - HALF
    elif transformation == "half_pixel" or one.resized > 1:
        x = centre - HALF
    return x


def nearest(one: Axis, settings: Settings) -> Array:
    """Index of the input element that each output element copies."""
    place: Array = places(one, settings.transformation)
    rounding = settings.rounding
    if rounding == "simple":  # opset 10: onnxruntime rounds away from the border that is cut off
        rounding = "ceil" if one.scale < 1 else "floor"
    return np.clip(ROUNDINGS[rounding](place), 0, one.size - 1).astype(np.int64)


def cubic(distance: Array, a: float) -> Array:
    """The cubic convolution kernel (Keys 1981)."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def matrix(one: Axis, settings: Settings) -> Array:
    """Weights of the input elements in each output element, (resized, size) float64."""
    place = places(one, settings.transformation).astype(np.float64)
    reach = 1 if settings.mode == "linear" else 2
    squeeze = min(float(one.scale), 1.0) if settings.antialias else 1.0
    radius = math.ceil(reach / squeeze) + 1
    taps = np.floor(place)[:, None] + np.arange(-radius, radius + 1)
    distance = (taps - place[:, None]) * squeeze
    weights = np.maximum(1 - np.abs(distance), 0) if reach == 1 else cubic(distance, settings.cubic_a)
    if settings.exclude_outside:
        weights = np.where((taps >= 0) & (taps < one.size), weights, 0.0)
    total = weights.sum(1, keepdims=True)
    weights = weights / np.where(total == 0, 1, total)
    found = np.zeros((one.resized, one.size))
    columns = np.clip(taps, 0, one.size - 1).astype(np.int64)
    np.add.at(found, (np.arange(one.resized)[:, None], columns), weights)
    return found


def native(axes: Sequence[Axis], rank: int, settings: Settings) -> Resizer | None:
    """torch's own interpolation, where it gives the same."""
    if not 3 <= rank <= 5 or any(one.axis < 2 for one in axes):
        return None
    sizes = {one.axis: one.resized for one in axes}
    spatial = {"nearest": "nearest", "linear": ("linear", "bilinear", "trilinear")[rank - 3], "cubic": "bicubic"}
    mode = spatial[settings.mode]
    aligned = settings.transformation == "align_corners"
    exact = all(one.scale == np.float32(one.resized / one.size) for one in axes)
    if mode == "nearest":
        fits = all(np.array_equal(native_nearest(one), nearest(one, settings)) for one in axes)
    elif mode == "bicubic" and (rank != 4 or settings.cubic_a != -0.75):
        fits = False
    else:
        fits = aligned or (exact and half_pixel_alike(axes, settings.transformation))
    if not fits or settings.antialias or settings.exclude_outside:
        return None
    corners = aligned if mode != "nearest" else None

    def run(x: Tensor) -> Tensor:
        return functional.interpolate(x, [sizes.get(k, x.shape[k]) for k in range(2, rank)], None, mode, corners)

    return run


def native_nearest(one: Axis) -> Array:
    """Index of the input element that each output element copies in torch."""
    step = np.float32(one.size) / np.float32(one.resized)
    place: Array = np.floor(np.arange(one.resized, dtype=np.float32) * step)
    return np.minimum(place, one.size - 1).astype(np.int64)


def half_pixel_alike(axes: Sequence[Axis], transformation: str) -> bool:
    if transformation == "pytorch_half_pixel":
        return all(one.resized > 1 for one in axes)
    return transformation in ("half_pixel", "half_pixel_symmetric")


def resizer(axes: Sequence[Axis], x: Tensor, settings: Settings) -> Resizer:
    """What resizes tensors of the shape, type and device of x."""
    cropped = settings.transformation == "tf_crop_and_resize"
    # As onnxruntime has it: where the scale is 1 nothing is done, not even cropped.
    axes = [one for one in axes if one.scale != 1]
    if not axes:
        return lambda x: x
    own = None if cropped or not x.is_floating_point() else native(axes, x.dim(), settings)
    if own is not None:
        return own
    steps = [step(one, x, settings) for one in axes]

    def run(x: Tensor) -> Tensor:
        for function in steps:
            x = function(x)
        return x

    if not cropped:
        return run
    outside = torch.zeros([1] * x.dim(), dtype=torch.bool)
    for one in axes:
        place = places(one, settings.transformation)
        shape = [1] * x.dim()
        shape[one.axis] = -1
        outside = outside | torch.from_numpy((place < 0) | (place > one.size - 1)).reshape(shape)
    outside = outside.to(x.device)
    return lambda x: run(x).masked_fill(outside, settings.extrapolation)


def step(one: Axis, x: Tensor, settings: Settings) -> Resizer:
    """What resizes one axis."""
    axis = one.axis
    if settings.mode == "nearest":
        index = torch.from_numpy(nearest(one, settings)).to(x.device)
        return lambda x: x.index_select(axis, index)
    dtype = x.dtype if x.is_floating_point() else torch.float32
    weights = torch.from_numpy(matrix(one, settings)).to(x.device, dtype)
    if axis == x.dim() - 1:
        turned = weights.t()
        return lambda x: x.to(dtype) @ turned

    def run(x: Tensor) -> Tensor:
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        found = weights @ x.to(dtype).reshape(before.numel(), one.size, after.numel())
        return found.reshape(*before, one.resized, *after)

    return run


def targets(
    shape: Sequence[int], axes: Sequence[int], sizes: Sequence[int], policy: str
) -> list[tuple[int, np.float32]]:
    """Output size and scale of each of the axes, from the sizes that are asked for."""
    ratios = [np.float32(size) / np.float32(shape[axis]) for axis, size in zip(axes, sizes, strict=True)]
    if policy == "stretch":
        return list(zip(sizes, ratios, strict=True))
    ratio = min(ratios) if policy == "not_larger" else max(ratios)
    return [(int(np.floor(ratio * np.float32(shape[axis]) + HALF)), ratio) for axis in axes]


def resize(call: Call) -> Function:
    settings, positions = read(call)
    only = call.attribute("axes")
    fixed = {name: numbers(call.constants.get(position)) for name, position in positions.items()}
    if call.op == "Upsample" and call.opset < 9:
        fixed["scales"] = tuple(call.attribute("scales", ()))
        if not fixed["scales"]:
            raise call.refuse("a scale that is given as width_scale and height_scale")
    resizers: dict[tuple[object, ...], Resizer] = {}

    def run(x: Tensor, *given: Tensor | None) -> Tensor:
        told = dict(fixed)
        for name, position in positions.items():
            if told[name] is None and position <= len(given):
                told[name] = numbers(given[position - 1])
        key = (x.shape, x.dtype, x.device, *told.values())
        found = resizers.get(key)
        if found is None:
            if len(resizers) >= KEPT_SHAPES:
                resizers.clear()
            found = resizers[key] = resizer(plan(x.shape, told), x, settings)
        return found(x)

    def plan(shape: Sequence[int], told: dict[str, tuple[float, ...] | None]) -> list[Axis]:
        axes = [axis % len(shape) for axis in only] if only else list(range(len(shape)))
        roi = [np.float32(place) for place in told.get("roi") or [0.0] * len(axes) + [1.0] * len(axes)]
        scales, sizes = told.get("scales"), told.get("sizes")
        if scales:
            wanted = [
                (int(np.float32(scale) * np.float32(shape[axis])), np.float32(scale))
                for axis, scale in zip(axes, scales, strict=True)
            ]
        elif sizes:
            wanted = targets(shape, axes, [int(size) for size in sizes], settings.policy)
        else:
            raise call.refuse("neither scales nor sizes: such a node")
        return [
            Axis(axis, shape[axis], *wanted[place], (roi[place], roi[place + len(axes)]))
            for place, axis in enumerate(axes)
        ]

    return run


def numbers(tensor: Tensor | None) -> tuple[float, ...] | None:
    """The elements as a key; None also where there are none: an empty tensor says that an input is not given."""
    return None if tensor is None or tensor.numel() == 0 else tuple(tensor.reshape(-1).tolist())


def read(call: Call) -> tuple[Settings, dict[str, int]]:
    """The settings of a node, and the positions of the inputs that it has.

    Raises:
        ModelError: It asks for something that is not computed here.
    """
    mode = call.attribute("mode", "nearest")
    mode = "linear" if mode == "bilinear" else mode
    if call.op == "Upsample" or call.opset < 11:
        if mode not in ("nearest", "linear"):
            raise call.refuse(f"mode {mode!r}")
        rounding = "floor" if call.op == "Upsample" else "simple"
        return Settings(mode, "asymmetric", rounding), {"scales": 1} if call.has(1) else {}
    settings = Settings(
        mode,
        call.attribute("coordinate_transformation_mode", "half_pixel"),
        call.attribute("nearest_mode", "round_prefer_floor"),
        call.attribute("cubic_coeff_a", -0.75),
        bool(call.attribute("exclude_outside", 0)),
        bool(call.attribute("antialias", 0)) and mode != "nearest",
        call.attribute("extrapolation_value", 0.0),
        call.attribute("keep_aspect_ratio_policy", "stretch"),
    )
    known = {
        "mode": mode in ("nearest", "linear", "cubic"),
        "coordinate_transformation_mode": settings.transformation in TRANSFORMATIONS,
        "nearest_mode": settings.rounding in ROUNDINGS,
        "keep_aspect_ratio_policy": settings.policy in ("stretch", "not_larger", "not_smaller"),
    }
    for name, good in known.items():
        if not good:
            raise call.refuse(f"{name} {call.attribute(name)!r}")
    cropped = settings.transformation == "tf_crop_and_resize"
    names = {1: "roi", 2: "scales", 3: "sizes"} if cropped else {2: "scales", 3: "sizes"}
    return settings, {name: position for position, name in names.items() if call.has(position)}


OPERATORS: dict[str, Builder] = {"Resize": resize, "Upsample": resize}
