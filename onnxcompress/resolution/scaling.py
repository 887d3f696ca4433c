"""Scale the resolution at which a graph works, in place.

    found = scale_resolution(graph, 0.75)
    print(found.old, found.new, found.repairs)

By default the model's input keeps its size, and so do outputs that are images: a bilinear Resize stands behind the
input, and one in front of each such output. With ``native`` the input itself becomes smaller. Convolutions and pools
work on any size; what has the old one written down is mended: targets of Reshape and Expand, kernels of pools that
were global, sizes of Resize, ends of Slice, and tables of learned positions, which are interpolated. What cannot be,
such as a head with a weight for every place, is refused by name, and the graph is left as it was.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ValueInfoProto

from onnxcompress.errors import ModelError, PassError, RecipeError
from onnxcompress.graph import Graph, Node, Tensor, Variable, is_op, numpy_dtype, static_shape
from onnxcompress.passes.replace_constant_nodes import ReplaceConstantNodes
from onnxcompress.resolution.axes import Axes, axis_of
from onnxcompress.resolution.old_shapes import infer_old_shapes
from onnxcompress.resolution.rules import RULES
from onnxcompress.resolution.walk import Repair, Walk, walk
from onnxcompress.shapes import infer_shapes

logger = logging.getLogger(__name__)

# Primes that no size of a model has as a factor: they stand for sizes that the file leaves open.
OPEN_SIZES = (10007, 10009, 10037, 10039, 10061, 10067, 10069, 10079)
RESIZE_OPSET = 11  # before it, Resize has neither sizes nor half-pixel places
ANTIALIAS_OPSET = 18
SMALLEST_RATIO = 0.25


@dataclass(frozen=True)
class Resolution:
    """What ``scale_resolution`` did.

    Attributes:
        input_name: The image.
        old: Height and width at which the graph worked.
        new: Those at which it works now.
        native: Whether the input itself has the new size.
        repairs: What was mended.
        losses: Where rows or columns are left over that no patch takes.
    """

    input_name: str
    old: tuple[int, int]
    new: tuple[int, int]
    native: bool = False
    repairs: tuple[Repair, ...] = ()
    losses: tuple[Repair, ...] = ()

    @property
    def ratio(self) -> float:
        """Side length, new over old; the geometric mean of both sides."""
        return math.sqrt(self.new[0] * self.new[1] / (self.old[0] * self.old[1]))


@dataclass(frozen=True, eq=False)
class _Image:
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


def scale_resolution(
    graph: Graph,
    ratio: float,
    *,
    native: bool = False,
    input_name: str | None = None,
    input_shape: Sequence[int] | None = None,
    antialias: bool = False,
) -> Resolution:
    """Let a graph work at another resolution, in place; the protobuf that it was loaded from changes with it.

    Args:
        graph: Its shapes are inferred again afterwards.
        ratio: Of each side, above 0 and at most 1; sides are rounded to whole pixels.
        native: Make the input itself smaller, and with it outputs that are images.
        input_name: The image, where there are several inputs with rows and columns.
        input_shape: Its shape, where the file leaves rows or columns open.
        antialias: Let the Resize behind the input average over all pixels that it leaves out.

    Raises:
        RecipeError: The ratio, the name or the shape is wrong.
        ModelError: The graph works at its own resolution only; says which node and why. The graph is as it was.
    """
    if not 0 < ratio <= 1:
        raise RecipeError(f"resolution ratio {ratio:g}: it must be above 0 and at most 1")
    image = _find_image(graph, input_name, input_shape)
    new = image.scaled(ratio)
    if new == image.size:
        return Resolution(image.tensor.name, image.size, new, native)
    if not native and graph.opset < (ANTIALIAS_OPSET if antialias else RESIZE_OPSET):
        raise ModelError(
            f"opset {graph.opset} has no {'antialiased' if antialias else 'half-pixel'} Resize, which opset "
            f"{ANTIALIAS_OPSET if antialias else RESIZE_OPSET} has: change the input itself (native)"
        )
    ReplaceConstantNodes().apply(graph)
    try:
        found, dense = _follow(graph, image, new, native)
    except ModelError:
        infer_shapes(graph)
        raise
    _declare_outputs(graph, found, native)
    _forget_sizes(graph, {tensor.name for tensor in found.axes if found.changed(tensor)})
    found.mend()
    inner = image.tensor
    if native:
        _declare_input(graph, image, new)
    else:
        inner = _resize_input(graph, image, new, antialias)
        for tensor, axes in dense:
            _resize_output(graph, image, tensor, axes)
    _check(graph, image, found, {image.tensor: inner}, {tensor for tensor, _ in dense})
    infer_shapes(graph)
    return Resolution(image.tensor.name, image.size, new, native, tuple(found.repairs), tuple(found.losses))


def admissible_ratios(
    graph: Graph,
    *,
    native: bool = False,
    input_name: str | None = None,
    input_shape: Sequence[int] | None = None,
    heights: Iterable[int] | None = None,
    whole_patches: bool = True,
) -> list[float]:
    """The ratios at which ``scale_resolution`` works, ascending, 1 among them.

    Args:
        graph: Not changed, but that its Constant nodes become initializers.
        native: As for ``scale_resolution``.
        input_name: As for ``scale_resolution``.
        input_shape: As for ``scale_resolution``.
        heights: Numbers of rows to try; by default all from a quarter of the old number.
        whole_patches: Leave out those at which patches do not cover the image.
    """
    image = _find_image(graph, input_name, input_shape)
    height = image.size[0]
    ReplaceConstantNodes().apply(graph)
    result = []
    with _numbers_for_sizes(graph, image):
        infer_old_shapes(graph)
        shapes = _shapes(graph)
        for rows in sorted(set(heights if heights is not None else range(math.ceil(SMALLEST_RATIO * height), height))):
            if not 0 < rows < height:
                continue
            try:
                found = walk(graph, {image.tensor: image.at(image.scaled(rows / height))}, RULES)
                _dense_outputs(found, image, native)
            except ModelError as error:
                logger.debug("%d rows: %s", rows, error)
                continue
            finally:
                _set_shapes(shapes)
            if not (whole_patches and found.losses):
                result.append(rows / height)
    infer_shapes(graph)
    return [*result, 1.0]


def _follow(graph: Graph, image: _Image, new: tuple[int, int], native: bool) -> tuple[Walk, list[tuple[Tensor, Axes]]]:
    """What changes, and the outputs that are resized; sizes are numbers afterwards, those of the old resolution."""
    with _numbers_for_sizes(graph, image):
        infer_old_shapes(graph)
        shapes = _shapes(graph)
        try:
            found = walk(graph, {image.tensor: image.at(new)}, RULES)
            return found, _dense_outputs(found, image, native)
        finally:
            _set_shapes(shapes)


# -- the image -------------------------------------------------------------------------------------------------------


def _find_image(graph: Graph, name: str | None, given: Sequence[int] | None) -> _Image:
    inputs = [t for t in graph.inputs if isinstance(t, Variable) and t.name not in graph.overridable]
    named = [t for t in inputs if name in (None, t.name)]
    if not named:
        raise RecipeError(f"there is no input {name!r}; the inputs are {[t.name for t in inputs]}")
    found = [t for t in named if t.shape is not None and len(t.shape) == 4]
    if len(found) != 1:
        what = "several inputs have" if found else "no input has"
        raise ModelError(f"{what} rows and columns: {[(t.name, t.shape) for t in named]}; name the image")
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
    return _Image(tensor, axes, tuple(shape), declared)


def _channels_last(graph: Graph, tensor: Tensor, shape: Sequence[int | str | None]) -> bool:
    """Whether the last axis holds the channels: what reads it moves it, or it is as short as colours are."""
    for node in tensor.outputs:
        if is_op(node, "Transpose"):
            return list(node.attrs.get("perm") or ()) == [0, 3, 1, 2]
        if is_op(node, "Conv", "BatchNormalization", "QLinearConv"):
            return False
    return shape[3] in (1, 3, 4) and shape[1] not in (1, 3, 4)


@contextmanager
def _numbers_for_sizes(graph: Graph, image: _Image, *, sized: bool = True) -> Iterator[None]:
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


def _write_numbers(graph: Graph, image: _Image, *, sized: bool) -> None:
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


def _shapes(graph: Graph) -> list[tuple[Tensor, list[int | str | None] | None]]:
    tensors = {t: None for inner in graph.walk() for node in inner.nodes for t in node.outputs}
    tensors |= dict.fromkeys(graph.inputs)
    return [(t, None if t.shape is None else list(t.shape)) for t in tensors if isinstance(t, Variable)]


def _set_shapes(shapes: Sequence[tuple[Tensor, list[int | str | None] | None]]) -> None:
    for tensor, shape in shapes:
        tensor.shape = None if shape is None else list(shape)


# -- edits -----------------------------------------------------------------------------------------------------------


def _dense_outputs(found: Walk, image: _Image, native: bool) -> list[tuple[Tensor, Axes]]:
    """Outputs that get their old size back; refused where that is not an image."""
    is_open = not all(isinstance(image.declared[axis], int) for axis in image.axes)
    dense = []
    for tensor in found.graph.outputs:
        if native or not found.changed(tensor):
            continue
        axes = found.of(tensor)
        changed = [axis for axis in axes if axis.changed]
        dtype = numpy_dtype(tensor)
        is_image = len(axes) == 4 and [axis.side for axis in changed] == ["rows", "columns"] and dtype == np.float32
        if not is_image or (is_open and tuple(axis.old for axis in changed) != image.size):
            raise ModelError(
                f"the resolution cannot be changed: output {tensor.name!r} would be {[axis.new for axis in axes]} "
                f"instead of {[axis.old for axis in axes]}, and is no image that could be resized: change the input "
                "itself (native)"
            )
        dense.append((tensor, axes))
    return dense


def _resize(
    graph: Graph, source: Tensor, made: Tensor, scales: Tensor, sizes: Tensor, before: Node, alias: bool
) -> None:
    attrs: dict[str, object] = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    if alias:
        attrs["antialias"] = 1
    # Up to opset 12 the region of interest may not be left out.
    region = Variable.empty() if graph.opset >= 13 else graph.new_constant("roi", np.zeros(0, np.float32))
    graph.insert("Resize", [source, region, scales, sizes], [made], attrs, before=before, name=f"{made.name}/Resize")


def _no_scales(graph: Graph) -> Tensor:
    return Variable.empty() if graph.opset >= 13 else graph.new_constant("scales", np.zeros(0, np.float32))


def _resize_input(graph: Graph, image: _Image, new: tuple[int, int], antialias: bool) -> Tensor:
    """The tensor that everything reads instead of the input."""
    source = image.tensor
    shape = list(image.declared)
    made = graph.new_variable(f"{source.name}_resized", source, shape=shape)
    graph.redirect(source, made)
    fixed = all(isinstance(dim, int) for dim in image.declared)
    if fixed:
        sizes = [new[image.axes.index(axis)] if axis in image.axes else dim for axis, dim in enumerate(shape)]
        given = graph.new_constant(f"{source.name}_sizes", np.array(sizes, np.int64))
        _resize(graph, source, made, _no_scales(graph), given, graph.nodes[0], antialias)
    else:
        scales = np.ones(4, np.float32)
        for axis, size in zip(image.axes, new, strict=True):
            scales[axis] = _scale(image.shape[axis], size)
        factors = graph.new_constant(f"{source.name}_scales", scales)
        _resize(graph, source, made, factors, Variable.empty(), graph.nodes[0], antialias)
    return made


def _scale(old: int, new: int) -> float:
    """A float32 just not below new / old: its product with ``old``, rounded down, is ``new``."""
    scale: Any = np.float32(new / old)
    while old * float(scale) < new:
        scale = np.nextafter(scale, np.float32(np.inf))
    return float(scale)


def _resize_output(graph: Graph, image: _Image, tensor: Tensor, axes: Axes) -> None:
    """Give an output its old size back."""
    maker = graph.producer(tensor)
    assert maker is not None
    inner = graph.new_variable(f"{tensor.name}_small", tensor, shape=[axis.new for axis in axes])
    maker.outputs = [inner if t is tensor else t for t in maker.outputs]
    graph.redirect(tensor, inner)
    last = graph.nodes[-1]
    declared = [image.declared[axis] for axis in image.axes]
    if all(isinstance(dim, int) for dim in declared):
        scales = np.ones(4, np.float32)
        for i, axis in enumerate(axes):
            if axis.changed:
                scales[i] = _scale(axis.new, axis.old)
        factors = graph.new_constant(f"{tensor.name}_scales", scales)
        _resize(graph, inner, tensor, factors, Variable.empty(), last, False)
    else:
        _resize_to_input(graph, image, inner, tensor, axes, last)
    node = graph.producer(tensor)
    assert node is not None
    graph.sort()


def _resize_to_input(graph: Graph, image: _Image, inner: Tensor, tensor: Tensor, axes: Axes, last: Node) -> None:
    """The same where the size is open: as large as the input."""
    places = [i for i, axis in enumerate(axes) if axis.changed]
    parts = []
    for source, wanted in ((inner, [i for i in range(4) if i not in places]), (image.tensor, list(image.axes))):
        whole = graph.insert("Shape", [source], before=last, name=f"{tensor.name}/Shape").outputs[0]
        for i in wanted:
            at = graph.new_constant(f"{tensor.name}_axis", np.array([i], np.int64))
            parts.append(graph.insert("Gather", [whole, at], before=last, name=f"{tensor.name}/Size").outputs[0])
    rest = [i for i in range(4) if i not in places]
    order = [parts[rest.index(i)] if i in rest else parts[len(rest) + places.index(i)] for i in range(4)]
    sizes = graph.insert("Concat", order, attrs={"axis": 0}, before=last, name=f"{tensor.name}/Sizes").outputs[0]
    _resize(graph, inner, tensor, _no_scales(graph), sizes, last, False)


def _declare_input(graph: Graph, image: _Image, new: tuple[int, int]) -> None:
    assert graph.carrier is not None
    for value in graph.carrier.input:
        if value.name == image.tensor.name:
            for axis, size in zip(image.axes, new, strict=True):
                value.type.tensor_type.shape.dim[axis].dim_value = size


def _declare_outputs(graph: Graph, found: Walk, native: bool) -> None:
    assert graph.carrier is not None
    axes_of = {tensor.name: found.of(tensor) for tensor in graph.outputs if native and found.changed(tensor)}
    for value in graph.carrier.output:
        for axis, dim in zip(axes_of.get(value.name, ()), value.type.tensor_type.shape.dim, strict=False):
            if axis.changed and dim.HasField("dim_value"):
                dim.dim_value = axis.new


def _forget_sizes(graph: Graph, names: set[str]) -> None:
    """Drop what the file said about the shapes of tensors that have another one now."""
    assert graph.carrier is not None
    kept = [value for value in graph.carrier.value_info if value.name not in names]
    if len(kept) != len(graph.carrier.value_info):
        del graph.carrier.value_info[:]
        graph.carrier.value_info.extend(kept)


def _check(graph: Graph, image: _Image, found: Walk, moved: dict[Tensor, Tensor], resized: set[Tensor]) -> None:
    """Hold what the walk said against shape inference on the edited graph."""
    with _numbers_for_sizes(graph, image, sized=False):
        infer_shapes(graph)
    for tensor, axes in found.axes.items():
        shape = static_shape(moved.get(tensor, tensor))
        wanted = tuple(axis.old if tensor in resized else axis.new for axis in axes)
        if shape is not None and shape != wanted and tensor.name:
            raise PassError(f"after scaling, {tensor.name!r} is {list(shape)} and should be {list(wanted)}")
