"""Two models on onnxruntime: what is allowed, and what is not."""

import numpy as np
import onnx
import pytest

from onnxcompress.errors import ModelError, RuntimeFailure
from onnxcompress.runtime import Runtime
from onnxcompress.testing import model
from onnxcompress.validation.equivalence import (
    LoweredModel,
    Reference,
    Sensitivity,
    compare,
    for_runtime,
    read_model,
    run_model,
    runtime_ir_version,
)
from onnxcompress.validation.randomness import random_outputs

X = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
FEEDS = [{"x": X}, {"x": X[:2]}]


@pytest.fixture(scope="module")
def runtime():
    with Runtime(timeout_s=60) as it:
        yield it


def f(nodes, outputs="float[N,8] y"):
    return f"g (float[N,8] x) => ({outputs}) {{ {nodes} }}"


def scaled(factor):
    return model(f("y = Mul(x, k)"), k=np.float32(factor))


def test_the_same_model(runtime):
    comparison = compare(scaled(2), scaled(2), FEEDS, runtime)
    assert comparison.equivalent
    assert comparison.relative == 0
    assert comparison.feeds == 2


@pytest.mark.parametrize(("factor", "equivalent"), [(2 * (1 + 5e-6), True), (2 * (1 + 2e-5), False)])
def test_the_tolerance(runtime, factor, equivalent):
    comparison = compare(scaled(2), scaled(factor), FEEDS, runtime, tolerance=1e-5)
    assert comparison.equivalent is equivalent
    if not equivalent:
        # 1.99e-5 and not 2e-5: 2 * (1 + 2e-5) is rounded to float32
        assert comparison.message() == "output 'y': max|d| / max|y| = 2.0e-05, allowed 1e-05"


def test_every_feed_counts(runtime):
    split = model(
        f("m = ReduceMax<keepdims=0>(x)  c = Less(m, k)  a = Where(c, one, two)  y = Mul(x, a)"),
        k=np.float32(X[:2].max() + 0.01),
        one=np.float32(1),
        two=np.float32(2),
    )
    assert X.max() > X[:2].max() + 0.01
    assert not compare(scaled(1), split, FEEDS, runtime).equivalent
    assert compare(scaled(1), split, FEEDS[1:], runtime).equivalent


FLOOR = f("a = Mul(x, k)  y = Floor(a)")
TIES = {"x": np.round(X * 4) / 4}


def test_an_unstable_output_may_move_as_far_as_by_itself(runtime):
    before = model(FLOOR, k=np.float32(4))
    after = model(f("a = Mul(x, k)  b = Sub(a, e)  y = Floor(b)"), k=np.float32(4), e=np.float32(1e-6))
    strict = compare(before, after, [TIES], runtime, allowance=False)
    assert not strict.equivalent
    comparison = compare(before, after, [TIES], runtime)
    assert comparison.equivalent
    found = comparison.outputs[0]
    assert found.allowed == pytest.approx(2 * found.relative)
    assert "when its inputs change by 1e-06" in comparison.message()
    wrong = model(f("a = Mul(x, k)  b = Sub(a, e)  y = Floor(b)"), k=np.float32(4), e=np.float32(3))
    assert not compare(before, wrong, [TIES], runtime).equivalent


def test_a_stable_output_may_not(runtime):
    after = model(f("a = Mul(x, k)  b = Sub(a, e)  y = Floor(b)"), k=np.float32(4), e=np.float32(0.5))
    assert not compare(model(FLOOR, k=np.float32(4)), after, [{"x": X}], runtime).equivalent


def test_classes_of_ties_may_move_too(runtime):
    text = f("a = Mul(x, k)  y = ArgMax<axis=1, keepdims=0>(a)", "int64[N] y")
    before = model(text, k=np.float32(1))
    after = model(text, k=(1 + 1e-6 * np.arange(8)).astype(np.float32))
    tied = [{"x": np.ones((64, 8), np.float32)}]
    assert not compare(before, after, tied, runtime, allowance=False).equivalent
    assert compare(before, after, tied, runtime).equivalent
    distinct = [{"x": np.random.default_rng(1).permutation(64 * 8).reshape(64, 8).astype(np.float32)}]
    shifted = model(text, k=np.linspace(1, 2, 8, dtype=np.float32))
    assert not compare(before, shifted, distinct, runtime).equivalent


def test_a_wrong_default_optimization_of_onnxruntime_allows_nothing(runtime):
    """onnxruntime moves a Pad with 0 into MaxPool, which pads with minus infinity: its own error is no excuse."""
    before = model(
        "g (float[1,1,8,8] x) => (float[1,1,A,B] y) { p = Pad(x, k)  y = MaxPool<kernel_shape=[3,3]>(p) }",
        k=np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    )
    after = model("g (float[1,1,8,8] x) => (float[1,1,A,B] y) { y = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(x) }")
    feeds = [{"x": -1 - np.abs(X[:, :8]).repeat(2, 0).reshape(1, 1, 8, 8)}]
    reference = Reference(before, feeds, runtime)
    assert not reference.compare(after).equivalent
    own = reference.sensitivity["y"]
    assert own.optimized > 0.5
    assert own.perturbed < 1e-5
    assert own.noise < 1e-5


