"""How operators compute with sizes: one rule per operator, element by element; see ``sizes``.

A rule returns None where it cannot follow. Divisions truncate toward zero, as onnxruntime's do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from onnxcompress.graph import Node, Tensor, optional_input, rank, static_shape
from onnxcompress.sizes.polynomial import Size, product

if TYPE_CHECKING:
    from onnxcompress.sizes import Sizes, Values

ValueRule = Callable[["Sizes", Node], "Values | None"]
ShapeRule = Callable[["Sizes", Node], "Sequence[Size | None] | None"]
ZERO, ONE = Size.of(0), Size.of(1)


def _values(items: Sequence[Size], scalar: bool = False) -> Values:
    from onnxcompress.sizes import Values

    return Values(tuple(items), scalar)


# -- moving elements -------------------------------------------------------------------------------------------------


def _copy(sizes: Sizes, node: Node) -> Values | None:
    return sizes.values(node.inputs[0])


def _shape(sizes: Sizes, node: Node) -> Values | None:
    dims = sizes.dims(node.inputs[0])
    # A Python slice clamps start and end as the operator does.
    return None if dims is None else _values(dims[node.attrs.get("start", 0) : node.attrs.get("end", len(dims))])


def _size(sizes: Sizes, node: Node) -> Values | None:
    dims = sizes.dims(node.inputs[0])
    return None if dims is None else _values([product(dims)], scalar=True)


def _cast(sizes: Sizes, node: Node) -> Values | None:
    source, dtype = sizes.values(node.inputs[0]), node.outputs[0].dtype
    if source is None or dtype is None:
        return None
    if np.dtype(dtype) == np.bool_:
        known = source.known
        return None if known is None else _values([Size.of(bool(item)) for item in known], source.scalar)
    if np.dtype(dtype).kind not in "iu":
        return None
    if np.dtype(dtype) == np.int64:
        return source
    limits, output, items = np.iinfo(np.dtype(dtype)), node.outputs[0], []
    for i, item in enumerate(source.items):
        # No axis has 2^31 elements where a model computes with its length in int32.
        fits = np.dtype(dtype) == np.int32 and sizes.is_axis_length(item)
        if item.known is not None:
            fits = limits.min <= item.known <= limits.max
        items.append(item if fits else sizes.unknown((output, "element", i)))
    return _values(items, source.scalar)


def _gather(sizes: Sizes, node: Node) -> Values | None:
    source, picks = sizes.values(node.inputs[0]), sizes.values(node.inputs[1])
    if source is None or source.scalar or picks is None or picks.known is None:
        return None
    n = len(source.items)
    if not all(-n <= i < n for i in picks.known):
        return None
    return _values([source.items[i] for i in picks.known], picks.scalar)


def _slice(sizes: Sizes, node: Node) -> Values | None:
    source = sizes.values(node.inputs[0])
    if source is None or source.scalar:
        return None
    if "starts" in node.attrs:
        bounds: list[int] = [*node.attrs["starts"], *node.attrs["ends"], 1]
    else:
        given = [sizes.values(optional_input(node, i)) for i in (1, 2, 4)]
        starts, ends = given[0], given[1]
        steps = given[2] or (_values([ONE]) if optional_input(node, 4) is None else None)
        if starts is None or ends is None or steps is None:
            return None
        bounds = [item for part in (starts, ends, steps) for item in part.known or ()]
    return _values(source.items[slice(*bounds)]) if len(bounds) == 3 and bounds[2] != 0 else None


def _concat(sizes: Sizes, node: Node) -> Values | None:
    parts = [sizes.values(tensor) for tensor in node.inputs]
    items: list[Size] = []
    for part in parts:
        if part is None or part.scalar:
            return None
        items += part.items
    return _values(items)


def split(sizes: Sizes, node: Node) -> Iterator[tuple[Tensor, Values]]:
    """Outputs of a Split with their elements."""
    source = sizes.values(node.inputs[0])
    lengths = [static_shape(tensor) for tensor in node.outputs]
    if source is None or source.scalar or sum(n[0] for n in lengths if n) != len(source.items) or None in lengths:
        return
    start = 0
    for tensor, length in zip(node.outputs, lengths, strict=True):
        assert length is not None
        yield tensor, _values(source.items[start : start + length[0]])
        start += length[0]


def _unsqueeze(sizes: Sizes, node: Node) -> Values | None:
    source = sizes.values(node.inputs[0])
    return _values(source.items) if source is not None and source.scalar and rank(node.outputs[0]) == 1 else None


def _squeeze(sizes: Sizes, node: Node) -> Values | None:
    source = sizes.values(node.inputs[0])
    return _values(source.items, True) if source is not None and rank(node.outputs[0]) == 0 else None


def _reshape(sizes: Sizes, node: Node) -> Values | None:
    source, target = sizes.values(node.inputs[0]), sizes.values(optional_input(node, 1))
    if source is None or target is None or len(target.items) > 1:
        return None
    return _values(source.items, scalar=not target.items)


def _repeat(sizes: Sizes, node: Node) -> Values | None:
    """Expand and Tile of something with one element."""
    source, counts = sizes.values(node.inputs[0]), sizes.values(node.inputs[1])
    if source is None or len(source.items) != 1 or counts is None or counts.known is None or len(counts.known) != 1:
        return None
    return _values(source.items * counts.known[0]) if 0 <= counts.known[0] <= 64 else None


def _constant_of_shape(sizes: Sizes, node: Node) -> Values | None:
    target = sizes.values(node.inputs[0])
    if target is None or target.known is None or len(target.known) > 1 or "value" not in node.attrs:
        return None
    value = node.attrs["value"].values
    if value.dtype.kind not in "iub" or not all(0 <= n <= 64 for n in target.known):
        return None
    return _values([Size.of(int(value.reshape(-1)[0]))] * (target.known or (1,))[0], scalar=not target.known)


def _range(sizes: Sizes, node: Node) -> Values | None:
    given = [sizes.values(tensor) for tensor in node.inputs]
    bounds = [item for part in given if part is not None for item in part.known or ()]
    if len(bounds) != 3 or bounds[2] == 0 or len(range(*bounds)) > 64:
        return None
    return _values([Size.of(i) for i in range(*bounds)])


# -- arithmetic ------------------------------------------------------------------------------------------------------


def _broadcast(sizes: Sizes, node: Node) -> tuple[list[tuple[Size, ...]], bool] | None:
    """Rows of elements that meet, and whether the result is a scalar."""
    parts: list[Values] = []
    for tensor in node.inputs:
        part = sizes.values(tensor)
        if part is None:
            return None
        parts.append(part)
    lengths = {len(part.items) for part in parts} - {1}
    if len(lengths) > 1 or not parts:
        return None
    n = lengths.pop() if lengths else 1
    columns = [part.items if len(part.items) == n else part.items * n for part in parts]
    return list(zip(*columns, strict=True)), all(part.scalar for part in parts)


def _elementwise(rule: Callable[..., Size | None]) -> ValueRule:
    def apply(sizes: Sizes, node: Node) -> Values | None:
        rows = _broadcast(sizes, node)
        if rows is None:
            return None
        items = [rule(sizes, node, *row) for row in rows[0]]
        return None if None in items else _values([item for item in items if item is not None], rows[1])

    return apply


def _truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _div(sizes: Sizes, node: Node, a: Size, b: Size) -> Size | None:
    if a.known is not None and b.known is not None:
        return Size.of(_truncated(a.known, b.known)) if b.known else None
    exact = a.divided_by(b)
    if exact is not None:
        return exact
    return sizes.unknown(("div", a, b), not_negative=sizes.is_not_negative(a) and sizes.is_not_negative(b))


def _mod(sizes: Sizes, node: Node, a: Size, b: Size) -> Size | None:
    if a.known is None or not b.known:
        return ZERO if b.known and a.divided_by(b) is not None else None
    if node.attrs.get("fmod", 0):
        return Size.of(a.known - b.known * _truncated(a.known, b.known))
    return Size.of(a.known % b.known)


def _less(sizes: Sizes, a: Size, b: Size) -> Size | None:
    if sizes.is_positive(b - a):
        return ONE
    return ZERO if sizes.is_not_negative(a - b) else None


def _equal(sizes: Sizes, node: Node, a: Size, b: Size) -> Size | None:
    if a == b:
        return ONE
    return ZERO if sizes.is_positive(a - b) or sizes.is_positive(b - a) else None


def _negated(flag: Size | None) -> Size | None:
    return None if flag is None else ONE - flag


def _where(sizes: Sizes, node: Node, condition: Size, a: Size, b: Size) -> Size | None:
    if a == b:
        return a
    return None if condition.known is None else a if condition.known else b


def _least(sizes: Sizes, items: Sequence[Size]) -> Size | None:
    return next((x for x in items if all(sizes.is_not_negative(y - x) for y in items)), None)


def _greatest(sizes: Sizes, items: Sequence[Size]) -> Size | None:
    return next((x for x in items if all(sizes.is_not_negative(x - y) for y in items)), None)


def _reduce(rule: Callable[[Sizes, Sequence[Size]], Size | None]) -> ValueRule:
    def apply(sizes: Sizes, node: Node) -> Values | None:
        source = sizes.values(node.inputs[0])
        given = sizes.values(optional_input(node, 1))
        axes = given.items if given is not None else node.attrs.get("axes")
        # Without axes everything is reduced, unless the operator is told that nothing is.
        if source is None or source.scalar or (not axes and node.attrs.get("noop_with_empty_axes", 0)):
            return None
        found = rule(sizes, source.items)
        return None if found is None else _values([found], scalar=not node.attrs.get("keepdims", 1))

    return apply


VALUES: dict[str, ValueRule] = {
    "Abs": _elementwise(lambda s, n, a: a if s.is_not_negative(a) else None),
    "Add": _elementwise(lambda s, n, a, b: a + b),
    "And": _elementwise(lambda s, n, a, b: a * b),
    "Cast": _cast,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Div": _elementwise(_div),
    "Equal": _elementwise(_equal),
    "Expand": _repeat,
    "Gather": _gather,
    "Greater": _elementwise(lambda s, n, a, b: _less(s, b, a)),
    "GreaterOrEqual": _elementwise(lambda s, n, a, b: _negated(_less(s, a, b))),
    "Identity": _copy,
    "Less": _elementwise(lambda s, n, a, b: _less(s, a, b)),
    "LessOrEqual": _elementwise(lambda s, n, a, b: _negated(_less(s, b, a))),
    "Max": _elementwise(lambda s, n, *row: _greatest(s, row)),
    "Min": _elementwise(lambda s, n, *row: _least(s, row)),
    "Mod": _elementwise(_mod),
    "Mul": _elementwise(lambda s, n, a, b: a * b),
    "Neg": _elementwise(lambda s, n, a: -a),
    "Not": _elementwise(lambda s, n, a: ONE - a),
    "Or": _elementwise(lambda s, n, a, b: a + b - a * b),
    "Range": _range,
    "ReduceMax": _reduce(_greatest),
    "ReduceMin": _reduce(_least),
    "ReduceProd": _reduce(lambda s, items: product(items)),
    "ReduceSum": _reduce(lambda s, items: sum(items, start=ZERO)),
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": _elementwise(lambda s, n, a, b: a - b),
    "Tile": _repeat,
    "Unsqueeze": _unsqueeze,
    "Where": _elementwise(_where),
}


# -- shapes of outputs -----------------------------------------------------------------------------------------------


def _shape_of_reshape(sizes: Sizes, node: Node) -> Sequence[Size | None] | None:
    source, target = sizes.dims(node.inputs[0]), sizes.values(optional_input(node, 1))
    if source is None or target is None:
        return None
    return sizes.reshaped(source, target.items, allow_zero=bool(node.attrs.get("allowzero", 0)))


def _shape_of_flatten(sizes: Sizes, node: Node) -> Sequence[Size | None] | None:
    dims = sizes.dims(node.inputs[0])
    if dims is None:
        return None
    axis = node.attrs.get("axis", 1)
    return [product(dims[:axis]), product(dims[axis:])]


def _shape_of_concat(sizes: Sizes, node: Node) -> Sequence[Size | None] | None:
    shapes = [sizes.dims(tensor) for tensor in node.inputs]
    first, axis = shapes[0], node.attrs.get("axis", 0)
    total = ZERO
    for dims in shapes:
        if dims is None or first is None or len(dims) != len(first) or not -len(dims) <= axis < len(dims):
            return None
        total += dims[axis]
    assert first is not None
    return [total if i == axis % len(first) else dim for i, dim in enumerate(first)]


def _shape_of_fill(sizes: Sizes, node: Node) -> Sequence[Size | None] | None:
    target = sizes.values(node.inputs[0])
    return None if target is None else target.items


def _shape_of_expand(sizes: Sizes, node: Node) -> Sequence[Size | None] | None:
    source, target = sizes.dims(node.inputs[0]), sizes.values(node.inputs[1])
    if source is None or target is None:
        return None
    axes = max(len(source), len(target.items))
    pairs = zip((ONE,) * (axes - len(source)) + source, (ONE,) * (axes - len(target.items)) + target.items, strict=True)
    return [broadcast_size(a, b) for a, b in pairs]


def broadcast_size(a: Size, b: Size) -> Size | None:
    """The size of an axis where ``a`` and ``b`` meet: equal, or one of them 1. None where it is not known which."""
    if a in (b, ONE):
        return b
    if b == ONE:
        return a
    # A number above 1 stays, whatever the other one is.
    return next((size for size in (a, b) if size.known is not None and size.known > 1), None)


def _shape_of_tile(sizes: Sizes, node: Node) -> Sequence[Size | None] | None:
    source, counts = sizes.dims(node.inputs[0]), sizes.values(node.inputs[1])
    if source is None or counts is None or len(counts.items) != len(source):
        return None
    return [a * b for a, b in zip(source, counts.items, strict=True)]


def _shape_of_elementwise(sizes: Sizes, node: Node) -> Sequence[Size | None] | None:
    shapes = []
    for tensor in node.inputs:
        dims = sizes.dims(tensor)
        if dims is None:
            return None
        shapes.append(dims)
    axes = max(map(len, shapes))
    columns = zip(*((ONE,) * (axes - len(dims)) + dims for dims in shapes), strict=True)
    return [functools.reduce(_meet, column) for column in columns]


def _shape_of_first(sizes: Sizes, node: Node) -> Sequence[Size | None] | None:
    return sizes.dims(node.inputs[0])


def _meet(a: Size | None, b: Size | None) -> Size | None:
    return None if a is None or b is None else broadcast_size(a, b)


_ELEMENTWISE = (
    *("Add", "Sub", "Mul", "Div", "Mod", "Pow", "Max", "Min", "Mean", "Sum", "And", "Or", "Xor", "Where", "PRelu"),
    *("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"),
)

SHAPES: dict[str, ShapeRule] = {
    **dict.fromkeys(_ELEMENTWISE, _shape_of_elementwise),
    "Concat": _shape_of_concat,
    "ConstantOfShape": _shape_of_fill,
    "Expand": _shape_of_expand,
    "Flatten": _shape_of_flatten,
    "GroupNormalization": _shape_of_first,  # of which onnx's inference tells not even the type
    "Reshape": _shape_of_reshape,
    "Tile": _shape_of_tile,
}
