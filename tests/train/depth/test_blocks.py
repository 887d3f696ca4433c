"""Which blocks are found, in which spelling, and which near misses are refused."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcompress.errors import RecipeError
from onnxcompress.model_io import load
from onnxcompress.testing import model
from onnxcompress.train.depth.blocks import Block, Refusal, find_blocks, without_overlaps
from onnxcompress.train.depth.preparation import prepare

MODELS = Path(__file__).parents[3] / "models"


def weights(**shapes):
    rng = np.random.default_rng(0)
    return {name: (rng.normal(size=shape) * 0.3).astype(np.float32) for name, shape in shapes.items()}


# t = 2 on 4 channels; %s stands for what makes a from e, and c from d.
INVERTED = """g (float[N,4,{size}] x) => (float[N,4,a,b] y{extra}) {{
    e = Conv(x, W1, b1)
    {first}
    d = Conv<group=8, pads=[1,1,1,1]>(a1, W2, b2)
    {second}
    p = Conv(c1, W3, b3)
    {tail}
}}"""
NUMBERS = weights(W1=(8, 4, 1, 1), b1=(8,), W2=(8, 1, 3, 3), b2=(8,), W3=(4, 8, 1, 1), b3=(4,))
SCALARS = {"zero": np.float32(0), "three": np.float32(3), "six": np.float32(6)}
ACTIVATIONS = {
    "relu6": "{0} = Clip({1}, zero, six)",
    "silu": "s_{0} = Sigmoid({1}) {0} = Mul({1}, s_{0})",
    "hardswish": "{0} = HardSwish({1})",
    "hardswish in parts": (
        "p_{0} = Add({1}, three) q_{0} = Clip(p_{0}, zero, six) r_{0} = Mul({1}, q_{0}) {0} = Div(r_{0}, six)"
    ),
}


def inverted(activation="relu6", *, size="6,6", second=None, tail="y = Add(x, p)", extra="", opset=17, **more):
    form = ACTIVATIONS[activation]
    text = INVERTED.format(
        size=size, extra=extra, first=form.format("a1", "e"), second=second or form.format("c1", "d"), tail=tail
    )
    used = {k: v for k, v in (NUMBERS | SCALARS | more).items() if f"{k}," in text or f"{k})" in text}
    return model(text, opset=opset, **used)


def found(proto, **options) -> tuple[list[Block], list[Refusal]]:
    return find_blocks(prepare(load(proto)), **options)


def kinds(proto):
    return [block.kind for block in found(proto)[0]]


# -- inverted residuals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inverted_residual(activation, opset):
    if activation == "hardswish" and opset < 14:
        pytest.skip("HardSwish came with opset 14")
    (block,), refused = found(inverted(activation, opset=opset))
    assert (block.kind, block.source, block.output, block.shortcut) == ("inverted-residual", "x", "y", ())
    assert block.deletable and block.end == "" and not refused
    assert block.macs == 36 * (8 * 4 + 8 * 9 + 4 * 8)


def test_without_expansion():
    text = """g (float[N,4,6,6] x) => (float[N,4,a,b] y) {
        d = Conv<group=4, pads=[1,1,1,1]>(x, W1) a = Relu(d) p = Conv(a, W2) y = Add(p, x) }"""
    assert kinds(model(text, **weights(W1=(4, 1, 3, 3), W2=(4, 4, 1, 1)))) == ["inverted-residual"]


def test_squeeze_and_excitation_is_refused():
    gate = """a2 = Clip(d, zero, six) g1 = GlobalAveragePool(a2) g2 = Conv(g1, V1) g3 = Relu(g2) g4 = Conv(g3, V2)
        g5 = Sigmoid(g4) c1 = Mul(a2, g5)"""
    blocks, refused = found(inverted(second=gate, **weights(V1=(2, 8, 1, 1), V2=(8, 2, 1, 1))))
    assert [block.kind for block in blocks] == ["residual"]  # deletion is still to be had
    assert len(refused) == 1 and "squeeze-and-excitation" in refused[0].reason


def test_inner_tensor_read_elsewhere_is_refused():
    blocks, refused = found(inverted(tail="y = Add(x, p) z = Relu(d)", extra=", float[N,8,a,b] z"))
    assert "inverted-residual" not in [block.kind for block in blocks]  # a part of it may be a run
    assert len(refused) == 1 and "'d' is read by Relu" in refused[0].reason


def test_inner_tensor_that_is_an_output_is_refused():
    blocks, refused = found(inverted(extra=", float[N,8,a,b] e"))
    assert "inverted-residual" not in [block.kind for block in blocks]
    assert "output of the model" in refused[0].reason


def test_broadcast_branch_is_refused():
    narrow = weights(W3=(1, 8, 1, 1), b3=(1,))
    blocks, refused = found(inverted(**narrow))
    assert [block.kind for block in blocks] == ["residual"]
    assert "which has shape ['N', 1, 6, 6]" in refused[0].reason


def test_dynamic_size_is_refused_where_padding_moves():
    blocks, refused = found(inverted(size="H,W"))
    assert [block.kind for block in blocks] == ["residual"]
    assert "fix the input size" in refused[0].reason


def test_weight_that_is_no_constant_is_refused():
    proto = inverted()
    value = next(t for t in proto.graph.initializer if t.name == "W3")
    proto.graph.input.append(onnx.helper.make_tensor_value_info("W3", 1, [4, 8, 1, 1]))
    proto.graph.initializer.remove(value)
    blocks, refused = found(proto)
    assert [block.kind for block in blocks] == ["residual"]
    assert "not a constant" in refused[0].reason


def test_nothing_to_prune_is_refused():
    text = "g (float[N,4,6,6] x) => (float[N,4,a,b] y) { c = Conv(x, W1) d = Conv(c, W2) y = Add(x, d) }"
    blocks, refused = found(model(text, **weights(W1=(8, 4, 1, 1), W2=(4, 8, 1, 1))))
    assert [block.kind for block in blocks] == ["residual"]
    assert "they merge as they are" in refused[0].reason


# -- the other kinds -------------------------------------------------------------------------------------------------

BASIC = """g (float[N,4,{size}] x) => (float[N,c,a,b] y) {{
    e = Conv<pads=[1,1,1,1], strides=[{stride},{stride}]>(x, W1) a1 = Relu(e)
    p = Conv<pads=[{pad},{pad},{pad},{pad}]>(a1, W2)
    {skip} s = Add(p, k) y = Relu(s) }}"""


def basic(size="6,6", stride=1, skip="k = Identity(x)", pad=1, kernel=3, **more):
    numbers = weights(W1=(4, 4, 3, 3), W2=(4, 4, kernel, kernel)) | more
    return model(BASIC.format(size=size, stride=stride, skip=skip, pad=pad), **numbers)


def test_basic_block_in_both_forms():
    blocks, refused = found(basic())
    assert [block.kind for block in blocks] == ["basic", "basic-3x3"] and not refused
    assert {block.end for block in blocks} == {"ReLU"} and all(block.deletable for block in blocks)
    assert [block.kind for block in without_overlaps(blocks)] == ["basic-3x3"]
    assert [block.kind for block in without_overlaps(blocks, prefer=("basic",))] == ["basic"]


def test_basic_block_with_projection():
    blocks, _ = found(basic(stride=2, skip="k = Conv<strides=[2,2]>(x, W3)", **weights(W3=(4, 4, 1, 1))))
    assert [block.kind for block in blocks] == ["basic", "basic-3x3"]
    assert all(len(block.shortcut) == 1 and not block.deletable for block in blocks)


def test_basic_block_of_dynamic_size_is_offered_capped_alone():
    blocks, refused = found(basic(size="H,W"))
    assert [block.kind for block in blocks] == ["basic-3x3"] and "fix the input size" in refused[0].reason


def test_kernel_without_a_centre_is_not_capped():
    text = BASIC.replace("Conv<pads=[{pad},{pad},{pad},{pad}]>", "Conv<pads=[0,0,1,1]>")
    numbers = weights(W1=(4, 4, 3, 3), W2=(4, 4, 2, 2))
    blocks, _ = found(model(text.format(size="6,6", stride=1, skip="k = Identity(x)"), **numbers))
    assert [block.kind for block in blocks] == ["basic"]


def test_bottleneck():
    text = """g (float[N,8,6,6] x) => (float[N,8,a,b] y) {
        e = Conv(x, W1) a1 = Relu(e) m = Conv<pads=[1,1,1,1]>(a1, W2) a2 = Relu(m) p = Conv(a2, W3) s = Add(x, p)
        y = Relu(s) }"""
    assert kinds(model(text, **weights(W1=(4, 8, 1, 1), W2=(4, 4, 3, 3), W3=(8, 4, 1, 1)))) == ["bottleneck"]


FFN = "g (float[{x}] x) => (float[{y}] y) {{ {norm} h = {first} {act} p = {second} y = Add(p, x) }}"
GELU = """u = Div(h, root) v = Erf(u) w = Add(v, one) q = Mul(h, w) a1 = Mul(q, half)"""
GELU_NUMBERS = {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}


@pytest.mark.parametrize("act", [GELU, "u = Sigmoid(h) a1 = Mul(h, u)", "a1 = Relu(h)"])
@pytest.mark.parametrize("norm", ["n = LayerNormalization<axis=-1>(x, g1, g2)", "n = Identity(x)"])
def test_ffn(norm, act):
    text = FFN.format(x="N,5,4", y="N,a,b", norm=norm, first="MatMul(n, W1)", act=act, second="MatMul(a1, W2)")
    numbers = weights(W1=(4, 12), W2=(12, 4), g1=(4,), g2=(4,)) | GELU_NUMBERS
    used = {k: v for k, v in numbers.items() if f"{k})" in text or f"{k}," in text}
    (block,), refused = found(model(text, **used))
    assert block.kind == "ffn" and block.deletable and not refused
    assert block.macs == 2 * 5 * 4 * 12


def test_ffn_of_gemms():
    text = FFN.format(x="N,4", y="N,b", norm="", first="Gemm(x, W1, b1)", act="a1 = Relu(h)", second="Gemm(a1, W2)")
    assert kinds(model(text, **weights(W1=(4, 12), b1=(12,), W2=(12, 4)))) == ["ffn"]


def test_gated_linear_unit_is_refused():
    act = "j = MatMul(n, W3) s = Sigmoid(j) a1 = Mul(h, s)"
    text = FFN.format(x="N,5,4", y="N,a,b", norm="n = Relu(x)", first="MatMul(n, W1)", act=act, second="MatMul(a1, W2)")
    blocks, refused = found(model(text, **weights(W1=(4, 12), W2=(12, 4), W3=(4, 12))))
    assert [block.kind for block in blocks] == ["residual"]
    assert "joins two tensors" in refused[0].reason


CONVNEXT = """g (float[N,4,6,6] x) => (float[N,4,a,b] y) {{
    d = Conv<group=4, pads=[3,3,3,3]>(x, W0)
    {norm}
    h = Conv(n, W1, b1) {act} p = Conv(a1, W2, b2) z = Mul(p, gamma) y = Add(x, z) }}"""
CHANNEL_NORM = """m = ReduceMean<axes=[1]>(d) c = Sub(d, m) cc = Mul(c, c) var = ReduceMean<axes=[1]>(cc)
    ve = Add(var, eps) sd = Sqrt(ve) r = Div(c, sd) rs = Mul(r, g1) n = Add(rs, g2)"""
CONVNEXT_NUMBERS = weights(
    W0=(4, 1, 7, 7), W1=(16, 4, 1, 1), b1=(16,), W2=(4, 16, 1, 1), b2=(4,), gamma=(4, 1, 1), g1=(4, 1, 1), g2=(4, 1, 1)
)


def test_convnext_with_a_norm_in_parts():
    text = CONVNEXT.format(norm=CHANNEL_NORM, act=GELU)
    (block,), refused = found(model(text, **CONVNEXT_NUMBERS, **GELU_NUMBERS, eps=np.float32(1e-6)))
    assert block.kind == "convnext" and not refused


def test_norm_over_positions_is_refused():
    norm = "n = LayerNormalization<axis=-1>(d, g1)"
    numbers = CONVNEXT_NUMBERS | weights(g1=(6,))
    del numbers["g2"]
    blocks, refused = found(model(CONVNEXT.format(norm=norm, act=GELU), **numbers, **GELU_NUMBERS))
    assert [block.kind for block in blocks] == ["residual"]
    assert "another axis" in refused[0].reason


# -- runs ------------------------------------------------------------------------------------------------------------

RUN = """g (float[N,4,8,8] x) => (float[N,8,a,b] y) {
    c1 = Conv(x, W1) r1 = Relu(c1) c2 = Conv<group=32, pads=[1,1,1,1], strides=[2,2]>(r1, W2) r2 = Relu(c2)
    c3 = Conv(r2, W3) y = Relu(c3) }"""
RUN_NUMBERS = weights(W1=(32, 4, 1, 1), W2=(32, 1, 3, 3), W3=(8, 32, 1, 1))


def test_run_is_found_where_it_pays():
    (block,), _ = found(model(RUN, **RUN_NUMBERS))
    assert (block.kind, block.source, block.output, block.end) == ("run", "x", "c3", "ReLU")
    assert not block.add and not block.deletable and len(block.nodes) == 5


def test_run_that_does_not_pay_is_left():
    text = """g (float[N,16,32,32] x) => (float[N,16,a,b] y) {
        c1 = Conv<pads=[1,1,1,1]>(x, W1) r1 = Relu(c1) c2 = Conv<pads=[1,1,1,1]>(r1, W2) r2 = Relu(c2)
        y = Conv<pads=[1,1,1,1]>(r2, W3) }"""
    blocks, _ = found(model(text, **weights(W1=(16, 16, 3, 3), W2=(16, 16, 3, 3), W3=(16, 16, 3, 3))))
    assert not blocks


def test_named_run():
    graph = prepare(load(model(RUN, **RUN_NUMBERS)))
    convs = [node.name for node in graph.nodes if node.op == "Conv"]
    blocks, _ = find_blocks(graph, named_runs=[(convs[0], convs[1])])
    assert [block.nodes for block in blocks] == [tuple(node.name for node in graph.nodes[:3])]


@pytest.mark.parametrize("first", ["nowhere", "last", "relu"])
def test_named_run_that_is_none(first):
    graph = prepare(load(model(RUN, **RUN_NUMBERS)))
    names = [node.name for node in graph.nodes]
    start = {"nowhere": "nowhere", "last": names[4], "relu": names[3]}[first]
    with pytest.raises(RecipeError):
        find_blocks(graph, named_runs=[(start, names[2] if first == "last" else names[4])])


# -- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("convnext_mini_digits", {"convnext": 6}),
        ("deit_mini_digits", {"ffn": 4, "residual": 4}),
        ("mobilenetv2_mini_digits", {"inverted-residual": 6, "run": 2}),
        ("resnet20_digits", {"basic": 9, "basic-3x3": 9}),
    ],
)
def test_committed_models(file, expected):
    graph = prepare(load(MODELS / f"{file}.onnx"))
    blocks, refused = find_blocks(graph)
    assert {kind: sum(b.kind == kind for b in blocks) for kind in {b.kind for b in blocks}} == expected
    # The attention of a transformer can be deleted alone, and the report says so.
    assert len(refused) == expected.get("residual", 0)
    assert len({name for b in without_overlaps(blocks) for name in b.nodes}) == sum(
        len(b.nodes) for b in without_overlaps(blocks)
    )


def test_names_are_needed():
    proto = inverted()
    for node in proto.graph.node:
        node.name = ""
    with pytest.raises(RecipeError, match="prepare"):
        find_blocks(load(proto))