def test_noise_of_the_optimization_is_believed_up_to_a_point():
    assert Sensitivity(optimized=5e-3, perturbed=1e-6).noise == 5e-3
    assert Sensitivity(optimized=0.5, perturbed=1e-6).noise == 1e-6
    assert Sensitivity(optimized=0.5, perturbed=0.1).noise == 0.5


def test_float16_cannot_be_compared_more_finely_than_its_step(runtime):
    text = "g (float[N,8] x) => (float16[N,8] y) { a = Mul(x, k)  y = Cast<to=10>(a) }"
    comparison = compare(
        model(text, k=np.float32(1)), model(text, k=np.float32(1.0003)), FEEDS, runtime, tolerance=1e-5
    )
    assert 0 < comparison.relative <= 2**-10
    assert comparison.equivalent
    assert not compare(model(text, k=np.float32(1)), model(text, k=np.float32(1.01)), FEEDS, runtime).equivalent


def test_nan_in_both_is_equal_and_in_one_is_not(runtime):
    log = model(f("y = Log(x)"))
    assert compare(log, log, FEEDS, runtime).equivalent
    other = model(f("a = Abs(x)  y = Log(a)"))
    assert "expected nan" in compare(log, other, FEEDS, runtime).message()


@pytest.mark.parametrize(
    ("nodes", "outputs", "message"),
    [
        ("y = Transpose(x)", "float[8,N] y", "output 'y': shape 8x4, expected 4x8"),
        ("y = Cast<to=11>(x)", "double[N,8] y", "output 'y': type float64, expected float32"),
        ("y = Identity(x)  z = Neg(x)", "float[N,8] y, float[N,8] z", "2 outputs, expected 1"),
    ],
)
def test_another_shape_type_or_count(runtime, nodes, outputs, message):
    comparison = compare(scaled(1), model(f(nodes, outputs)), FEEDS, runtime)
    assert not comparison.equivalent
    assert comparison.message() == message


def test_a_candidate_that_does_not_run_is_a_finding(runtime):
    broken = model(f("y = Reshape(x, s)"), s=np.array([3, 8]))
    comparison = compare(scaled(1), broken, FEEDS, runtime)
    assert not comparison.equivalent
    assert comparison.message().startswith("the candidate does not run: ")
    with pytest.raises(RuntimeFailure):
        compare(broken, scaled(1), FEEDS, runtime)


def test_one_wrong_integer_is_too_many(runtime):
    text = """g (float[N,8] x) => (int64[A] y) {
        s = Shape(x)  t = Sub(s, s)  u = Cast<to=7>(W)  v = Gather(t, k)  y = Add(u, v) }"""
    before = model(text, W=np.zeros(200_000, np.float32), k=np.array([0]))
    after = model(text, W=np.eye(1, 200_000, dtype=np.float32)[0], k=np.array([0]))
    comparison = compare(before, after, FEEDS, runtime, tolerance=1e-5)
    assert comparison.outputs[0].mismatches == 5e-6
    assert not comparison.equivalent


def test_sequences_are_compared(runtime):
    text = "g (float[N,8] x) => (seq(float[M,4]) y) { a = Mul(x, k)  y = SplitToSequence<axis=1>(a, four) }"
    before, after = (model(text, k=np.float32(k), four=np.array([4, 4])) for k in (1, 1.5))
    assert compare(before, before, FEEDS, runtime).equivalent
    assert compare(before, after, FEEDS, runtime).outputs[0].relative == pytest.approx(0.5)


NOISE = "n = RandomNormalLike<seed=1.0>(x)  y = Add(x, n)"
OTHER_NOISE = NOISE.replace("1.0", "2.0")
BESIDE = "float[N,8] y, float[N,8] z"


def test_a_random_output_is_compared_by_shape_and_type(runtime):
    before = model(f(NOISE + "  z = Mul(x, k)", BESIDE), k=np.float32(2))
    after = model(f(OTHER_NOISE + "  z = Mul(x, k)", BESIDE), k=np.float32(2))
    comparison = compare(before, after, FEEDS, runtime)
    assert comparison.equivalent
    assert comparison.outputs[0].unchecked == "the model is random"
    assert comparison.outputs[1].unchecked is None
    assert comparison.message().endswith("1 compared by shape only: the model is random")


