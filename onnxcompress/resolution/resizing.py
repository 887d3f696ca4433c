"""Resize nodes behind the input, and in front of outputs that are images."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxcompress.graph import Graph, Node, Tensor, Variable
from onnxcompress.resolution.axes import Axes
from onnxcompress.resolution.image import Image


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


def resize_input(graph: Graph, image: Image, new: tuple[int, int], antialias: bool) -> Tensor:
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


def resize_output(graph: Graph, image: Image, tensor: Tensor, axes: Axes) -> None:
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


def _resize_to_input(graph: Graph, image: Image, inner: Tensor, tensor: Tensor, axes: Axes, last: Node) -> None:
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
