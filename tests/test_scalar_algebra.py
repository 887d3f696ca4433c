"""Polynomials and products read from a graph: against their values, and where reading stops."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.graph import is_constant
from onnxcompress.patterns.cones import replace_cone, upstream, why_not_replace
from onnxcompress.patterns.scalar_algebra import arguments, is_close, is_scaled_later, read_polynomial, read_product
from onnxcompress.testing import graph_of, model, run

F = np.float32
CONSTANTS = {
    "zero": F(0),
    "one": F(1),
    "two": F(2),
    "three": F(3),
    "five": F(5),
    "half": F(0.5),
    "minus_half": F(-0.5),
    "vector": np.ones(4, F),
    "two1": np.full(1, 2, F),
    "two3": np.full((1, 1, 1), 2, F),
}
X = "float[N,4] x, float[N,4] z"


def make(nodes, *, x=X, y="float[N,4] y"):
    text = f"g ({x}) => ({y}) {{ {nodes} }}"
    read = {name for node in onnx.parser.parse_graph(text).node for name in node.input}
    return model(text, **{k: v for k, v in CONSTANTS.items() if k in read})


def graph(nodes, **options):
    return graph_of(make(nodes, **options))


def tensor(of, name):
    known = [*of.inputs, *(t for node in of.nodes for t in [*node.inputs, *node.outputs])]
    return next(t for t in known if t.name == name)


def polynomial(nodes, *names, of="y", **options):
    g = graph(nodes, **options)
    found = read_polynomial(g, tensor(g, of), [tensor(g, name) for name in names])
    return None if found is None else dict(found.coefficients)


@pytest.mark.parametrize(
    ("nodes", "wanted"),
    [
        ("y = Mul(x, two)", {(1,): 2}),
        ("y = Sub(two, x)", {(0,): 2, (1,): -1}),
        ("a = Neg(x) y = Div(a, two1)", {(1,): -0.5}),
        ("a = Add(x, one) y = Mul(a, a)", {(0,): 1, (1,): 2, (2,): 1}),
        ("a = Add(x, one) y = Pow(a, three)", {(0,): 1, (1,): 3, (2,): 3, (3,): 1}),
        ("y = Sub(x, x)", {}),
        ("y = Identity(x)", None),
        ("y = Mul(x, z)", None),
        ("y = Div(two, x)", None),
        ("y = Div(x, zero)", None),
        ("y = Mul(x, vector)", None),
        ("y = Pow(x, five)", None),
        ("y = Pow(x, half)", None),
        ("a = Pow(x, three) y = Mul(a, a)", None),
    ],
)
def test_polynomials(nodes, wanted):
    assert polynomial(nodes, "x") == wanted


def test_two_variables():
    nodes = "a = Mul(x, z) b = Add(a, x) y = Mul(half, b)"
    assert polynomial(nodes, "x", "z") == {(1, 1): 0.5, (1, 0): 0.5}
    g = graph(nodes)
    found = read_polynomial(g, tensor(g, "y"), [tensor(g, "x"), tensor(g, "z")])
    assert found is not None and {node.op for node in found.nodes} == {"Mul", "Add"} and len(found.nodes) == 3
    assert sorted(found.written("x", "z").split(" + ")) == ["0.5 x", "0.5 x z"]
    assert polynomial(nodes, "x", "a") == {(0, 1): 0.5, (1, 0): 0.5}  # reading stops at a variable


def test_a_constant_may_not_change_the_shape():
    assert polynomial("y = Mul(x, two3)", "x", y="float[1,N,4] y") is None
    assert polynomial("u = Reshape(x, s) y = Mul(u, two1)", "u", x=f"{X}, int64[K] s") is None
    assert polynomial("u = Reshape(x, s) y = Mul(u, two)", "u", x=f"{X}, int64[K] s") == {(1,): 2}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_polynomial_has_the_values_of_the_graph(data):
    names, nodes, scalars = ["x", "z"], [], ["half", "two", "three"]
    for i in range(data.draw(st.integers(1, 5))):
        op = data.draw(st.sampled_from(["Add", "Sub", "Mul", "Neg", "Div"]))
        a = data.draw(st.sampled_from(names))
        b = data.draw(st.sampled_from(scalars if op == "Div" else names + scalars))
        pair = [a] if op == "Neg" else [a, b] if op == "Div" or data.draw(st.booleans()) else [b, a]
        nodes.append(f"n{i} = {op}({', '.join(pair)})")
        names.append(f"n{i}")
    text = " ".join(nodes) + f" u = Add(x, z) y = Mul({names[-1]}, one)"
    g = graph(text)
    found = read_polynomial(g, tensor(g, "y"), [tensor(g, "x"), tensor(g, "z")])
    if found is None:
        return  # the degree became too large
    feeds = {k: np.random.default_rng(0).normal(size=(2, 4)).astype(F) for k in ("x", "z")}
    (value,) = run(make(text), feeds)
    wide = {k: v.astype(np.float64) for k, v in feeds.items()}
    total = sum(c * wide["x"] ** p * wide["z"] ** q for (p, q), c in found.coefficients.items()) + np.zeros((2, 4))
    np.testing.assert_allclose(value, total, rtol=1e-4, atol=1e-4 * max(1, np.abs(value).max()))


def product(nodes, *leaves, **options):
    g = graph(nodes, **options)
    found = read_product(g, tensor(g, "y"), [tensor(g, name) for name in leaves])
    if found is None:
        return None
    return found.coefficient, {t.name: p for t, p in found.powers.items() if not is_constant(t)}


@pytest.mark.parametrize(
    ("nodes", "wanted"),
    [
        ("y = Mul(x, z)", (1, {"x": 1, "z": 1})),
        ("a = Mul(x, two) b = Neg(z) y = Div(a, b)", (-2, {"x": 1, "z": -1})),
        ("a = Sqrt(z) b = Reciprocal(a) y = Mul(x, b)", (1, {"x": 1, "z": -0.5})),
        ("b = Pow(z, minus_half) y = Div(x, b)", (1, {"x": 1, "z": 0.5})),
        ("a = Div(two, z) y = Mul(x, a)", (2, {"x": 1, "z": -1})),
        ("a = Mul(z, vector) y = Div(x, a)", (1, {"x": 1, "z": -1})),
        ("a = Mul(x, z) y = Mul(a, x)", (1, {"x": 2, "z": 1})),
        ("y = Div(x, x)", None),  # not 1 at 0
        ("a = Sqrt(x) y = Mul(a, a)", None),  # not x below 0
        ("a = Mul(x, z) y = Sqrt(a)", None),
        ("y = Mul(x, zero)", None),
        ("y = Div(x, zero)", None),
        ("y = Pow(x, three)", None),
        ("y = Exp(x)", None),
    ],
)
def test_products(nodes, wanted):
    assert product(nodes, "x", "z") == wanted


def test_close_is_a_matter_of_the_type():
    exact = float(np.sqrt(0.5))
    assert is_close(float(F(exact)), exact, np.dtype(F))
    assert not is_close(0.7071, exact, np.dtype(F))
    assert is_close(0.7071, exact, np.dtype(np.float16))
    assert not is_close(0.70, exact, np.dtype(np.float16))
    assert not is_close(float(F(exact)), exact, np.dtype(np.float64))


def test_arguments_come_nearest_first():
    g = graph("a = Add(x, one) b = Mul(a, z) y = Exp(b)")
    assert [t.name for t in arguments(g, tensor(g, "b"))] == ["b", "a", "z", "x"]
    assert [t.name for t in upstream(g, tensor(g, "y"), ("Exp",), 5)] == ["y", "b"]
    assert [t.name for t in upstream(g, tensor(g, "b"), ("Mul", "Add"), 1)] == ["b", "a", "z"]


def test_scaled_later():
    g = graph("a = Exp(x) b = Exp(a) c = Mul(b, z) d = Mul(half, c) y = Mul(d, vector)")
    assert [name for name in "abcd" if is_scaled_later(tensor(g, name))] == ["c"]


def test_a_cone_that_others_look_into():
    g = graph("a = Exp(x) b = Neg(a) y = Abs(b)")
    nodes = list(g.nodes)
    assert why_not_replace(g, nodes, tensor(g, "y")) is None
    assert why_not_replace(g, nodes[:2], tensor(g, "b")) is None
    assert why_not_replace(g, nodes[:1] + nodes[2:], tensor(g, "y")) == "'a', which would go, is read elsewhere"
    g = graph("a = Exp(x) y = Abs(a)", y="float[N,4] y, float[N,4] a")
    assert why_not_replace(g, list(g.nodes), tensor(g, "y")) == "'a', which would go, is a model output"


def test_a_cone_that_a_branch_looks_into():
    branches = (
        "then_branch = t () => (float[N,4] r) { r = Neg(a) }, else_branch = f () => (float[N,4] q) { q = Neg(x) }"
    )
    g = graph(f"a = Exp(x) y = Abs(a) w = If(c) < {branches} >", x=f"{X}, bool c", y="float[N,4] y, float[N,4] w")
    assert "read elsewhere" in str(why_not_replace(g, g.nodes[:2], tensor(g, "y")))


def test_replaces_a_cone():
    g = graph("a = Exp(x) b = Neg(a) y = Abs(b)")
    output = tensor(g, "y")
    made = replace_cone(g, list(g.nodes), output, "Relu", [tensor(g, "x")])
    assert list(g.nodes) == [made] and made.outputs == [output] and output.inputs == [made]
    with pytest.raises(ValueError, match="no node of this graph makes 'x'"):
        replace_cone(g, [made], tensor(g, "x"), "Relu", [])
