"""Computed shapes: what becomes constant holds for every size, and what does not stays."""

import numpy as np
import pytest
from onnx import numpy_helper

from onnxcompress.passes.eliminate_dead_code import EliminateDeadCode
from onnxcompress.passes.simplify_shape_computation import SimplifyShapeComputation
from onnxcompress.testing import apply, assert_equivalent, model, ops, run

C = """<int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64 four = {4}, int64[1] zero1 = {0}, int64[1] one1 = {1},
    int64[1] two1 = {2}, int64[1] three1 = {3}, int64[1] four1 = {4}, int64[1] eight1 = {8}, int64[1] minus1 = {-1},
    int64[1] max = {9223372036854775807}, int64[2] first2 = {0, 1}>"""
DIMS = "s = Shape(x) n = Gather(s, zero) m = Gather(s, two) n1 = Unsqueeze(n, zero1) m1 = Unsqueeze(m, zero1)"


def build(x, body, out="float[...] y", dims=3, **options):
    shape = ",".join("abcdef"[:dims])
    return model(
        f"g (float[{x}] x, float[N,3,8] w) => (float[{shape}] y) {C} {{ {DIMS} {body} y = Neg(v) }}", **options
    )


def target(proto):
    """The second input of the only Reshape, when it is an initializer."""
    (node,) = [n for n in proto.graph.node if n.op_type == "Reshape"]
    found = [numpy_helper.to_array(t).tolist() for t in proto.graph.initializer if t.name == node.input[1]]
    return found[0] if found else None


@pytest.mark.parametrize(
    ("x", "shape", "dims", "expected"),
    [
        ("N,3,8", "Concat<axis = 0>(n1, four1, minus1)", 3, [0, 4, 6]),  # what -1 takes is known
        ("N,3,M", "Concat<axis = 0>(n1, minus1)", 2, [0, -1]),
        ("N,3,M", "Concat<axis = 0>(n1, m3)", 2, None),  # an empty batch has no -1, where m3 is fine
        ("N,3,8", "Concat<axis = 0>(n1, four1, n1)", 3, None),
        ("N,3,8", "Concat<axis = 0>(n1, two1, three1, four1)", 4, [0, 2, 3, 4]),
        ("N,3,M", "Concat<axis = 0>(n1, three1, m1)", 3, [0, 3, 0]),
        ("N,3,M", "Concat<axis = 0>(n1, one1, three1, m1)", 4, None),  # M is not at its axis
        ("N,3,8", "Concat<axis = 0>(minus1, two1, four1)", 3, [-1, 2, 4]),
        ("2,3,8", "Concat<axis = 0>(n1, minus1)", 2, [2, 24]),
        ("N,3,8", "Concat<axis = 0>(three, eight1)", 2, [-1, 8]),
        ("N,3,M", "Unsqueeze(all, zero1)", 1, [-1]),
        ("N,3,8", "Concat<axis = 0>(zero1, two1, minus1)", 3, "constant"),
        ("M,N,8", "Concat<axis = 0>(n1, one1, minus1)", 3, [0, 1, -1]),
    ],
)
def test_reshape(x, shape, dims, expected):
    extra = "t3 = Mul(n, four) t2 = Sub(t3, n) three = Unsqueeze(t2, zero1) all = Size(x) m3 = Mul(m1, three1)"
    body = f"{extra} t = {shape} v = Reshape(x, t)"
    before = build(x, body, dims=dims)
    after, result = apply(SimplifyShapeComputation(), before)
    if expected != "constant":
        assert target(after) == expected
        assert expected is not None or any("no constant target" in miss.reason for miss in result.misses)
    for n, m in ((2, 5), (4, 1)):
        if shape.count("n1") < 2:
            assert_equivalent(before, after, sizes={"N": n, "M": m})


def test_empty_axes():
    """[0, 2, 12] from [N, 3, 8] holds for N = 0 as well; -1 would not."""
    body = "t = Concat<axis = 0>(n1, two1, four1, three1) v = Reshape(x, t)"
    before = build("N,3,8", body, dims=4)
    after, _ = apply(SimplifyShapeComputation(), before)
    assert target(after) == [0, 2, 4, 3]
    feeds = {"x": np.zeros((0, 3, 8), np.float32), "w": np.zeros((0, 3, 8), np.float32)}
    assert run(before, feeds)[0].shape == run(after, feeds)[0].shape == (0, 2, 4, 3)


def test_allowzero_is_dropped_with_the_computed_target():
    body = "t = Concat<axis = 0>(n1, two1, four1, three1) v = Reshape<allowzero = 1>(x, t)"
    before = build("N,3,8", body, dims=4)
    after, _ = apply(SimplifyShapeComputation(), before)
    assert target(after) == [0, 2, 4, 3]
    assert_equivalent(before, after)
    feeds = {"x": np.zeros((0, 3, 8), np.float32), "w": np.zeros((0, 3, 8), np.float32)}
    assert run(after, feeds)[0].shape == (0, 2, 4, 3)


