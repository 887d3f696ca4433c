"""BatchNormalization after Conv and ConvTranspose: structure, numbers, near misses."""

import numpy as np
import pytest

from onnxcompress.passes.fuse_batchnorm_into_conv import FuseBatchNormIntoConv
from onnxcompress.testing import apply, assert_equivalent, graph_of, inputs_for, model, ops, relative_error, run

X = "float[N,4,6,6] x"
Y = "float[N,6,h,w] y"
BN = "BatchNormalization(c, s, B, m, v)"


def statistics(channels, seed=0):
    rng = np.random.default_rng(seed)
    f = np.float32
    return {
        "s": rng.normal(size=channels).astype(f),
        "B": rng.normal(size=channels).astype(f),
        "m": rng.normal(size=channels).astype(f),
        "v": rng.uniform(0.01, 2, channels).astype(f),
    }


def weights(op="Conv", group=1, seed=0):
    rng = np.random.default_rng(seed)
    shape = (6, 4 // group, 3, 3) if op == "Conv" else (4, 6 // group, 3, 3)
    return {"W": rng.normal(size=shape).astype(np.float32), **statistics(6, seed)}


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_folds(op, group, bias):
    extra = {"b": np.arange(6, dtype=np.float32)} if bias else {}
    call = f"{op}<group={group}, pads=[1,1,0,1]>(x, W{', b' if bias else ''})"
    before = model(f"g ({X}) => ({Y}) {{ c = {call} y = {BN} }}", **weights(op, group), **extra)
    after, result = apply(FuseBatchNormIntoConv(), before)
    assert result.rewrites == 1 and ops(after) == [op]
    assert_equivalent(before, after, rel=2e-6)  # measured 5.1e-7


def test_folds_half_precision():
    constants = {k: v.astype(np.float16) for k, v in weights().items()}
    before = model(f"g (float16[N,4,6,6] x) => (float16[N,6,h,w] y) {{ c = Conv(x, W) y = {BN} }}", **constants)
    after, result = apply(FuseBatchNormIntoConv(), before)
    assert result.rewrites == 1
    # float16 keeps 11 bits, and the layer-wise original rounds as well: measured 1.1e-3
    assert_equivalent(before, after, rel=3e-3)


def test_shared_initializer_is_not_changed_for_the_other_reader():
    text = f"g ({X}) => ({Y}, float[N,6,h,w] z) {{ c = Conv(x, W) y = {BN} z = Conv(x, W) }}"
    before = model(text, **weights())
    after, result = apply(FuseBatchNormIntoConv(), before)
    assert result.rewrites == 1
    assert_equivalent(before, after, rel=2e-6)


MODEL_OUTPUT = f"g ({X}) => ({Y}, float[N,6,h,w] c) {{ c = Conv(x, W) y = {BN} }}"
TWO_READERS = f"g ({X}) => ({Y}, float[N,6,h,w] z) {{ c = Conv(x, W) y = {BN} z = Relu(c) }}"
TRAINING_MODE = f"g ({X}) => ({Y}) {{ c = Conv(x, W) y, rm, rv = BatchNormalization<training_mode=1>(c, s, B, m, v) }}"
SCALE_IS_INPUT = f"g ({X}, float[6] t) => ({Y}) {{ c = Conv(x, W) y = BatchNormalization(c, t, B, m, v) }}"
SPATIAL = f"g ({X}) => ({Y}) {{ c = Conv(x, W) y = BatchNormalization<spatial=0>(c, s, B, m, v) }}"
STATISTICS_ARE_ASKED_FOR = f"g ({X}) => ({Y}) {{ c = Conv(x, W) y, rm, rv, sm, sv = {BN} }}"  # training before opset 14
WEIGHT_IS_INPUT = f"g ({X}, float[6,4,3,3] U) => ({Y}) {{ c = Conv(x, U) y = {BN} }}"


@pytest.mark.parametrize("text", [MODEL_OUTPUT, TWO_READERS, TRAINING_MODE, SCALE_IS_INPUT, WEIGHT_IS_INPUT])
def test_near_miss_is_left_alone(text):
    before = model(text, **weights())
    after, result = apply(FuseBatchNormIntoConv(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and ops(after) == ops(before)
    assert_equivalent(before, after)


@pytest.mark.parametrize("opset", [7, 8, 9, 13])
def test_folds_in_old_opsets(opset):
    before = model(f"g ({X}) => ({Y}) {{ c = Conv(x, W) y = {BN} }}", opset=opset, **weights())
    after, result = apply(FuseBatchNormIntoConv(), before)
    assert result.rewrites == 1 and ops(after) == ["Conv"]
    assert_equivalent(before, after, rel=2e-6)  # measured 2.3e-7


def test_folds_where_initializers_are_inputs():
    constants = weights()
    listed = "".join(f", float[{','.join(map(str, v.shape))}] {k}" for k, v in constants.items())
    text = f"g ({X}{listed}) => ({Y}) {{ c = Conv(x, W) y = {BN} }}"
    before = model(text, opset=8, ir_version=3, **constants)
    after, result = apply(FuseBatchNormIntoConv(), before)
    assert result.rewrites == 1 and ops(after) == ["Conv"]
    assert {t.name for t in after.graph.initializer} < {value.name for value in after.graph.input}
    feeds = inputs_for(before)
    assert relative_error(run(before, feeds)[0], run(after, feeds)[0]) <= 2e-6  # measured 1.3e-7


@pytest.mark.parametrize(("opset", "text"), [(8, SPATIAL), (13, STATISTICS_ARE_ASKED_FOR)])
def test_old_forms_that_are_no_map_per_channel(opset, text):
    graph = graph_of(model(text, opset=opset, **weights()))
    result = FuseBatchNormIntoConv().apply(graph)
    assert result.rewrites == 0 and len(result.misses) == 1


@pytest.mark.parametrize(("name", "value"), [("v", -1.0), ("s", np.inf), ("s", 3e38), ("m", np.nan)])
def test_numbers_that_cannot_be_folded(name, value):
    constants = weights()
    constants[name][3] = value
    graph = graph_of(model(f"g ({X}) => ({Y}) {{ c = Conv(x, W) y = {BN} }}", **constants))
    result = FuseBatchNormIntoConv().apply(graph)
    assert result.rewrites == 0 and len(result.misses) == 1


def test_half_precision_weight_that_would_vanish():
    constants = {k: v.astype(np.float16) for k, v in weights().items()}
    constants["s"][3] = 1e-5
    graph = graph_of(
        model(f"g (float16[N,4,6,6] x) => (float16[N,6,h,w] y) {{ c = Conv(x, W) y = {BN} }}", **constants)
    )
    result = FuseBatchNormIntoConv().apply(graph)
    assert result.rewrites == 0 and "normal range" in result.misses[0].reason


def test_foreign_operator_of_the_same_name_is_left_alone():
    text = f"""<ir_version: 8, opset_import: ["" : 17, "ours" : 1]>
    g ({X}) => ({Y}) {{ c = ours.Conv(x, W) y = {BN} }}"""
    graph = graph_of(model(text, **weights()))
    assert FuseBatchNormIntoConv().apply(graph).rewrites == 0
