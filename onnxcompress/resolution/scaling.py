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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcompress.errors import ModelError, PassError, RecipeError
from onnxcompress.graph import Graph, Tensor, Variable, numpy_dtype, static_shape
from onnxcompress.passes.replace_constant_nodes import ReplaceConstantNodes
from onnxcompress.resolution.axes import Axes
from onnxcompress.resolution.image import OPEN_SIZES, Image, find_image, numbers_for_sizes
from onnxcompress.resolution.old_shapes import infer_old_shapes
from onnxcompress.resolution.resizing import resize_input, resize_output
from onnxcompress.resolution.rules import RULES
from onnxcompress.resolution.walk import Repair, Walk, walk
from onnxcompress.shapes import infer_shapes

logger = logging.getLogger(__name__)

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


def scale_resolution(
    graph: Graph,
    ratio: float,
    *,
    native: bool = False,
    input_name: str | None = None,
    input_shape: Sequence[int] | None = None,
    antialias: bool | None = None,
) -> Resolution:
    """Let a graph work at another resolution, in place; the protobuf that it was loaded from changes with it.

    Args:
        graph: Its shapes are inferred again afterwards.
        ratio: Of each side, above 0 and at most 1; sides are rounded to whole pixels.
        native: Make the input itself smaller, and with it outputs that are images.
        input_name: The image, where there are several inputs with rows and columns.
        input_shape: Its shape, where the file leaves rows or columns open.
        antialias: Let the Resize behind the input average over the pixels that it would leave out; by default where
            the opset has it (18). Without finetuning, four networks on Fashion-MNIST at 24 to 14 of 28 pixels were
            0.8 points better with it: from 1.5 worse to 3.6 better, the more the fewer pixels are left.

    Raises:
        RecipeError: The ratio, the name or the shape is wrong.
        ModelError: The graph works at its own resolution only; says which node and why. The graph is as it was.
    """
    if not 0 < ratio <= 1:
        raise RecipeError(f"resolution ratio {ratio:g}: it must be above 0 and at most 1")
    image = find_image(graph, input_name, input_shape)
    new = image.scaled(ratio)
    if new == image.size:
        return Resolution(image.tensor.name, image.size, new, native)
    smooth = graph.opset >= ANTIALIAS_OPSET if antialias is None else antialias
    needed = ANTIALIAS_OPSET if smooth else RESIZE_OPSET
    if not native and graph.opset < needed:
        what = "antialiased" if smooth else "half-pixel"
        raise ModelError(
            f"opset {graph.opset} has no {what} Resize, which opset {needed} has: change the input itself (native)"
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
        inner = resize_input(graph, image, new, smooth)
        for tensor, axes in dense:
            resize_output(graph, image, tensor, axes)
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
    image = find_image(graph, input_name, input_shape)
    height = image.size[0]
    ReplaceConstantNodes().apply(graph)
    result = []
    with numbers_for_sizes(graph, image):
        infer_old_shapes(graph)
        shapes = _shapes(graph)
        for rows in sorted(set(heights if heights is not None else range(math.ceil(SMALLEST_RATIO * height), height))):
            if not 0 < rows < height:
                continue
            try:
                found = walk(graph, {image.tensor: image.at(image.scaled(rows / height))}, RULES, free=OPEN_SIZES)
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


def _follow(graph: Graph, image: Image, new: tuple[int, int], native: bool) -> tuple[Walk, list[tuple[Tensor, Axes]]]:
    """What changes, and the outputs that are resized; sizes are numbers afterwards, those of the old resolution."""
    with numbers_for_sizes(graph, image):
        infer_old_shapes(graph)
        shapes = _shapes(graph)
        try:
            found = walk(graph, {image.tensor: image.at(new)}, RULES, free=OPEN_SIZES)
            return found, _dense_outputs(found, image, native)
        finally:
            _set_shapes(shapes)


def _shapes(graph: Graph) -> list[tuple[Tensor, list[int | str | None] | None]]:
    tensors = {t: None for inner in graph.walk() for node in inner.nodes for t in node.outputs}
    tensors |= dict.fromkeys(graph.inputs)
    return [(t, None if t.shape is None else list(t.shape)) for t in tensors if isinstance(t, Variable)]


def _set_shapes(shapes: Sequence[tuple[Tensor, list[int | str | None] | None]]) -> None:
    for tensor, shape in shapes:
        tensor.shape = None if shape is None else list(shape)


# -- edits -----------------------------------------------------------------------------------------------------------


def _dense_outputs(found: Walk, image: Image, native: bool) -> list[tuple[Tensor, Axes]]:
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
            raise found.refusal(
                f"output {tensor.name!r} would be {[axis.new for axis in axes]} instead of "
                f"{[axis.old for axis in axes]}, and no image that could be resized: change the input itself (native)"
            )
        dense.append((tensor, axes))
    return dense


def _declare_input(graph: Graph, image: Image, new: tuple[int, int]) -> None:
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


def _check(graph: Graph, image: Image, found: Walk, moved: dict[Tensor, Tensor], resized: set[Tensor]) -> None:
    """Hold what the walk said against shape inference on the edited graph."""
    with numbers_for_sizes(graph, image, sized=False):
        infer_shapes(graph)
    for tensor, axes in found.axes.items():
        shape = static_shape(moved.get(tensor, tensor))
        wanted = tuple(axis.old if tensor in resized else axis.new for axis in axes)
        if shape is not None and shape != wanted and tensor.name:
            raise PassError(f"after scaling, {tensor.name!r} is {list(shape)} and should be {list(wanted)}")