def test_size_of_another_tensor():
    """w has the same N by name; the model's own inference says so, and no more."""
    body = "sw = Shape(w) nw = Slice(sw, zero1, one1) t = Concat<axis = 0>(nw, two1, four1, three1) v = Reshape(x, t)"
    after, _ = apply(SimplifyShapeComputation(), build("N,3,8", body, dims=4))
    assert target(after) == [0, 2, 4, 3]
    after, _ = apply(SimplifyShapeComputation(), build("K,3,8", body, dims=4))
    assert target(after) is None or target(after)[0] == -1


@pytest.mark.parametrize("name", ["?", "None", "-1", ""])
def test_placeholder_names_prove_nothing(name):
    """[M, N] is not [N, M] because an exporter calls both "?"."""
    body = (
        "s = Shape(x) n = Slice(s, zero1, one1) m = Slice(s, one1, two1) t = Concat<axis = 0>(m, n) v = Reshape(x, t)"
    )
    before = model(f"g (float[N,M] x) => (float[a,b] y) {C} {{ {body} y = Neg(v) }}")
    for dim in before.graph.input[0].type.tensor_type.shape.dim:
        dim.dim_param = name
    after, _ = apply(SimplifyShapeComputation(), before)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert run(after, {"x": x})[0].shape == (3, 2)


@pytest.mark.parametrize(
    ("x", "body", "known"),
    [
        ("N,3,8", "c = Gather(s, one) f = Cast<to = 1>(c) v = Mul(x, f)", {"c": 3}),
        ("N,3,8", "c = Slice(s, one1, max) p = ReduceProd(c) f = Cast<to = 1>(p) v = Mul(x, f)", {"c": [3, 8]}),
        ("N,3,8", "k = Add(s, s) c = Slice(k, one1, two1) f = Cast<to = 1>(c) v = Mul(x, f)", {"c": [6]}),
        ("N,3,8", "c = Equal(n, n) v = Where(c, x, w)", {"c": True}),
        ("N,3,8", "c = Less(n, zero) v = Where(c, w, x)", {"c": False}),
        ("N,3,8", "e = Mul(n, two) c = Sub(e, n) d = Sub(c, n) f = Cast<to = 1>(d) v = Mul(x, f)", {"d": 0}),
        ("2,3,8", "f = Cast<to = 1>(n) v = Mul(x, f)", {"s": [2, 3, 8]}),
        ("N,3,8", "c = Div(n, two) f = Cast<to = 1>(c) v = Mul(x, f)", {}),
        ("N,3,M", "c = Equal(n, m) v = Where(c, x, x)", {}),
    ],
)
def test_known_values(x, body, known):
    before = build(x, body)
    after, _ = apply(SimplifyShapeComputation(), before)
    made = {t.name: numpy_helper.to_array(t).tolist() for t in after.graph.initializer}
    originals = {t.name for t in before.graph.initializer} | {"m"}  # m is 8 in all but the last
    assert {name: value for name, value in made.items() if name not in originals} == known
    assert_equivalent(before, after, sizes={"N": 2, "M": 3})


def test_equal_values_are_computed_once():
    """Exporters ask for the shape again after every elementwise operator."""
    body = """a = Relu(x) sa = Shape(a) na = Gather(sa, zero) na1 = Unsqueeze(na, zero1)
        t = Concat<axis = 0>(na1, one1, one1) b = Expand(w, t)
        tb = Concat<axis = 0>(n1, one1, one1) c = Expand(b, tb) v = Add(a, c)"""
    before = build("N,3,8", body)
    after, _ = apply(SimplifyShapeComputation(), before)
    cleaned, _ = apply(EliminateDeadCode(), after)
    assert [ops(cleaned).count(op) for op in ("Shape", "Gather", "Unsqueeze", "Concat")] == [1, 0, 0, 1]
    for n in (0, 1, 3):
        assert_equivalent(before, after, sizes={"N": n})


@pytest.mark.parametrize(("end", "fits"), [("m1", True), ("more", True), ("n1", False), ("less", False)])
def test_slice_to_the_end(end, fits):
    body = f"more = Add(m1, one1) less = Sub(m1, one1) v = Slice(x, one1, {end}, two1)"
    before = build("N,3,M", body)
    after, _ = apply(SimplifyShapeComputation(), before)
    node = next(n for n in after.graph.node if n.op_type == "Slice" and n.output[0] == "v")
    assert (node.input[2] in {t.name for t in after.graph.initializer}) == fits
    for m in (0, 1, 5):
        assert_equivalent(before, after, sizes={"N": 3, "M": m})


