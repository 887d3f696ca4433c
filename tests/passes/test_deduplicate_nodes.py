"""Common subexpressions, and nodes that only look equal."""

import pytest

from onnxcompress.passes.deduplicate_nodes import DeduplicateNodes
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops

X, Y = "float[N,4] x, float[N,4] z", "float[a,b] y"


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("a = Relu(x) b = Relu(x) y = Add(a, b)", 2),
        ("a = Add(x, z) b = Add(z, x) y = Mul(a, b)", 2),
        ("a = Relu(x) b = Relu(x) c = Neg(a) d = Neg(b) y = Add(c, d)", 3),
        ("a = LeakyRelu<alpha = 0.01>(x) b = LeakyRelu(x) y = Add(a, b)", 2),  # 0.01 is the default
        ("a = Transpose<perm = [1, 0]>(x) b = Transpose<perm = [1, 0]>(x) c = MatMul(z, a) y = MatMul(c, b)", 3),
        ("a = Clip(x, , hi) b = Clip(x, , hi) y = Add(a, b)", 2),
        ("p, q = TopK(x, two) r, s = TopK(x, two) t = Cast<to = 1>(s) u = Add(p, t) y = Add(u, r)", 4),
    ],
)
def test_merges(body, left):
    before = model(f"g ({X}) => ({Y}) <float hi = {{1}}, int64[1] two = {{2}}> {{ {body} }}")
    after, _ = apply(DeduplicateNodes(), before)
    assert len(ops(after)) == left
    if "MatMul" in body:
        assert_equivalent(before, after, sizes={"N": 4})
    else:
        assert_equivalent(before, after)


def test_output_name_is_kept():
    before = model(f"g ({X}) => ({Y}, float[N,4] b) {{ a = Relu(x) b = Relu(x) y = Add(a, z) }}")
    after, result = apply(DeduplicateNodes(), before)
    assert result.rewrites == 1 and ops(after) == ["Relu", "Add"] and after.graph.node[0].output[0] == "b"
    assert_equivalent(before, after)


def test_within_a_branch():
    before = model("""g (bool c, float[N] x) => (float[N] y) {
        y = If (c) <then_branch = p () => (float[N] u) { a = Relu(x) b = Relu(x) u = Add(a, b) },
                    else_branch = q () => (float[N] v) { a2 = Relu(x) v = Neg(a2) }>
    }""")
    after, result = apply(DeduplicateNodes(), before)
    assert result.rewrites == 1  # the two branches are not one
    assert_equivalent(before, after)


NEAR = [
    "a = Sub(x, z) b = Sub(z, x) y = Add(a, b)",
    "a = LeakyRelu<alpha = 0.02>(x) b = LeakyRelu(x) y = Add(a, b)",
    "a = Clip(x, , hi) b = Clip(x, hi) y = Add(a, b)",
    "a = Concat<axis = 1>(x, z) b = Concat<axis = 1>(z, x) y = Add(a, b)",
    "a = Relu(x) b = Relu(z) y = Add(a, b)",
    "a = Cast<to = 7>(x) b = Cast<to = 6>(x) c = Cast<to = 7>(b) d = Add(a, c) y = Cast<to = 1>(d)",
    # 0.0 is not -0.0: 1 / a tells them apart
    "a = Elu<alpha = 0.0>(x) b = Elu<alpha = -0.0>(x) c = Reciprocal(a) d = Reciprocal(b) y = Add(c, d)",
]


@pytest.mark.parametrize("body", NEAR)
def test_near_miss_is_left_alone(body):
    before = model(f"g ({X}) => ({Y}) <float hi = {{1}}> {{ {body} }}")
    after, result = apply(DeduplicateNodes(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert_equivalent(before, after)


def test_signs_of_zero_and_nan_in_tensor_attributes():
    text = """g (int64[k] s) => (float[a] y) {
        p = ConstantOfShape<value = float[1] {0.0}>(s) q = ConstantOfShape<value = float[1] {-0.0}>(s)
        r = Reciprocal(q) y = Add(p, r)
    }"""
    before = model(text)
    after, result = apply(DeduplicateNodes(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    same = model(text.replace("-0.0", "0.0"))
    assert apply(DeduplicateNodes(), same)[1].rewrites == 1


@pytest.mark.parametrize(
    "call", ["RandomNormalLike(x)", "RandomUniformLike(x)", "Bernoulli(x)", "Dropout(x, half, yes)", "Multinomial(x)"]
)
def test_random_operators_are_left_alone(call):
    text = f"g ({X}) => ({Y}) <float half = {{0.5}}, bool yes = {{1}}> {{ a = {call} b = {call} y = Add(a, b) }}"
    before = model(text)
    after, result = apply(DeduplicateNodes(), before)
    assert result.rewrites == 0 and after == before


def test_random_operators_without_inputs_are_left_alone():
    call = "RandomNormal<shape = [2, 4]>()"
    before = model(f"g ({X}) => ({Y}) {{ a = {call} b = {call} y = Add(a, b) }}")
    assert apply(DeduplicateNodes(), before)[1].rewrites == 0


def test_nodes_with_graphs_are_left_alone():
    branch = """If (c) <then_branch = p () => (float[N] u) { u = Relu(x) },
                        else_branch = q () => (float[N] v) { v = Neg(x) }>"""
    other = branch.replace(" u", " u2").replace(" v", " v2")
    before = model(f"g (bool c, float[N] x) => (float[N] y) {{ a = {branch} b = {other} y = Add(a, b) }}")
    after, result = apply(DeduplicateNodes(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)


def test_two_model_outputs_stay_two():
    before = model(f"g ({X}) => ({Y}, float[N,4] a) {{ a = Relu(x) y = Relu(x) }}")
    after, result = apply(DeduplicateNodes(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and after == before


def test_output_that_the_first_does_not_make():
    pool = "MaxPool<kernel_shape = [1]>(x)"
    before = model(f"g (float[1,2,4] x) => (float[a,b,c] y) {{ a, i = {pool} b = {pool} y = Add(a, b) }}")
    after, result = apply(DeduplicateNodes(), before)
    assert result.rewrites == 1
    assert_equivalent(before, after)
    swapped = model(f"g (float[1,2,4] x) => (int64[a,b,c] y, float[a,b,c] z) {{ b = {pool} a, y = {pool} z = Neg(b) }}")
    after, result = apply(DeduplicateNodes(), swapped)
    assert result.rewrites == 0 and len(result.misses) == 1 and ops(after) == ops(swapped)


def test_foreign_domains_are_left_alone():
    text = """<ir_version: 8, opset_import: ["" : 17, "ours" : 1]>
    g (float[N] x) => (float[N] y) { a = ours.Relu(x) b = ours.Relu(x) c = Relu(x) d = Add(a, b) y = Add(c, d) }"""
    assert DeduplicateNodes().apply(graph_of(model(text))).rewrites == 0


def test_many_readers_stay_quick():
    """One tensor with 1,000 equal readers."""
    count = 1000
    lines = " ".join(f"t{i} = Neg(x)" for i in range(count))
    total = " ".join(f"s{i} = Add({'x' if i == 0 else f's{i - 1}'}, t{i})" for i in range(count))
    before = model(f"g (float[1] x) => (float[1] y) {{ {lines} {total} y = Neg(s{count - 1}) }}")
    after, result = apply(DeduplicateNodes(), before)
    assert result.rewrites == count - 1 and ops(after).count("Neg") == 2
    assert_equivalent(before, after)
