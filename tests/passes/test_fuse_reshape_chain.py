"""Chains of Reshape, Flatten, Squeeze, Unsqueeze."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.passes.fuse_reshape_chain import FuseReshapeChain
from onnxcompress.testing import apply, assert_equivalent, model, ops, run

C = """<int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] last = {-1}, int64[1] minus2 = {-2},
    int64[2] zero_two = {0, 2}, int64[2] one_last = {1, -1}, int64[1] flat = {-1}, int64[2] rows = {-1, 24},
    int64[3] copy = {0, 0, 24}, int64[4] four = {0, 3, 2, -1}, int64[2] copy_rest = {0, -1}, int64[3] cut = {-1, 3, 8},
    int64[4] quarters = {0, 4, 6, 1}, int64[3] same = {0, 0, 8}, int64[3] halves = {0, 6, 4}>"""


def check(x, body, left, *, opset=17, y="float[...] y", dims=3, sizes=({"N": 1}, {"N": 4})):
    shape = ",".join("abcdef"[:dims])
    before = model(f"g (float[{x}] x) => (float[{shape}] y) {C} {{ r = Relu(x) {body} y = Neg(v) }}", opset=opset)
    after, result = apply(FuseReshapeChain(), before)
    assert ops(after) == ["Relu", *left, "Neg"]
    for size in sizes:
        assert_equivalent(before, after, sizes=size)
    return result


@pytest.mark.parametrize(
    ("x", "body", "left", "dims"),
    [
        ("N,3,8", "a = Reshape(r, flat) v = Reshape(a, cut)", [], 3),
        ("N,3,8", "a = Reshape(r, flat) v = Reshape(a, rows)", ["Reshape"], 2),
        ("N,3,8", "a = Reshape(r, rows) v = Reshape(a, quarters)", ["Reshape"], 4),
        ("N,3,8", "a = Flatten(r) v = Flatten(a)", ["Reshape"], 2),
        ("N,3,8", "a = Unsqueeze(r, one) v = Squeeze(a, one)", [], 3),
        ("N,3,8", "a = Unsqueeze(r, last) v = Squeeze(a, last)", [], 3),
        ("N,3,8", "a = Unsqueeze(r, zero) v = Unsqueeze(a, zero)", ["Unsqueeze"], 5),
        ("N,3,8", "a = Unsqueeze(r, one_last) v = Unsqueeze(a, zero_two)", ["Unsqueeze"], 7),
        ("N,1,8,1", "a = Squeeze(r, last) v = Squeeze(a, one)", ["Squeeze"], 2),
        ("N,1,1,8", "a = Squeeze(r, one) v = Squeeze(a, one)", ["Squeeze"], 2),
        ("N,1,8", "a = Squeeze(r, one) v = Unsqueeze(a, one)", [], 3),
        ("N,K,8", "a = Squeeze(r, one) v = Unsqueeze(a, one)", [], 3),  # K is 1, or the model fails
        ("N,1,8", "a = Squeeze(r, one) v = Unsqueeze(a, last)", ["Reshape"], 3),
        ("N,3,8", "a = Reshape(r, copy_rest) v = Reshape(a, halves)", ["Reshape"], 3),
        ("N,3,8", "a = Unsqueeze(r, last) v = Flatten(a)", ["Reshape"], 2),
        ("N,M", "a = Unsqueeze(r, one) b = Unsqueeze(a, two) v = Reshape(b, flat)", ["Reshape"], 1),
    ],
)
def test_fuses(x, body, left, dims):
    sizes = [{"N": n, "M": 5, "K": 1} for n in (1, 4)]
    result = check(x, body, left, dims=dims, sizes=sizes)
    assert result.rewrites == body.count("=") - 1


def test_axes_are_attributes_before_opset_13():
    check("N,3", "a = Unsqueeze<axes = [0]>(r) v = Unsqueeze<axes = [0, 2]>(a)", ["Unsqueeze"], opset=11, dims=5)
    check("1,N,1", "a = Squeeze<axes = [0]>(r) v = Squeeze<axes = [1]>(a)", ["Squeeze"], opset=11, dims=1)


def test_target_that_is_computed_but_copies_nothing():
    """The target is proven to hold no 0 (which would copy an axis), whatever N is."""
    target = "s = Shape(x) n = Slice(s, zero, one) m = Add(n, one) k = Sub(m, n) t = Concat<axis = 0>(k, flat)"
    result = check(
        "N,3,8",
        f"{target} a = Flatten(r) v = Reshape(a, t)",
        ["Shape", "Slice", "Add", "Sub", "Concat", "Reshape"],
        dims=2,
    )
    assert result.rewrites == 1


def test_first_that_is_read_elsewhere_stays():
    body = "f = Reshape(x, flat) y = Reshape(f, rows) z = Neg(f)"
    before = model(f"g (float[N,3,8] x) => (float[a,b] y, float[a] z) {C} {{ {body} }}")
    after, result = apply(FuseReshapeChain(), before)
    assert result.rewrites == 1 and sorted(ops(after)) == ["Neg", "Reshape", "Reshape"]
    assert_equivalent(before, after)


def test_empty_batch_is_not_broken():
    """[0, -1] would fail where N is 0; [0, 24] does not."""
    before = model(f"g (float[N,3,8] x) => (float[a,b] y) {C} {{ a = Unsqueeze(x, last) y = Flatten(a) }}")
    after, result = apply(FuseReshapeChain(), before)
    assert result.rewrites == 1 and ops(after) == ["Reshape"]
    assert run(after, {"x": np.zeros((0, 3, 8), np.float32)})[0].shape == (0, 24)


@pytest.mark.parametrize(
    ("x", "body", "dims"),
    [
        ("N,M,K", "a = Reshape(r, flat2) v = Flatten(a)", 2),
        ("N,M,K", "a = Transpose(r) b = Unsqueeze(a, one) v = Flatten(b)", 2),
    ],
)
def test_near_miss_is_left_alone(x, body, dims):
    constants = C.replace("<int64[1] zero", "<int64[3] flat2 = {0, -1, 2}, int64[1] zero")
    shape = ",".join("abcdef"[:dims])
    before = model(f"g (float[{x}] x) => (float[{shape}] y) {constants} {{ r = Relu(x) {body} y = Neg(v) }}")
    after, result = apply(FuseReshapeChain(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and ops(after) == ops(before)
    assert_equivalent(before, after, sizes={"N": 3, "M": 1, "K": 4})


def test_copied_size_of_the_shape_between():
    """0 copies from [24, N, 1], not from [N, 3, 8]."""
    constants = C.replace("<int64[1] zero", "<int64[3] z = {0, 2, -1}, int64[1] zero")
    body = "f = Flatten(x) t = Transpose(f) u = Unsqueeze(t, last) y = Reshape(u, z)"
    before = model(f"g (float[N,3,8] x) => (float[a,b,c] y) {constants} {{ {body} }}")
    after, _ = apply(FuseReshapeChain(), before)
    for n in (2, 4):
        assert_equivalent(before, after, sizes={"N": n})


# -- random chains ---------------------------------------------------------------------------------------------------


@st.composite
def chains(draw):
    """(calls, constants): views of a [N, 2, 3, 4] tensor, with negative axes, zeros and -1."""
    shape, calls, constants = ["N", 2, 3, 4], [], {}
    for i in range(draw(st.integers(2, 5))):
        kind = draw(st.sampled_from(["Reshape", "Unsqueeze", "Squeeze", "Flatten"]))
        count = len(shape)
        if kind == "Unsqueeze":
            axis = draw(st.integers(0, count))
            value = [axis if draw(st.booleans()) else axis - count - 1]
            shape = [*shape[:axis], 1, *shape[axis:]]
        elif kind == "Squeeze" and 1 in shape:
            axis = shape.index(1)
            value = [axis if draw(st.booleans()) else axis - count]
            shape = [*shape[:axis], *shape[axis + 1 :]]
        elif kind == "Flatten":
            axis = draw(st.integers(0, count))
            shape = [product(shape[:axis]), product(shape[axis:])]
            calls.append((f"Flatten<axis = {axis}>({{x}})", "float"))
            continue
        else:
            kind, keep = "Reshape", draw(st.integers(0, count))
            rest = product(shape[keep:])
            split = draw(st.sampled_from([1, 2, 3, 4]))
            if isinstance(rest, int) and rest % split == 0:
                tail, value = [split, rest // split], [split, draw(st.sampled_from([-1, rest // split]))]
            else:
                tail, value = [rest], [-1]
            value = [dim if dim != "N" and draw(st.booleans()) else 0 for dim in shape[:keep]] + value
            if any(isinstance(dim, str) and dim != "N" for dim in shape[:keep]):
                value = [0] * keep + value[keep:]
            shape = shape[:keep] + tail
        constants[f"c{i}"] = np.array(value, np.int64)
        calls.append((f"{kind}({{x}}, c{i})", "float"))
    return [call for call, _ in calls], constants, len(shape)


def product(dims):
    """N stands for itself; with a number it is a size that is only known to contain N."""
    number = int(np.prod([dim for dim in dims if isinstance(dim, int)], dtype=np.int64))
    names = [dim for dim in dims if isinstance(dim, str)]
    return number if not names else "".join(names) if number == 1 else f"{number}{''.join(names)}"


@given(chains())
@settings(max_examples=40, deadline=None)
def test_random_chains(chain):
    calls, constants, dims = chain
    names = ["x", *[f"t{i}" for i in range(len(calls))]]
    body = " ".join(f"t{i} = {call.format(x=names[i])}" for i, call in enumerate(calls))
    shape = ",".join("abcdefghijkl"[:dims])
    before = model(f"g (float[N,2,3,4] x) => (float[{shape}] y) {{ {body} y = Neg(t{len(calls) - 1}) }}", **constants)
    after, result = apply(FuseReshapeChain(), before)
    assert len(ops(after)) <= len(ops(before)) - result.rewrites
    for n in (1, 2, 5):
        assert_equivalent(before, after, sizes={"N": n})


def test_a_computed_size_that_may_be_zero_copies_another_axis():
    """[-1, M, 4] for a tensor [1, N, M, 4]: at M = 0 the 0 stands for N."""
    text = """g (float[N,M,4] x) => (float[a,b,c] y) {
      t = Unsqueeze(x, first) s = Shape(t) m = Gather(s, two) target = Concat<axis=0>(minus, m, four)
      y = Reshape(t, target) }"""
    weights = {"first": np.array([0]), "two": np.array([2]), "minus": np.array([-1]), "four": np.array([4])}
    before = model(text, **weights)
    after, _ = apply(FuseReshapeChain(), before)
    for n, m in ((2, 3), (4, 0), (1, 1)):
        assert_equivalent(before, after, feeds=[{"x": np.ones((n, m, 4), np.float32)}])
