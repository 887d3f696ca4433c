"""Inputs and outputs of a model: the one place where they are changed, and only when the user says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import ModelProto, TensorShapeProto, ValueInfoProto

from onnxcompress.errors import RecipeError


def set_input_shapes(proto: ModelProto, shapes: Mapping[str, Sequence[int | str]], batch: int | None) -> bool:
    """Give inputs the shapes that the user wants; a symbol that gets a number gets it everywhere in the interface.

    Args:
        proto: Changed in place.
        shapes: New shape per input name; -1 and strings leave the axis dynamic.
        batch: Size of the first axis of every input whose first axis is dynamic.

    Returns:
        Whether anything changed.

    Raises:
        RecipeError: No such input, a wrong number of axes, or a number against a fixed one.
    """
    initializers = {tensor.name for tensor in proto.graph.initializer}
    inputs = {value.name: value for value in proto.graph.input if value.name not in initializers}
    symbols: dict[str, int] = {}
    changed = False
    for name, wanted in shapes.items():
        if name not in inputs:
            raise RecipeError(f"there is no input {name!r}; the model's inputs are {', '.join(map(repr, inputs))}")
        changed |= _set_shape(inputs[name], wanted, symbols)
    if batch is not None:
        if batch < 1:
            raise RecipeError(f"batch {batch}: expected 1 or more")
        for value in inputs.values():
            dims = value.type.tensor_type.shape.dim
            if len(dims) and not dims[0].HasField("dim_value"):
                changed |= _set_dim(dims[0], batch, symbols, value.name, 0)
    for value in [*inputs.values(), *proto.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param") and dim.dim_param in symbols:
                dim.dim_value = symbols[dim.dim_param]
                changed = True
    return changed


def _set_shape(value: ValueInfoProto, wanted: Sequence[int | str], symbols: dict[str, int]) -> bool:
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        kind.shape.CopyFrom(TensorShapeProto(dim=[TensorShapeProto.Dimension() for _ in wanted]))
    dims = kind.shape.dim
    if len(dims) != len(wanted):
        raise RecipeError(
            f"input {value.name!r} has {len(dims)} axes, and {len(wanted)} sizes were given: {list(wanted)}"
        )
    changed = False
    for axis, (dim, size) in enumerate(zip(dims, wanted, strict=True)):
        if isinstance(size, str) or size < 0:
            continue
        if dim.HasField("dim_value") and dim.dim_value != size:
            raise RecipeError(f"input {value.name!r} is fixed to {dim.dim_value} on axis {axis}, not {size}")
        if not dim.HasField("dim_value"):
            changed |= _set_dim(dim, size, symbols, value.name, axis)
    return changed


def _set_dim(dim: TensorShapeProto.Dimension, size: int, symbols: dict[str, int], name: str, axis: int) -> bool:
    symbol = dim.dim_param if dim.HasField("dim_param") else ""
    if symbol and symbols.setdefault(symbol, size) != size:
        raise RecipeError(
            f"input {name!r}: axis {axis} is {symbol!r}, which was given both {symbols[symbol]} and {size}"
        )
    dim.dim_value = size
    return True