@pytest.mark.parametrize(
    ("body", "left", "left_before_15"),
    [
        ("v = Unsqueeze(n, zero1)", ["Shape"], ["Shape", "Slice"]),
        ("a = Unsqueeze(m, zero1) v = Concat<axis = 0>(n1, three1, a)", ["Shape"], ["Shape"]),
        ("b = Gather(s, one) v = Concat<axis = 0>(three1, m1)", ["Shape"], ["Shape", "Slice"]),
        ("v = Slice(s, one1, max)", ["Shape"], ["Shape", "Slice"]),
        (
            "q = Shape(w) v = Concat<axis = 0>(n1, q)",
            ["Shape", "Shape", "Concat"],
            ["Shape", "Slice", "Shape", "Concat"],
        ),
    ],
)
@pytest.mark.parametrize("opset", [13, 17])
def test_neighbouring_sizes(body, left, left_before_15, opset):
    text = f"g (float[N,3,M] x, float[K,3,8] w) => (float[a] y) {C} {{ {DIMS} {body} f = Cast<to = 1>(v) y = Neg(f) }}"
    before = model(text, opset=opset)
    after, _ = apply(SimplifyShapeComputation(), before)
    cleaned, _ = apply(EliminateDeadCode(), after)
    assert ops(cleaned)[:-2] == (left if opset >= 15 else left_before_15)
    for n in (0, 3):
        assert_equivalent(before, after, sizes={"N": n, "M": 5, "K": 4})


def test_model_outputs_are_computed_as_before():
    before = model(f"g (float[2,N] x) => (int64[2] y, int64 z) {C} {{ y = Shape(x) z = Gather(y, zero) }}")
    after, result = apply(SimplifyShapeComputation(), before)
    assert result.rewrites == 0 and after == before


def test_constants_are_left_to_folding():
    before = model(f"g (float[N] x) => (int64[2] y) {C} {{ a = Concat<axis = 0>(one1, two1) y = Add(a, a) }}")
    after, result = apply(SimplifyShapeComputation(), before)
    assert result.rewrites == 0 and after == before


def test_int32_arithmetic():
    """The way of TensorFlow: Cast to int32, StridedSlice, Pack, Cast back."""
    body = """s32 = Cast<to = 6>(s) b = Slice(s32, zero1, one1)
        k = Cast<to = 6>(four1) q = Cast<to = 6>(two1) r = Cast<to = 6>(three1)
        t32 = Concat<axis = 0>(b, q, k, r) t = Cast<to = 7>(t32) v = Reshape(x, t)"""
    before = build("N,3,8", body, dims=4)
    after, _ = apply(SimplifyShapeComputation(), before)
    assert target(after) == [0, 2, 4, 3]
    assert_equivalent(before, after)


def test_in_a_branch():
    """What the outer graph computes is followed inside."""
    branches = """then_branch = p () => (float[d,e] u) { t = Concat<axis = 0>(n1, minus24) u = Reshape(x, t) },
        else_branch = q () => (float[d,e] v) { v = Flatten(x) }"""
    text = f"g (float[N,3,8] x, bool c) => (float[a,b] y) {C} {{ {DIMS} y = If (c) <{branches}> }}"
    before = model(text.replace("<int64 zero", "<int64[1] minus24 = {24}, int64 zero"))
    after, _ = apply(SimplifyShapeComputation(), before)
    then = next(a.g for n in after.graph.node for a in n.attribute if a.name == "then_branch")
    (reshape,) = [n for n in then.node if n.op_type == "Reshape"]
    (constant,) = [t for t in then.initializer if t.name == reshape.input[1]]
    assert numpy_helper.to_array(constant).tolist() == [0, 24]
    x = np.ones((2, 3, 8), np.float32)
    assert_equivalent(before, after, feeds=[{"x": x, "c": np.array(c)} for c in (True, False)])


def test_loop_state_that_changes_its_size_is_not_followed():
    """The body says [N], and each turn doubles the state."""
    before = model(f"""g (float[N] x, int64 k, bool c) => (float[M] y) {C} {{
        y = Loop(k, c, x) <body = b (int64 i, bool ci, float[N] state) => (bool co, float[N] next) {{
            co = Identity(ci)
            s = Shape(state)
            r = Reshape(state, s)
            next = Concat<axis = 0>(r, r)
        }}>
    }}""")
    after, _ = apply(SimplifyShapeComputation(), before)
    feeds = [{"x": np.array([1, 2], np.float32), "k": np.array(3), "c": np.array(True)}]
    assert_equivalent(before, after, feeds=feeds)
