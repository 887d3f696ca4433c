"""Pad before Conv: structure, numbers bit by bit, near misses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.passes.fuse_pad_into_conv import FusePadIntoConv
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops

F = np.float32
X = "float[N,4,6,7] x"
Y = "float[N,5,h,w] y"
W = np.random.default_rng(0).normal(size=(5, 4, 3, 3)).astype(F)
PADS = np.array([0, 0, 1, 0, 0, 0, 2, 1])


def pads_of(proto):
    (conv,) = [node for node in proto.graph.node if node.op_type == "Conv"]
    attrs = {attr.name: list(attr.ints) for attr in conv.attribute}
    assert "auto_pad" not in attrs
    return attrs["pads"]


def fused(text, pads, *, opset=17, sizes=None, **constants):
    before = model(text, opset=opset, **constants)
    after, result = apply(FusePadIntoConv(), before)
    assert result.rewrites == 1 and ops(after) == ["Conv"] and pads_of(after) == pads
    assert_equivalent(before, after, sizes=sizes)
    _, again = apply(FusePadIntoConv(), after)
    assert again.rewrites == 0


@pytest.mark.parametrize("opset", [7, 10])
@pytest.mark.parametrize("attrs", ["", ", value=0.0", ', mode="constant"'])
def test_amounts_as_attributes(opset, attrs):
    text = f"g ({X}) => ({Y}) {{ p = Pad<pads=[0,0,1,0,0,0,2,1]{attrs}>(x) y = Conv(p, W) }}"
    fused(text, [1, 0, 2, 1], opset=opset, W=W)


@pytest.mark.parametrize("opset", [11, 13, 18, 19])
@pytest.mark.parametrize("call", ["Pad(x, a)", "Pad(x, a, z)", 'Pad<mode="constant">(x, a, z)'])
def test_amounts_as_inputs(opset, call):
    text = f"g ({X}) => ({Y}) {{ p = {call} y = Conv(p, W) }}"
    fused(text, [1, 0, 2, 1], opset=opset, W=W, a=PADS, z=np.zeros((), F))


@pytest.mark.parametrize(
    ("axes", "amounts", "pads"), [([2, 3], [1, 0, 2, 1], [1, 0, 2, 1]), ([-1], [3, 2], [0, 3, 0, 2])]
)
def test_axes(axes, amounts, pads):
    text = f"g ({X}) => ({Y}) {{ p = Pad(x, a, , i) y = Conv(p, W) }}"
    fused(text, pads, opset=18, W=W, a=np.array(amounts), i=np.array(axes))


@pytest.mark.parametrize(
    ("geometry", "pads"),
    [
        ("pads=[1,1,0,2], strides=[2,1], dilations=[1,2]", [2, 1, 2, 3]),
        ('auto_pad="SAME_UPPER"', [2, 1, 3, 2]),
        ('auto_pad="SAME_LOWER", strides=[2,2]', [2, 1, 3, 1]),
        ('auto_pad="VALID"', [1, 0, 2, 1]),
    ],
)
def test_own_pads_are_added(geometry, pads):
    fused(f"g ({X}) => ({Y}) {{ p = Pad(x, a) y = Conv<{geometry}>(p, W) }}", pads, W=W, a=PADS)


def test_pads_beyond_the_kernel():
    text = f"g ({X}) => ({Y}) {{ p = Pad(x, a) y = Conv(p, W) }}"
    fused(text, [5, 4, 6, 3], W=W, a=np.array([0, 0, 5, 4, 0, 0, 6, 3]))


@pytest.mark.parametrize("axes", [1, 3])
def test_any_rank_and_unknown_sizes(axes):
    rng = np.random.default_rng(1)
    x, y, free = ",".join("pqr"[:axes]), ",".join("hwd"[:axes]), dict.fromkeys("pqr", 6)
    text = f"g (float[N,4,{x}] x) => (float[N,6,{y}] y) {{ p = Pad(x, a) y = Conv<group=2>(p, W) }}"
    amounts = np.array([0, 0, *range(axes), 0, 0, *[2] * axes])
    weight = rng.normal(size=(6, 2, *[3] * axes)).astype(F)
    fused(text, [*range(axes), *[2] * axes], sizes=free, W=weight, a=amounts)


def test_weight_need_not_be_constant():
    fused(
        "g (float[N,4,6,7] x, float[5,4,3,3] w) => (float[N,5,h,w2] y) { p = Pad(x, a) y = Conv(p, w) }",
        [1, 0, 2, 1],
        a=PADS,
    )


def test_all_readers_take_it_in():
    text = f"g ({X}) => ({Y}, float[N,5,h2,w2] z) {{ p = Pad(x, a) y = Conv(p, W) z = Conv<pads=[1,1,1,1]>(p, W) }}"
    before = model(text, W=W, a=PADS)
    after, result = apply(FusePadIntoConv(), before)
    assert result.rewrites == 1 and ops(after) == ["Conv", "Conv"]
    assert_equivalent(before, after)


PAD = "p = Pad(x, a)"
OTHER = {
    "model output": f"g ({X}) => ({Y}, float[N,4,9,8] p) {{ {PAD} y = Conv(p, W) }}",
    "another reader": f"g ({X}) => ({Y}, float[N,4,9,8] z) {{ {PAD} y = Conv(p, W) z = Relu(p) }}",
    "as the weight": f"g (float[4,4,3,2] x) => (float[4,4,h,w] y) {{ {PAD} y = Conv(p, p) }}",
    "reflect": f'g ({X}) => ({Y}) {{ p = Pad<mode="reflect">(x, a) y = Conv(p, W) }}',
    "edge": f'g ({X}) => ({Y}) {{ p = Pad<mode="edge">(x, a) y = Conv(p, W) }}',
    "not zero": f"g ({X}) => ({Y}) {{ p = Pad(x, a, one) y = Conv(p, W) }}",
    "value is an input": f"g ({X}, float u) => ({Y}) {{ p = Pad(x, a, u) y = Conv(p, W) }}",
    "samples": f"g ({X}) => (float[M,5,4,5] y) {{ p = Pad(x, samples) y = Conv(p, W) }}",
    "channels": f"g (float[N,3,6,7] x) => ({Y}) {{ p = Pad(x, channels) y = Conv(p, W) }}",
    "negative": f"g ({X}) => ({Y}) {{ p = Pad(x, less) y = Conv(p, W) }}",
    "SAME of an unknown size": (
        f'g (float[N,4,q,r] x) => ({Y}) {{ {PAD} y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(p, W) }}'
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_near_miss_is_left_alone(name):
    constants = {
        "samples": np.array([1, 0, 0, 0, 0, 0, 0, 0]),
        "channels": np.array([0, 0, 0, 0, 0, 1, 0, 0]),
        "less": np.array([0, 0, -1, 0, 0, 0, 2, 1]),
        "one": np.ones((), F),
    }
    before = model(OTHER[name], W=W, a=PADS, **constants)
    after, result = apply(FusePadIntoConv(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and ops(after) == ops(before)
    assert_equivalent(before, after, sizes={"q": 5, "r": 6})


def test_amounts_that_are_inputs_are_left_alone():
    before = model(f"g ({X}, int64[8] a) => ({Y}) {{ p = Pad(x, a) y = Conv(p, W) }}", W=W)
    _, result = apply(FusePadIntoConv(), before)
    assert result.rewrites == 0 and len(result.misses) == 1


def test_axes_that_are_inputs_are_left_alone():
    before = model(f"g ({X}, int64[2] i) => ({Y}) {{ p = Pad(x, a, , i) y = Conv(p, W) }}", opset=18, W=W, a=PADS[:4])
    _, result = apply(FusePadIntoConv(), before)
    assert result.rewrites == 0 and len(result.misses) == 1


@pytest.mark.parametrize(
    ("attrs", "amounts"),
    [("", PADS[:6]), ("<pads=[1,1,-1,1]>", PADS), ("<pads=[1,1,1]>", PADS)],
    ids=["amounts of another rank", "negative pads of the Conv", "pads of another rank"],
)
def test_what_no_runtime_accepts_is_left_alone(attrs, amounts):
    graph = graph_of(model(f"g ({X}) => ({Y}) {{ p = Pad(x, a) y = Conv{attrs}(p, W) }}", W=W, a=amounts))
    result = FusePadIntoConv().apply(graph)
    assert result.rewrites == 0 and len(result.misses) == 1


def test_unknown_rank_is_left_alone():
    text = "g (float[n] x, int64[r] shape, float[m] v, int64[s] other) => (float[a,b,c,d] y)"
    calls = "t = Reshape(x, shape) w = Reshape(v, other) p = Pad(t, a) y = Conv(p, w)"
    result = FusePadIntoConv().apply(graph_of(model(f"{text} {{ {calls} }}", a=PADS)))
    assert result.rewrites == 0 and len(result.misses) == 1


@pytest.mark.parametrize("text", [f"g ({X}) => ({Y}) {{ {PAD} r = Relu(p) y = Conv(r, W) }}"])
def test_other_forms_are_not_the_pattern(text):
    _, result = apply(FusePadIntoConv(), model(text, W=W, a=PADS))
    assert result.rewrites == 0 and not result.misses


def test_reader_in_a_branch_keeps_the_pad():
    branch = "g{0} () => (float[N,5,h,w] y{0}) {{ y{0} = Conv(p, W) }}"
    text = (
        f"g ({X}, bool c) => ({Y}, float[N,5,h,w] z) {{ {PAD} z = Conv(p, W) "
        f"y = If (c) <then_branch={branch.format(1)}, else_branch={branch.format(2)}> }}"
    )
    before = model(text, W=W, a=PADS)
    after, result = apply(FusePadIntoConv(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert_equivalent(before, after)


def test_foreign_operator_of_the_same_name_is_left_alone():
    text = f"""<ir_version: 8, opset_import: ["" : 17, "ours" : 1]>
    g ({X}) => ({Y}) {{ {PAD} y = ours.Conv(p, W) }}"""
    result = FusePadIntoConv().apply(graph_of(model(text, W=W, a=PADS)))
    assert result.rewrites == 0 and not result.misses


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 3), min_size=8, max_size=8),
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2), st.integers(1, 2)),
    st.sampled_from([1, 2, 4]),
)
def test_random_layers(pads, geometry, group):
    weight = np.random.default_rng(2).normal(size=(4, 4 // group, 3, 2)).astype(F)
    attrs = f"group={group}, strides={list(geometry[:2])}, dilations={list(geometry[2:])}, pads={pads[4:]}"
    amounts = np.array([0, 0, *pads[:2], 0, 0, *pads[2:4]])
    text = f"g ({X}) => (float[N,4,h,w] y) {{ p = Pad(x, a) y = Conv<{attrs}>(p, W) }}"
    fused(text, [p + q for p, q in zip(pads[:4], pads[4:], strict=True)], W=weight, a=amounts)
