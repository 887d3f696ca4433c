"""Followed sizes against onnxruntime: a polynomial gives the number that the model computes, empty axes included."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.patterns.reshape_target import constant_target
from onnxcompress.sizes import Sizes
from onnxcompress.sizes.polynomial import Size, product
from onnxcompress.testing import graph_of, model, run

X = "float[N,3,M] x"


def value(sizes, size, dims):
    """A polynomial at given dimensions; None where it contains an unknown that is none."""
    names = {number: key for key, number in sizes._unknowns.items()}
    total = 0
    for monomial, k in size.terms:
        if any(names[unknown] not in dims for unknown in monomial):
            return None
        total += k * math.prod(dims[names[unknown]] for unknown in monomial)
    return total


def check(proto, dims=((2, 5), (1, 1), (0, 4), (3, 0)), *, known=True):
    """Every output that is followed, at several sizes; returns the sizes."""
    graph = graph_of(proto)
    sizes = Sizes(graph)
    for n, m in dims:
        results = run(proto, {"x": np.zeros((n, 3, m), np.float32)})
        for tensor, array in zip(graph.outputs, results, strict=True):
            values = sizes.values(tensor)
            if values is None:
                assert not known, tensor.name
                continue
            assert values.scalar == (array.ndim == 0) and len(values.items) == array.size
            for item, number in zip(values.items, array.reshape(-1), strict=True):
                found = value(sizes, item, {"N": n, "M": m})
                assert found is not None or not known
                assert found is None or found == number
                assert not sizes.is_not_negative(item) or number >= 0
                assert not sizes.is_positive(item) or number > 0
    return sizes


CONSTANTS = """<int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64 seven = {7}, int64[1] zero1 = {0},
    int64[1] one1 = {1}, int64[1] two1 = {2}, int64[1] three1 = {3}, int64[1] minus1 = {-1}, int64[1] minus100 = {-100},
    int64[3] picks = {2, -3, 0}, int64[2] lengths = {1, 2}, int64[2] copy_rest = {0, -1}, int64[1] big = {200},
    int64[3] picks3 = {2, 1, 3}, int64[2] all_but_two = {3, -1},
    float half = {0.5}>"""


def shape_model(body, outputs="int64[k] y", **options):
    body = f"s = Shape(x) n = Gather(s, zero) m = Gather(s, two) {body}"
    return model(f"g ({X}) => ({outputs}) {CONSTANTS} {{ {body} }}", **options)


@pytest.mark.parametrize(
    "body",
    [
        "y = Identity(s)",
        "y = Shape<start = 1>(x)",
        "y = Shape<start = -2, end = -1>(x)",
        "y = Gather(s, picks)",
        "a = Unsqueeze(n, zero1) y = Concat<axis = 0>(a, two1, s)",
        "y = Slice(s, zero1, two1)",
        "y = Slice(s, minus1, minus100, zero1, minus1)",
        "r = Reshape(n, minus1) y = Mul(r, s)",
        "y = Add(s, s)",
        "y = Sub(s, n)",
        "a = Mul(n, m) b = Unsqueeze(a, zero1) c = Unsqueeze(m, zero1) y = Concat<axis = -1>(b, c)",
        "a = Mul(s, two) y = Div(a, two)",
        "y = Neg(s)",
        "y = Abs(s)",
        "c = Cast<to = 6>(s) y = Cast<to = 7>(c)",
        "e = Equal(s, minus1) o = ConstantOfShape<value = int64[1] {1}>(three1) y = Where(e, o, s)",
        "o = ConstantOfShape<value = int64[1] {4}>(three1) y = Mul(o, s)",
        "a = Unsqueeze(n, zero1) y = Expand(a, three1)",
        "a = Unsqueeze(n, zero1) y = Tile(a, three1)",
        "e = Add(n, one) y0 = Max(n, e, zero) y = Unsqueeze(y0, zero1)",
        "e = Add(n, one) y0 = Min(n, e) y = Unsqueeze(y0, zero1)",
        "y = ReduceProd<keepdims = 1>(s)",
        "y = ReduceSum<keepdims = 1>(s, zero1)",
        "a = Size(x) y = Unsqueeze(a, zero1)",
        "y = Range(one, seven, two)",
        "a, b = Split(s, lengths) y = Concat<axis = 0>(b, a)",
        "f = Flatten(x) y = Shape(f)",
        "f = Flatten(x) t = Shape(f) c = Cast<to = 6>(t) y = Cast<to = 7>(c)",
        "f = Reshape(x, copy_rest) y = Shape(f)",
        "f = Concat<axis = 2>(x, x) y = Shape(f)",
        "f = Concat<axis = -1>(x, x) t = Transpose(f) y = Shape(t)",
        "f = ConstantOfShape(s) y = Shape(f)",
        "f = Reshape(x, all_but_two) g = ReduceMax<keepdims = 1, axes = [0]>(f) h = Add(g, f) y = Shape(h)",
        "o = ConstantOfShape<value = int64[1] {1}>(three1) e = Expand(x, o) y = Shape(e)",
        "e = Expand(x, s) y = Shape(e)",
        "t = Tile(x, picks3) y = Shape(t)",
    ],
)
def test_follows(body):
    # A Reshape to [0, -1] cannot be run on an empty first axis.
    dims = ((2, 5), (1, 1)) if "copy_rest" in body else ((2, 5), (1, 1), (0, 4), (3, 0))
    check(shape_model(body), dims)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Less(n, zero)", 0),
        ("y = GreaterOrEqual(n, zero)", 1),
        ("a = Add(n, m) y = Less(n, a)", None),  # m can be 0
        ("a = Add(n, one) y = Less(n, a)", 1),
        ("a = Add(n, one) y = Greater(n, a)", 0),
        ("a = Add(n, one) y = LessOrEqual(n, a)", 1),
        ("y = Equal(n, n)", 1),
        ("a = Add(n, one) y = Equal(n, a)", 0),
        ("y = Equal(n, m)", None),
        ("y = Equal(n, zero)", None),
        ("a = Equal(n, n) y = Not(a)", 0),
        ("a = Equal(n, n) b = Less(n, zero) y = And(a, b)", 0),
        ("a = Equal(n, n) b = Less(n, zero) y = Or(a, b)", 1),
        ("y = Cast<to = 9>(two)", 1),
    ],
)
def test_comparisons(body, expected):
    proto = shape_model(body, "bool y")
    sizes = check(proto, known=False)
    values = sizes.values(sizes.graph.outputs[0])
    assert (None if values is None else values.items[0].known) == expected


@pytest.mark.parametrize(
    "body",
    [
        "y = Div(n, two)",  # rounds
        "y = Mod(n, two)",
        "a = Mul(n, m) y = Cast<to = 6>(a)",  # may not fit int32
        "a = Mul(s, s) c = Cast<to = 6>(a) d = Cast<to = 7>(c) y = Gather(d, zero)",
        "y = Where(b, n, m)",
        "f = Cast<to = 1>(n) h = Mul(f, half) y = Cast<to = 7>(h)",
    ],
)
def test_what_cannot_be_followed_is_an_unknown_of_its_own(body):
    kind = "int32 y" if "y = Cast<to = 6>" in body else "int64 y"
    sizes = check(shape_model(f"b = Equal(n, m) {body}", kind), known=False)
    values = sizes.values(sizes.graph.outputs[0])
    assert values is not None and values.items[0].known is None
    assert value(sizes, values.items[0], {"N": 2, "M": 5}) is None


def test_known_numbers_wrap_nowhere():
    """200 does not fit int8: what a Cast makes of it is not followed."""
    proto = shape_model("c = Cast<to = 3>(big) y = Cast<to = 7>(c)")
    sizes = check(proto, known=False)
    assert sizes.values(sizes.graph.outputs[0]).known is None


def test_placeholder_names_are_not_equal_sizes():
    before = model("g (float[A,3,B] x) => (int64[3] y) { y = Shape(x) }")
    for axis in (0, 2):
        before.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "?"
    sizes = Sizes(graph := graph_of(before))
    first, _, last = sizes.values(graph.outputs[0]).items
    assert first != last


def test_sizes_of_an_outer_graph_are_seen_in_a_branch():
    graph = graph_of(
        model(f"""g ({X}, bool b) => (int64[3] y) {{
            s = Shape(x)
            y = If (b) <then_branch = t () => (int64[3] p) {{ p = Add(s, s) }},
                        else_branch = e () => (int64[3] q) {{ q = Identity(s) }}>
        }}""")
    )
    outer = Sizes(graph)
    branch = graph.nodes[-1].attrs["then_branch"]
    doubled = Sizes(branch, outer).values(branch.outputs[0])
    assert [item == size + size for item, size in zip(doubled.items, outer.dims(graph.inputs[0]), strict=True)] == [
        True
    ] * 3


# -- the algebra itself ----------------------------------------------------------------------------------------------

polynomials = st.recursive(
    st.integers(-3, 5).map(Size.of) | st.integers(0, 2).map(Size.unknown),
    lambda inner: st.builds(
        lambda a, b, op: op(a, b), inner, inner, st.sampled_from([Size.__add__, Size.__mul__, Size.__sub__])
    ),
    max_leaves=6,
)


def at(size, point):
    return sum(k * math.prod(point[u] for u in monomial) for monomial, k in size.terms)


@given(polynomials, polynomials, st.lists(st.integers(-4, 4), min_size=3, max_size=3))
@settings(max_examples=60, deadline=None)
def test_polynomials(a, b, point):
    assert at(a + b, point) == at(a, point) + at(b, point)
    assert at(a - b, point) == at(a, point) - at(b, point)
    assert at(a * b, point) == at(a, point) * at(b, point)
    assert a.known is None or a.known == at(a, point)
    assert (a - b == Size.of(0)) == (a == b)
    quotient = a.divided_by(b)
    assert quotient is None or at(quotient, point) * at(b, point) == at(a, point)
    if len(b.terms) == 1:
        assert (a * b).divided_by(b) == a


def test_product_of_nothing_is_one():
    assert product([]).known == 1


# -- random programs -------------------------------------------------------------------------------------------------

UNARY = [
    "Neg({a})",
    "Abs({a})",
    "Identity({a})",
    "Cast<to = 6>({a})",
    "Slice({a}, zero1, one1)",
    "Concat<axis = 0>({a}, one1)",
]
BINARY = [
    "Add({a}, {b})",
    "Sub({a}, {b})",
    "Mul({a}, {b})",
    "Max({a}, {b})",
    "Min({a}, {b})",
    "Concat<axis = 0>({a}, {b})",
]


@st.composite
def programs(draw):
    names, lines = ["s1", "minus1"], []
    for i in range(draw(st.integers(1, 6))):
        template = draw(st.sampled_from(UNARY + BINARY))
        call = template.format(a=draw(st.sampled_from(names)), b=draw(st.sampled_from(names)))
        lines.append(f"t{i}r = {call} t{i}c = Cast<to = 7>(t{i}r) t{i} = Slice(t{i}c, zero1, one1)")
        names.append(f"t{i}")
    return " ".join(lines), names[-1]


@given(programs())
@settings(max_examples=25, deadline=None)
def test_random_programs(program):
    lines, last = program
    check(shape_model(f"s1 = Slice(s, zero1, one1) {lines} y = Identity({last})"), ((2, 5), (0, 1)), known=False)


# -- Reshape targets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "target"),
    [
        (["N", 3, "M"], [0, 3, 0]),
        (["N", "3M"], None),  # [0, -1] fails on an empty batch
        (["3NM"], [-1]),
        ([3, "NM"], [3, -1]),
        ([1, "N", 3, "M"], None),  # N and M are not at their axes
        (["N", None], None),
        ([3, None], [3, -1]),
        ([None, None], None),
        (["N", 1, 3, "M"], None),
        (["N", 3, "M", 1], [0, 3, 0, 1]),
    ],
)
def test_constant_target(wanted, target):
    graph = graph_of(model(f"g ({X}) => (float[N,3,M] y) {{ y = Relu(x) }}"))
    sizes = Sizes(graph)
    n, three, m = sizes.dims(graph.inputs[0])
    table = {"N": n, "M": m, "3M": three * m, "NM": n * m, "3NM": n * three * m, None: None}
    given_sizes = [table[w] if w in table else Size.of(w) for w in wanted]
    assert constant_target(sizes, [n, three, m], given_sizes) == target
