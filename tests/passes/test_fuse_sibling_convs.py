"""Convolutions of one input, alike but for their weights: side by side in a Concat, or taken apart by a Split."""

import numpy as np
import pytest

from onnxcompress.cost import Price
from onnxcompress.passes.fuse_sibling_convs import FuseSiblingConvs
from onnxcompress.rewrite import Settings
from onnxcompress.testing import apply, assert_equivalent, model, ops


class FewerConvs:
    """Only a Conv costs anything."""

    def price(self, specs):
        return Price(float(sum(spec.op == "Conv" for spec in specs)), 0)


class SplitIsDear(FewerConvs):
    """Nor does a Conv fewer pay for a Split."""

    def price(self, specs):
        return Price(super().price(specs).latency_ms + 10 * sum(spec.op == "Split" for spec in specs), 0)


PAYS = Settings(cost=FewerConvs())
CONCAT_ONLY = Settings(cost=SplitIsDear())


def normal(*shape, seed=0):
    scale = 1 / np.sqrt(np.prod(shape[1:]))
    return (np.random.default_rng(seed + sum(shape)).normal(size=shape) * scale).astype(np.float32)


def fused(before, settings=None, **kwargs):
    after, result = apply(FuseSiblingConvs(settings), before)
    again, second = apply(FuseSiblingConvs(settings), after)
    assert second.rewrites == 0 and ops(again) == ops(after)
    # Measured 0.0: each channel is summed as before; another matrix kernel may sum in another order.
    assert_equivalent(before, after, rel=1e-6, sizes={"H": 6, "W": 7}, **kwargs)
    return after, result


X = "float[N,4,H,W] x"
WEIGHTS = {"A": normal(4, 4, 3, 3), "a": normal(4), "B": normal(2, 4, 3, 3)}
PAIR = "c = Conv<pads=[1,1,1,1]>(x, A, a) d = Conv<pads=[1,1,1,1]>(x, B)"


@pytest.mark.parametrize(
    ("nodes", "channels", "left"),
    [
        ("y = Concat<axis=1>(c, d)", 6, ["Conv"]),
        ("y = Concat<axis=-3>(d, c)", 6, ["Conv"]),
        ("y = Concat<axis=1>(x, c, d)", 10, ["Conv", "Concat"]),
        ("y = Concat<axis=1>(c, d, x, x)", 14, ["Conv", "Concat"]),
        ("e = Relu(c) f = Relu(d) y = Concat<axis=1>(e, f)", 6, ["Conv", "Relu"]),
        (
            "e = LeakyRelu<alpha=0.2>(c) f = LeakyRelu<alpha=0.2>(d) y = Concat<axis=1>(x, f, e)",
            10,
            ["Conv", "LeakyRelu", "Concat"],
        ),
    ],
)
def test_side_by_side(nodes, channels, left):
    after, result = fused(model(f"g ({X}) => (float[N,{channels},h,w] y) {{ {PAIR} {nodes} }}", **WEIGHTS))
    assert ops(after) == left
    assert "2 Conv 3x3 of one input -> 1 Conv" in result.done[0].detail


@pytest.mark.parametrize(("size", "axes"), [("L", 1), ("D,H,W", 3)])
def test_other_ranks(size, axes):
    text = f"""g (float[N,4,{size}] x) => (float[N,6,{",".join("efg"[:axes])}] y) {{
        c = Conv(x, A, a) d = Conv<kernel_shape={[1] * axes}>(x, B) y = Concat<axis=1>(c, d)
    }}"""
    after, _ = fused(model(text, A=normal(4, 4, *[1] * axes), a=normal(4), B=normal(2, 4, *[1] * axes)))
    assert ops(after) == ["Conv"]


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_split(opset):
    text = f"g ({X}) => (float[N,4,h,w] c, float[N,2,h,w] z) {{ {PAIR} z = Relu(d) }}"
    after, result = fused(model(text, opset=opset, **WEIGHTS), settings=PAYS)
    assert ops(after) == ["Conv", "Split", "Relu"]
    assert len(after.graph.node[1].input) == (1 if opset < 13 else 2)
    assert "and a Split" in result.done[0].detail


