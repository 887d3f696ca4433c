"""Decomposed normalizations: (x - mean) / sqrt(var + epsilon), with or without the mean, in the ways files write them.

    mean = ReduceMean(x)   d = x - mean   var = ReduceMean(d * d)   y = d / sqrt(var + epsilon) * scale + shift

The division may be a product with a reciprocal, scale may stand anywhere in it, squares may be Pow or Mul, and the
deviation may be computed twice. Keras writes x * r + (shift - mean * r) with r = scale / sqrt(var + epsilon).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxcompress.graph import (
    Graph,
    Node,
    Tensor,
    constant_value,
    is_constant,
    is_op,
    numpy_dtype,
    rank,
    static_shape,
)
from onnxcompress.patterns.cones import replace_cone, upstream, why_not_replace
from onnxcompress.patterns.reductions import Mean, read_mean, sizes_along
from onnxcompress.patterns.scalar_algebra import Product, float_dtype, read_product, scalar_beside

# A constant operand as scale or shift of the wanted operator, or None when it does not lie along its axes.
Fit = Callable[[Tensor], "np.ndarray | None"]
ChooseFit = Callable[[Tensor, "tuple[int, ...]"], "Fit | str | None"]


@dataclass(frozen=True, eq=False)
class Standardized:
    """output = scale * (source - mean) / sqrt(var + epsilon) + shift; without the mean when not ``centred``.

    Attributes:
        source: What is normalized.
        output: What the last node makes.
        axes: The axes of mean and variance, counted from the front and sorted.
        epsilon: Not negative.
        nodes: All that would go.
        dtype: Element type of source and output.
        scale: In the shape that the fit gave it; None where there is none. ``factor`` comes on top of it.
        shift: As ``scale``; None where there is none.
        factor: A scalar part of the scale.
    """

    source: Tensor
    output: Tensor
    axes: tuple[int, ...]
    epsilon: float
    nodes: tuple[Node, ...]
    dtype: np.dtype
    scale: np.ndarray | None = None
    shift: np.ndarray | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class _Variance:
    """A tensor var + epsilon, and what it is the variance of."""

    tensor: Tensor
    source: Tensor
    deviation: Tensor  # source itself where nothing is subtracted
    axes: tuple[int, ...]
    epsilon: float | None  # None where it is no constant scalar
    nodes: tuple[Node, ...]


def read_standardized(
    graph: Graph, node: Node, *, centred: bool, choose_fit: ChooseFit, through_casts: bool = False
) -> Standardized | str | None:
    """The normalization whose last step before scale and shift is ``node``, with the scale and shift that follow.

    Args:
        graph: The graph of the node.
        node: A Mul, Div or Add.
        centred: Whether the mean is subtracted.
        choose_fit: Given source and axes: how constants become scale and shift, the reason why that is not known, or
            None where the wanted operator does not normalize these axes.
        through_casts: Whether the operator reads float16 and computes in float32 by itself.

    Returns:
        None when ``node`` is another thing, a reason when it looks right and is not.
    """
    for variance in _variances(graph, node, centred):
        core = _read_keras_form(graph, node, variance) if node.op == "Add" else _read_core(graph, node, variance)
        if core is None:
            continue
        fit = choose_fit(variance.source, variance.axes)
        if fit is None or isinstance(fit, str):
            return fit
        dtype, epsilon = float_dtype(variance.source), variance.epsilon
        if dtype is None:
            return "the input is not known to be float16, float32 or float64"
        if epsilon is None or epsilon < 0:
            return "epsilon is not a constant scalar of 0 or more"
        bare = Standardized(
            variance.source, node.outputs[0], variance.axes, epsilon, core.nodes, dtype, factor=core.factor
        )
        found = _with_constants(bare, core, fit)
        if isinstance(found, str):
            return found
        found = _extend(graph, found, fit, through_casts=through_casts, shifts=centred)
        reason = why_not_replace(graph, found.nodes, found.output)
        return reason if reason is not None else found
    return None


def finished(found: Standardized, shape: Sequence[int]) -> Standardized | str:
    """With the scale, of ones where there was none, and the shift as the operator takes them; or why they cannot be."""
    scale = np.ones(shape) if found.scale is None else found.scale.astype(np.float64)
    with np.errstate(over="ignore"):
        numbers = (scale * found.factor).astype(found.dtype)
    if not np.isfinite(numbers).all() or (found.shift is not None and not np.isfinite(found.shift).all()):
        return "scale or shift is not finite"
    shift = None if found.shift is None else np.ascontiguousarray(found.shift.astype(found.dtype))
    return replace(found, scale=numbers, shift=shift, factor=1.0)


def choose_last_axes(source: Tensor, axes: tuple[int, ...]) -> Fit | str | None:
    """The fit of an operator that normalizes the last axes."""
    axis_count, sizes = rank(source), sizes_along(source, axes)
    if axis_count is None or axes != tuple(range(axis_count - len(axes), axis_count)):
        return None
    if sizes is None:
        return "the sizes of the normalized axes are not known"
    return fit_last_axes(source, sizes)


def finished_last_axes(found: Standardized, op: str, needed_opset: int, opset: int) -> Standardized | str:
    """``finished`` for LayerNormalization and RMSNormalization."""
    if opset < needed_opset:
        return f"{op} needs opset {needed_opset}, the model has {opset}"
    if found.dtype == np.float64:
        return f"{op} computes in float32 (stash_type), which is less than float64"
    sizes = sizes_along(found.source, found.axes)
    return "the sizes of the normalized axes are not known" if sizes is None else finished(found, sizes)


def replace_last_axes(graph: Graph, site: Standardized, op: str) -> None:
    """Put LayerNormalization or RMSNormalization in place of a finished normalization."""
    assert site.scale is not None
    label = site.output.name or op.lower()
    inputs: list[Tensor] = [site.source, graph.new_constant(f"{label}.scale", site.scale)]
    if site.shift is not None:
        inputs.append(graph.new_constant(f"{label}.bias", site.shift))
    attrs = {"axis": -len(site.axes), "epsilon": site.epsilon}
    replace_cone(graph, site.nodes, site.output, op, inputs, attrs)


# -- variance --------------------------------------------------------------------------------------------------------


def _variances(graph: Graph, node: Node, centred: bool) -> list[_Variance]:
    """What stands under a square root near ``node``."""
    found = []
    between = ("Mul", "Div", "Reciprocal", *(("Add", "Sub") if node.op == "Add" else ()))
    for tensor in upstream(graph, node.outputs[0], between, 4):
        root = graph.producer(tensor)
        if root is None or not is_op(root, "Sqrt", "Pow"):
            continue
        if root.op == "Pow" and scalar_beside(root.inputs[1], root.inputs[0]) not in (0.5, -0.5):
            continue
        variance = _read_variance(graph, root.inputs[0], centred)
        if variance is not None:
            found.append(variance)
    return found


def _read_variance(graph: Graph, tensor: Tensor, centred: bool) -> _Variance | None:
    add = graph.producer(tensor)
    if add is None or not is_op(add, "Add"):
        return None
    for i in (0, 1):
        mean = read_mean(graph, add.inputs[i])
        square = None if mean is None else graph.producer(mean.source)
        deviation = None if square is None else _squared(square)
        if mean is None or square is None or deviation is None:
            continue
        epsilon = scalar_beside(add.inputs[1 - i], add.inputs[i])
        nodes = (add, *mean.nodes, square)
        centre = _read_deviation(graph, deviation)
        if not centred:
            bare = _Variance(tensor, deviation, deviation, mean.axes, epsilon, nodes)
            return bare if centre is None else None
        if centre is not None and centre[0].axes == mean.axes:
            return _Variance(tensor, centre[0].source, deviation, mean.axes, epsilon, (*nodes, *centre[1]))
    return None


def _squared(node: Node) -> Tensor | None:
    if is_op(node, "Mul") and node.inputs[0] is node.inputs[1]:
        return node.inputs[0]
    if is_op(node, "Pow") and scalar_beside(node.inputs[1], node.inputs[0]) == 2:
        return node.inputs[0]
    return None


def _read_deviation(graph: Graph, tensor: Tensor) -> tuple[Mean, tuple[Node, ...]] | None:
    """x - mean(x) as the mean and the nodes."""
    sub = graph.producer(tensor)
    if sub is None or not is_op(sub, "Sub"):
        return None
    mean = read_mean(graph, sub.inputs[1])
    return (mean, (sub, *mean.nodes)) if mean is not None and mean.source is sub.inputs[0] else None


# -- from the variance to the output ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Core:
    """What is computed up to a node: constants with their powers as scale, a factor, maybe a shift."""

    nodes: tuple[Node, ...]
    factor: float
    scales: tuple[tuple[Tensor, float], ...]
    shift: Tensor | None = None


def _read_core(graph: Graph, node: Node, variance: _Variance) -> _Core | None:
    leaves, nodes = [variance.deviation], variance.nodes
    if variance.deviation is not variance.source:
        # The deviation may be computed a second time for the numerator.
        for tensor in upstream(graph, node.outputs[0], ("Mul", "Div"), 3):
            other = _read_deviation(graph, tensor)
            if other is not None and other[0].source is variance.source and other[0].axes == variance.axes:
                leaves.append(tensor)
                nodes = (*nodes, *other[1])
    leaves.append(variance.tensor)
    product = _as_core(read_product(graph, node.outputs[0], leaves), variance)
    before = next((t for t, other in (node.inputs, node.inputs[::-1]) if is_constant(other)), None)
    if product is None or (before is not None and _as_core(read_product(graph, before, leaves), variance) is not None):
        return None  # where a constant is all that ``node`` adds, the node before it is the one that is asked for
    return _Core((*product.nodes, *nodes), product.coefficient, _constants(product))


def _as_core(product: Product | None, variance: _Variance) -> Product | None:
    """The product when it is a deviation over the square root of the variance, and constants."""
    if product is None or product.powers.get(variance.tensor) != -0.5:
        return None
    live = [t for t in product.powers if not is_constant(t) and t is not variance.tensor]
    return product if len(live) == 1 and product.powers[live[0]] == 1 else None


def _constants(product: Product) -> tuple[tuple[Tensor, float], ...]:
    return tuple((tensor, power) for tensor, power in product.powers.items() if is_constant(tensor))


def _read_keras_form(graph: Graph, node: Node, variance: _Variance) -> _Core | None:
    """x * r + (shift - mean * r), with r = scale / sqrt(var + epsilon)."""
    if variance.deviation is variance.source:
        return None
    for scaled, offset in (node.inputs, node.inputs[::-1]):
        mul, sub = graph.producer(scaled), graph.producer(offset)
        moved = graph.producer(sub.inputs[1]) if sub is not None and is_op(sub, "Sub") else None
        if mul is None or sub is None or moved is None or not is_op(mul, "Mul") or not is_op(moved, "Mul"):
            continue
        ratio, mean_tensor = _other_input(mul, variance.source), None
        if ratio is not None:
            mean_tensor = _other_input(moved, ratio)
        if ratio is None or mean_tensor is None or not is_constant(sub.inputs[0]):
            continue
        mean = read_mean(graph, mean_tensor)
        product = read_product(graph, ratio, [variance.tensor])
        if mean is None or mean.source is not variance.source or mean.axes != variance.axes:
            continue
        if product is None or product.powers.get(variance.tensor) != -0.5:
            continue
        nodes = (node, mul, sub, moved, *mean.nodes, *product.nodes, *variance.nodes)
        return _Core(nodes, product.coefficient, _constants(product), sub.inputs[0])
    return None


def _other_input(node: Node, tensor: Tensor) -> Tensor | None:
    """The operand beside ``tensor`` of a node with two; None when ``tensor`` is none of them."""
    a, b = node.inputs
    return b if a is tensor else a if b is tensor else None


def _with_constants(bare: Standardized, core: _Core, fit: Fit) -> Standardized | str:
    found = bare
    for tensor, power in core.scales:
        values = fit(tensor)
        if values is None or power not in (1, -1) or (power == -1 and not values.all()):
            return "the scale does not lie along the axes that the operator scales"
        wide = values.astype(np.float64) ** power
        found = replace(found, scale=wide if found.scale is None else found.scale * wide)
    if core.shift is not None:
        shift = fit(core.shift)
        if shift is None:
            return "the shift does not lie along the axes that the operator shifts"
        found = replace(found, shift=shift)
    return found


def _extend(graph: Graph, found: Standardized, fit: Fit, *, through_casts: bool, shifts: bool) -> Standardized:
    """Take in the scale and the shift that follow, and before them a Cast back to the type before a Cast."""
    if found.shift is not None:
        return found
    if found.scale is None:
        if through_casts:
            found = _through_casts(graph, found)
        reader, values = _next_constant(graph, found.output, "Mul", fit)
        if reader is not None and values is not None:
            scale = values.astype(np.float64)
            found = replace(found, output=reader.outputs[0], nodes=(*found.nodes, reader), scale=scale)
    # RMSNormalization has no shift.
    reader, values = _next_constant(graph, found.output, "Add", fit) if shifts else (None, None)
    if reader is not None and values is not None:
        found = replace(found, output=reader.outputs[0], nodes=(*found.nodes, reader), shift=values)
    return found


def _next_constant(graph: Graph, tensor: Tensor, op: str, fit: Fit) -> tuple[Node | None, np.ndarray | None]:
    """The only reader when it is ``op`` with a constant that fits, and that constant."""
    reader = graph.only_reader(tensor)
    constant = None if reader is None or not is_op(reader, op) else _other_input(reader, tensor)
    return (reader, fit(constant)) if constant is not None and is_constant(constant) else (None, None)


def _through_casts(graph: Graph, found: Standardized) -> Standardized:
    """Cast(normalize(Cast(x))) as normalize(x) for float16 with float32 between, which is what the operators do."""
    before, after = graph.producer(found.source), graph.only_reader(found.output)
    if before is None or after is None or not is_op(before, "Cast") or not is_op(after, "Cast"):
        return found
    outer = numpy_dtype(before.inputs[0])
    if outer != np.float16 or found.dtype != np.float32 or numpy_dtype(after.outputs[0]) != outer:
        return found
    nodes = (*found.nodes, after)
    if why_not_replace(graph, (*nodes, before), after.outputs[0]) is None:
        nodes = (*nodes, before)  # otherwise something else reads it, and it stays for that
    return replace(found, source=before.inputs[0], output=after.outputs[0], nodes=nodes, dtype=np.dtype(np.float16))


# -- how constants lie along axes ------------------------------------------------------------------------------------


def fit_last_axes(source: Tensor, sizes: Sequence[int]) -> Fit:
    """Constants that vary along the last axes alone, in the shape of these axes."""

    def fit(constant: Tensor) -> np.ndarray | None:
        aligned = _aligned(constant, source)
        if aligned is None:
            return None
        own, rest = aligned[len(aligned) - len(sizes) :], aligned[: len(aligned) - len(sizes)]
        if any(n != 1 for n in rest) or any(n not in (1, size) for n, size in zip(own, sizes, strict=True)):
            return None
        values = constant_value(constant)
        return None if values is None else np.broadcast_to(values.reshape(own), tuple(sizes))

    return fit


def fit_channels(source: Tensor, channels: int) -> Fit:
    """Constants that vary along axis 1 alone, as a vector."""

    def fit(constant: Tensor) -> np.ndarray | None:
        aligned = _aligned(constant, source)
        if aligned is None or any(n not in ((1, channels) if i == 1 else (1,)) for i, n in enumerate(aligned)):
            return None
        values = constant_value(constant)
        return None if values is None else np.broadcast_to(values.reshape(-1), (channels,))

    return fit


def _aligned(constant: Tensor, source: Tensor) -> tuple[int, ...] | None:
    """The shape of a constant with axes of size 1 put in front, as a broadcast does; None when it adds axes."""
    shape, axes = static_shape(constant), rank(source)
    if shape is None or axes is None or len(shape) > axes:
        return None
    return (1,) * (axes - len(shape)) + shape
