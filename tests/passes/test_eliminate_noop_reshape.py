"""Views that view nothing else: static, symbolic and computed shapes, and targets that only look the same."""

import pytest

from onnxcompress.passes.eliminate_noop_reshape import EliminateNoopReshape
from onnxcompress.testing import apply, assert_equivalent, model, ops

C = """<int64[3] copy = {0, 0, 0}, int64[3] infer_last = {0, 3, -1}, int64[3] infer_first = {-1, 3, 8},
    int64[3] same = {2, 3, 8}, int64[3] other = {3, 2, 8}, int64[2] flat = {0, -1}, int64[3] two_left = {-1, 3, 4},
    int64[1] axis = {1}, int64[0] none = {}, int64[3] swapped = {-1, 3, 0}>"""


def chain(x, call, kind="float[a,b,c] y"):
    """A node before and after, so that no output name holds the view."""
    return f"g ({x}) => ({kind}) {C} {{ a = Relu(x) b = {call} y = Neg(b) }}"


@pytest.mark.parametrize(
    ("x", "call", "opset"),
    [
        ("float[2,3,8] x", "Reshape(a, same)", 17),
        ("float[N,3,M] x", "Reshape(a, copy)", 17),
        ("float[N,3,M] x", "Reshape(a, infer_last)", 17),
        ("float[N,3,8] x", "Reshape(a, infer_first)", 17),
        ("float[N,3,8] x", "Reshape(a, infer_first)", 7),
        ("float[N,3,8] x", "Reshape<allowzero = 1>(a, infer_first)", 17),
        ("float[N,M] x", "Flatten(a)", 17),
        ("float[N,M] x", "Flatten<axis = -1>(a)", 13),
        ("float[2,3,8] x", "Squeeze(a)", 17),
        ("float[N,M] x", "Unsqueeze(a, none)", 17),
    ],
)
def test_drops(x, call, opset):
    before = model(chain(x, call, f"float[{','.join('abc'[: x.count(',') + 1])}] y"), opset=opset)
    after, result = apply(EliminateNoopReshape(), before)
    assert result.rewrites == 1 and ops(after) == ["Relu", "Neg"]
    for n in (1, 2, 5):
        assert_equivalent(before, after, sizes={"N": n, "M": 4})


@pytest.mark.parametrize(
    "target",
    [
        "Shape(a)",
        "Shape(x)",
        "Concat<axis = 0>(n, three, minus)",
        "Concat<axis = 0>(minus, three, m)",
        "Concat<axis = 0>(n, zero, m)",
    ],
)
def test_computed_target(target):
    body = (
        f"""a = Relu(x) s = Shape(a) n = Gather(s, zero) m = Gather(s, two) t = {target} b = Reshape(a, t) y = Neg(b)"""
    )
    constants = "<int64[1] zero = {0}, int64[1] two = {2}, int64[1] three = {3}, int64[1] minus = {-1}>"
    before = model(f"g (float[N,3,M] x) => (float[N,3,M] y) {constants} {{ {body} }}")
    after, result = apply(EliminateNoopReshape(), before)
    assert result.rewrites == 1 and "Reshape" not in ops(after)
    for n in (1, 3):
        assert_equivalent(before, after, sizes={"N": n, "M": 4})
    if "minus" not in target:
        assert_equivalent(before, after, sizes={"N": 0, "M": 4})


@pytest.mark.parametrize(
    ("x", "call"),
    [
        ("float[2,3,8] x", "Reshape(a, other)"),
        ("float[N,3,8] x", "Reshape(a, two_left)"),  # [2N, 3, 4]
        ("float[N,3,8] x", "Reshape(a, same)"),  # says that N is 2, and fails otherwise
        ("float[N,M] x", "Flatten<axis = 0>(a)"),
        ("float[N,3,8] x", "Flatten(a)"),
        ("float[N,3,8] x", "Reshape(a, flat)"),
        ("float[N,1,8] x", "Squeeze(a, axis)"),
        ("float[N,8] x", "Unsqueeze(a, axis)"),
        ("float[N,M,K] x", "Reshape(a, swapped)"),  # -1 and 0, but 3 is not M
    ],
)
def test_another_shape_is_left_alone(x, call):
    before = model(chain(x, call))
    after, result = apply(EliminateNoopReshape(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert_equivalent(before, after, sizes={"N": 2, "M": 3, "K": 4})


def test_placeholder_dimensions_are_not_taken_for_equal():
    """Exporters name every unknown axis "?": [?, ?] to its own transposed sizes is another shape."""
    before = model("""g (float[A,B] x) => (float[a,b] y) <int64[1] zero = {0}, int64[1] one = {1}> {
        s = Shape(x) n = Gather(s, zero) m = Gather(s, one) t = Concat<axis = 0>(m, n) b = Reshape(x, t) y = Neg(b)
    }""")
    for dim in before.graph.input[0].type.tensor_type.shape.dim:
        dim.dim_param = "?"
    after, result = apply(EliminateNoopReshape(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)


def test_two_inputs_of_one_shape_are_two_tensors():
    before = model("g (float[N,3] x, float[N,3] z) => (float[N,3] y) { s = Shape(z) b = Reshape(x, s) y = Neg(b) }")
    after, result = apply(EliminateNoopReshape(), before)
    assert result.rewrites == 1
    assert_equivalent(before, after, sizes={"N": 4})


@pytest.mark.parametrize("outputs", ["float[N,3] b", "float[N,3] a, float[N,3] b"])
def test_output_names_are_kept(outputs):
    before = model(f"g (float[N,3] x) => ({outputs}) {{ a = Relu(x) s = Shape(a) b = Reshape(a, s) }}")
    after, result = apply(EliminateNoopReshape(), before)
    assert result.rewrites == (1 if "a," not in outputs else 0)
    assert len(result.misses) == 1 - result.rewrites
    assert_equivalent(before, after)