def test_split_pays_for_very_few_channels_only():
    def siblings(channels):
        text = f"""g (float[N,128,28,28] x) => (float[N,{channels},h,w] c, float[N,{channels},h,w] d) {{
            c = Conv<pads=[1,1,1,1]>(x, A) d = Conv<pads=[1,1,1,1]>(x, B)
        }}"""
        return model(text, A=normal(channels, 128, 3, 3), B=normal(channels, 128, 3, 3, seed=1))

    after, _ = fused(siblings(4))
    assert ops(after) == ["Conv", "Split"]
    after, result = apply(FuseSiblingConvs(), siblings(32))
    assert ops(after) == ["Conv", "Conv"]
    assert result.misses[0].reason.startswith("with a Split it would not be faster")


def test_only_those_alike():
    text = f"""g ({X}) => (float[N,12,h,w] y) {{
        c = Conv<pads=[1,1,1,1]>(x, A, a) e = Conv(x, E) d = Conv<pads=[1,1,1,1]>(x, B) f = Conv(x, F)
        y = Concat<axis=1>(c, d, e, f)
    }}"""
    after, result = fused(model(text, **WEIGHTS, E=normal(3, 4, 1, 1), F=normal(3, 4, 1, 1, seed=1)))
    assert ops(after) == ["Conv", "Conv", "Concat"] and result.rewrites == 2


OTHER_PADS = "c = Conv<pads=[1,1,1,1]>(x, A, a) d = Conv<pads=[0,1,2,1]>(x, B) y = Concat<axis=1>(c, d)"
OTHER_ACTIVATION = f"{PAIR} e = Relu(c) f = Sigmoid(d) y = Concat<axis=1>(e, f)"
OTHER_ALPHA = f"{PAIR} e = LeakyRelu<alpha=0.1>(c) f = LeakyRelu<alpha=0.2>(d) y = Concat<axis=1>(e, f)"
APART = f"{PAIR} y = Concat<axis=1>(c, x, d)"
ALONG_HEIGHT = "c = Conv<pads=[1,1,1,1]>(x, A, a) d = Conv<pads=[1,1,1,1]>(x, A) y = Concat<axis=2>(c, d)"


@pytest.mark.parametrize("nodes", [OTHER_PADS, OTHER_ACTIVATION, OTHER_ALPHA, APART, ALONG_HEIGHT])
def test_near_miss_is_left_alone(nodes):
    channels = 4 if nodes is ALONG_HEIGHT else 10 if nodes is APART else 6
    used = {name: values for name, values in WEIGHTS.items() if f" {name}" in nodes}
    before = model(f"g ({X}) => (float[N,{channels},h,w] y) {{ {nodes} }}", **used)
    after, result = apply(FuseSiblingConvs(CONCAT_ONLY), before)
    assert ops(after) == ops(before) and result.rewrites == 0
    assert_equivalent(before, after, sizes={"H": 6, "W": 7})


@pytest.mark.parametrize("extra", ["float[N,2,h,w] d", "float[N,2,h,w] z"])
def test_output_read_elsewhere_stays(extra):
    reader = "z = Relu(d)" if " z" in extra else ""
    before = model(f"g ({X}) => (float[N,6,h,w] y, {extra}) {{ {PAIR} y = Concat<axis=1>(c, d) {reader} }}", **WEIGHTS)
    after, result = apply(FuseSiblingConvs(CONCAT_ONLY), before)
    assert ops(after) == ops(before) and len(result.misses) == 1


@pytest.mark.parametrize("text", ["group=2", "weight"])
def test_grouped_or_live_weights_stay(text):
    attrs, weight = (", group=2", "B") if text == "group=2" else ("", "U")
    before = model(
        f"""g ({X}, float[2,{2 if attrs else 4},3,3] U) => (float[N,4,h,w] y) {{
            c = Conv<pads=[1,1,1,1]{attrs}>(x, {weight}) d = Conv<pads=[1,1,1,1]{attrs}>(x, {weight})
            y = Concat<axis=1>(c, d)
        }}""",
        **({"B": normal(2, 2, 3, 3)} if attrs else {}),
    )
    _, result = apply(FuseSiblingConvs(PAYS), before)
    assert result.rewrites == 0
