"""The input that holds images: which it is, where its rows and columns are, and how many."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from onnx import ValueInfoProto

from onnxcompress.errors import ModelError, RecipeError
from onnxcompress.graph import Graph, Tensor, Variable, is_op
from onnxcompress.resolution.axes import Axes, axis_of

# Primes that no size of a model has as a factor: they stand for sizes that the file leaves open.
OPEN_SIZES = (10007, 10009, 10037, 10039, 10061, 10067, 10069, 10079)


@dataclass(frozen=True, eq=False)
class Image:
    """An input that holds images: its axes of rows and columns, and its size."""

    tensor: Tensor
    axes: tuple[int, int]
    shape: tuple[int, ...]
    declared: tuple[int | str | None, ...]

    @property
    def size(self) -> tuple[int, int]:
        return self.shape[self.axes[0]], self.shape[self.axes[1]]

    def scaled(self, ratio: float) -> tuple[int, int]:
        height, width = (max(1, math.floor(ratio * size + 0.5)) for size in self.size)
        return height, width

    def at(self, size: tuple[int, int]) -> Axes:
        """Its axes when rows and columns get this size."""
        found = []
        for axis, old in enumerate(self.shape):
            if axis in self.axes:
                number = self.axes.index(axis)
                found.append(axis_of(old, size[number], "rows" if number == 0 else "columns"))
            else:
                found.append(axis_of(old, side="free" if old in OPEN_SIZES else ""))
        return tuple(found)


def find_image(graph: Graph, name: str | None, given: Sequence[int] | None) -> Image:
    inputs = [t for t in graph.inputs if isinstance(t, Variable) and t.name not in graph.overridable]
    named = [t for t in inputs if name in (None, t.name)]
    if not named:
        raise RecipeError(f"there is no input {name!r}; the inputs are {[t.name for t in inputs]}")
    found = [t for t in named if t.shape is not None and len(t.shape) == 4]
    if len(found) != 1:
        listed = ", ".join(f"{t.name!r} {t.shape}" for t in named)
        if not found:
            raise ModelError(f"no input has the four axes of images: {listed}")
        raise ModelError(f"several inputs have rows and columns: {listed}; name the image")
    (tensor,) = found
    declared = tuple(int(d) if isinstance(d, (int, np.integer)) else d for d in tensor.shape)
    axes = (1, 2) if _channels_last(graph, tensor, declared) else (2, 3)
    if given is not None and len(given) != 4:
        raise RecipeError(f"input {tensor.name!r} has 4 axes, and the shape that is given has {len(given)}")
    names = iter(OPEN_SIZES)
    numbers: dict[int | str | None, int] = {}
    shape = []
    for axis, dim in enumerate(declared):
        if isinstance(dim, int):
            if given is not None and axis in axes and given[axis] != dim:
                raise RecipeError(f"input {tensor.name!r} has {dim} on axis {axis}, and {given[axis]} is given")
            shape.append(dim)
        elif axis in axes:
            if given is None:
                raise ModelError(f"input {tensor.name!r} leaves open how many rows and columns it has: give its shape")
            shape.append(int(given[axis]))
        else:
            shape.append(numbers.setdefault(dim or axis, next(names)))
    return Image(tensor, axes, tuple(shape), declared)


def _channels_last(graph: Graph, tensor: Tensor, shape: Sequence[int | str | None]) -> bool:
    """Whether the last axis holds the channels: what reads it moves it, or it is as short as colours are."""
    for node in tensor.outputs:
        if is_op(node, "Transpose"):
            return list(node.attrs.get("perm") or ()) == [0, 3, 1, 2]
        if is_op(node, "Conv", "BatchNormalization", "QLinearConv"):
            return False
    return shape[3] in (1, 3, 4) and shape[1] not in (1, 3, 4)


@contextmanager
def numbers_for_sizes(graph: Graph, image: Image, *, sized: bool = True) -> Iterator[None]:
    """All sizes of all inputs are numbers inside; the file's own are there again behind.

    Without ``sized`` rows and columns stay what the file says where it does.
    """
    assert graph.carrier is not None
    saved = []
    for value in graph.carrier.input:
        copy = ValueInfoProto()
        copy.CopyFrom(value)
        saved.append(copy)
    try:
        _write_numbers(graph, image, sized=sized)
        yield
    finally:
        for value, copy in zip(graph.carrier.input, saved, strict=True):
            value.CopyFrom(copy)


def _write_numbers(graph: Graph, image: Image, *, sized: bool) -> None:
    assert graph.carrier is not None
    pairs = zip(image.declared, image.shape, strict=True)
    numbers = {dim: size for dim, size in pairs if isinstance(dim, str) and size in OPEN_SIZES}
    for value in graph.carrier.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            is_open = not dim.HasField("dim_value") or dim.dim_value < 0
            if value.name == image.tensor.name:
                dim.dim_value = image.shape[axis] if sized or is_open else dim.dim_value
            elif is_open:
                label = dim.dim_param or f"{value.name}[{axis}]"
                unused = [size for size in OPEN_SIZES if size not in numbers.values()]
                dim.dim_value = numbers.setdefault(label, unused[0] if unused else OPEN_SIZES[-1])