def test_beside_a_random_output_everything_is_compared(runtime):
    before = model(f(NOISE + "  z = Mul(x, k)", BESIDE), k=np.float32(2))
    after = model(f(OTHER_NOISE + "  z = Mul(x, k)", BESIDE), k=np.float32(3))
    assert [output.equivalent for output in compare(before, after, FEEDS, runtime).outputs] == [True, False]
    narrow = model(f(NOISE.replace("y =", "m =") + "  y = ReduceMax<axes=[1]>(m)", "float[N,1] y"))
    assert compare(model(f(NOISE)), narrow, FEEDS, runtime).message() == "output 'y': shape 4x1, expected 4x8"


@pytest.mark.parametrize(
    ("text", "random"),
    [
        (f(NOISE), {"y"}),
        (f("y = Bernoulli(x)"), {"y"}),
        (f("y = Dropout(x)"), set()),
        (f("t = Constant<value = bool {0}>()  y = Dropout(x, , t)"), set()),
        (f("t = Constant<value = bool {1}>()  y = Dropout(x, , t)"), {"y"}),
        (f("n = RandomNormalLike(x)  s = Shape(n)  y = Relu(x)", "float[N,8] y, int64[2] s"), {"s"}),
        (
            """g (float[N,8] x, bool c) => (float[N,8] y, float[N,8] z) { z = Neg(x)
            y = If(c) <then_branch = t () => (float[N,8] a) { a = RandomNormalLike(x) },
                       else_branch = e () => (float[N,8] b) { b = Identity(x) }> }""",
            {"y"},
        ),
        (
            """g (float[N,8] x, bool c) => (float[N,8] y) { r = RandomNormalLike(x)
            y = If(c) <then_branch = t () => (float[N,8] a) { a = Identity(r) },
                       else_branch = e () => (float[N,8] b) { b = Identity(x) }> }""",
            {"y"},
        ),
        (
            """<ir_version: 8, opset_import: ["": 17, "local": 1]>
            g (float[N,8] x) => (float[N,8] y, float[N,8] z) { y = local.noisy(x)  z = local.plain(x) }
            <domain: "local", opset_import: ["": 17]> noisy (a) => (b) { n = RandomNormalLike(a)  b = Add(a, n) }
            <domain: "local", opset_import: ["": 17]> plain (a) => (b) { b = Neg(a) }""",
            {"y"},
        ),
    ],
)
def test_random_outputs(text, random):
    assert random_outputs(model(text)) == random


def test_a_reference_is_run_once(runtime):
    calls = []

    class Counting:
        def run(self, source, feeds, **options):
            calls.append(source)
            return runtime.run(source, feeds, **options)

    reference = Reference(scaled(1), FEEDS, Counting())
    assert reference.compare(scaled(1)).equivalent
    assert reference.compare(scaled(1 + 1e-6)).equivalent
    assert len(calls) == 3
    known = Reference(scaled(1), FEEDS, Counting(), outputs=[[feed["x"]] for feed in FEEDS])
    assert known.compare(scaled(1)).equivalent
    assert len(calls) == 4


@pytest.mark.parametrize("external", [False, True])
def test_a_model_that_is_too_new_for_onnxruntime(runtime, tmp_path, external):
    proto = scaled(2)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.full(8, 2, np.float32), "k"))
    proto.ir_version = 14
    path = tmp_path / "sub" / "m.onnx"
    path.parent.mkdir()
    onnx.save(proto, path, save_as_external_data=external, location="weights.bin", size_threshold=0)
    with pytest.raises(RuntimeFailure):
        runtime.run(path, FEEDS)
    lowered = for_runtime(path)
    assert isinstance(lowered, LoweredModel)
    assert onnx.load_from_string(lowered).ir_version == runtime_ir_version()
    assert onnx.load_from_string(lowered).opset_import == proto.opset_import
    np.testing.assert_array_equal(run_model(runtime, path, FEEDS)[0][0], X * 2)
    np.testing.assert_array_equal(run_model(runtime, lowered, FEEDS)[0][0], X * 2)
    assert compare(path, path, FEEDS, runtime).equivalent


def test_other_models_are_given_as_they_are(tmp_path):
    proto = scaled(2)
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    assert for_runtime(path) == path
    assert for_runtime(proto) == proto.SerializeToString()
    assert for_runtime(proto.SerializeToString()) == proto.SerializeToString()
    proto.ir_version = 14
    assert onnx.load_from_string(for_runtime(proto)).ir_version == runtime_ir_version()
    assert proto.ir_version == 14


def test_external_data_stay_on_disk(tmp_path):
    proto = model(f("y = Add(x, W)"), W=np.ones((8,), np.float32))
    path = tmp_path / "m.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert not read_model(path).graph.initializer[0].raw_data


@pytest.mark.parametrize(("content", "message"), [(None, "cannot read"), (b"no model", "is no ONNX model")])
def test_unreadable_models(tmp_path, content, message):
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    for read in (read_model, for_runtime):
        with pytest.raises(ModelError, match=message):
            read(path)
