"""Linear probes: what a block adds for them is its importance."""

from __future__ import annotations

import builtins
from pathlib import Path

import numpy as np
import pytest

from onnxcompress.data import load_data
from onnxcompress.errors import DataError, ModelError
from onnxcompress.model_io import load, to_proto
from onnxcompress.runtime import Runtime
from onnxcompress.shapes import infer_shapes
from onnxcompress.testing import graph_of, model, run
from onnxcompress.train.depth.blocks import Block, find_blocks
from onnxcompress.train.depth.preparation import prepare
from onnxcompress.train.scale.probes import probe_accuracy, probe_features, rank_by_probes
from onnxcompress.validation.judge import input_specs

MODELS = Path(__file__).parents[3] / "models"


@pytest.fixture(scope="module")
def runtime():
    with Runtime() as made:
        yield made


def block(name: str, source: str, output: str) -> Block:
    return Block(name, "residual", source, output, (name,), name)


# The first block adds a channel that tells the class; the second one adds noise of the image to nothing.
TWO_BLOCKS = """g (float[N,2,4,4] x, float[N,2,1,1] c) => (float[N,2] y) {
    a = Mul(x, small)  b = Add(a, c)  d = Mul(b, small)  e = Add(b, d)  m = GlobalAveragePool(e)  y = Flatten(m) }"""


def two_blocks():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    graph = graph_of(model(TWO_BLOCKS, small=np.array([0.1], np.float32)))
    samples = [
        {
            "x": rng.normal(size=(2, 4, 4)).astype(np.float32),
            "c": np.float32([[[label]], [[-label]]]),
        }
        for label in labels
    ]
    return graph, samples, labels, [block("b", "a", "b"), block("e", "b", "e")]


def test_a_block_that_tells_the_class_is_important_and_one_that_scales_is_not(runtime):
    graph, samples, labels, blocks = two_blocks()
    found = rank_by_probes(graph, blocks, samples, labels, runtime=runtime)
    assert found["b"] > 0.3 and abs(found["e"]) < 0.02  # from chance to all right, and not at all


def test_features_are_means_over_space(runtime):
    graph, samples, _, _ = two_blocks()
    features, classes = probe_features(graph, ["a", "e"], samples[:70], True, runtime)
    x = np.stack([sample["x"] for sample in samples[:70]])
    c = np.stack([sample["c"] for sample in samples[:70]])
    np.testing.assert_allclose(features["a"], x.mean((2, 3)) * 0.1, atol=1e-6)
    (y,) = run(to_proto(graph), {"x": x, "c": c})
    np.testing.assert_allclose(features["e"], y, atol=1e-6)
    assert np.array_equal(classes, y.argmax(1))


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("g (float[N,5,3] x) => (float[N,5,3] y) { a = Relu(x)  y = LayerNormalization<axis=-1>(a, s) }", 1),
        ("g (float[N,4,5,3] x) => (float[N,4,5,3] y) { a = Relu(x)  y = LayerNormalization<axis=-1>(a, s) }", (1, 2)),
        ("g (float[N,3,4,5] x) => (float[N,4,5,3] y) { a = Relu(x)  y = Transpose<perm=[0,2,3,1]>(a) }", (2, 3)),
        ("g (float[N,4,5,3] x) => (float[N,3,4,5] y) { a = Relu(x)  y = Transpose<perm=[0,3,1,2]>(a) }", (1, 2)),
        ("g (float[N,3] x) => (float[N,3] y) { a = Relu(x)  y = Neg(a) }", ()),
    ],
)
@pytest.mark.parametrize("opset", [17, 18])
def test_which_axes_are_space(text, axes, opset, runtime):
    graph = graph_of(model(text, opset=opset, s=np.ones(3, np.float32)))
    x = np.random.default_rng(0).normal(size=(6, *graph.inputs[0].shape[1:])).astype(np.float32)
    features, _ = probe_features(graph, ["a"], [{"x": one} for one in x], runtime=runtime)
    expected = np.maximum(x, 0)
    np.testing.assert_allclose(features["a"], expected.mean(axes) if axes != () else expected, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet20", "convnext_mini", "deit_mini"])
def test_digits_models(name, runtime):
    graph = prepare(load(MODELS / f"{name}_digits.onnx"), runtime=runtime)
    blocks = [found for found in find_blocks(graph)[0] if found.deletable]
    data = load_data("sklearn:digits:train", inputs=input_specs(to_proto(graph)))
    found = rank_by_probes(graph, blocks, data.samples, data.labels, limit=400, runtime=runtime)
    assert set(found) == {one.name for one in blocks} and len(found) >= 3
    assert all(-1 <= value <= 1 for value in found.values()) and max(found.values()) > 0.01
    again = rank_by_probes(graph, blocks, data.samples, data.labels, limit=400, runtime=runtime)
    assert again == found
    assert rank_by_probes(graph, blocks, data.samples, data.labels, limit=400, seed=1, runtime=runtime) != found


def test_without_labels_the_network_teaches(runtime):
    graph = prepare(load(MODELS / "resnet20_digits.onnx"), runtime=runtime)
    blocks = [found for found in find_blocks(graph)[0] if found.deletable]
    data = load_data("sklearn:digits:train", inputs=input_specs(to_proto(graph)))
    x = np.stack([sample["image"] for sample in data.samples])
    taught = run(to_proto(graph), {"image": x})[0].argmax(1)
    wanted = rank_by_probes(graph, blocks, data.samples, taught, limit=300, runtime=runtime)
    assert rank_by_probes(graph, blocks, data.samples, limit=300, runtime=runtime) == wanted


def test_accuracy_is_held_out():
    rng = np.random.default_rng(0)
    features, classes = rng.normal(size=(200, 190)), rng.integers(0, 2, 200)
    fitted, judged = np.arange(150), np.arange(150, 200)
    assert probe_accuracy(features, classes, fitted, fitted) == 1.0
    assert probe_accuracy(features, classes, fitted, judged) < 0.75


def test_what_cannot_be_probed_is_refused(runtime):
    graph, samples, labels, blocks = two_blocks()
    with pytest.raises(DataError, match="some of two classes are needed"):
        rank_by_probes(graph, blocks, samples[:2], labels[:1].repeat(2), runtime=runtime)
    with pytest.raises(DataError, match="one class for each sample"):
        rank_by_probes(graph, blocks, samples, labels.astype(np.float32), runtime=runtime)
    with pytest.raises(ModelError, match="'nothing' is no tensor"):
        rank_by_probes(graph, [block("b", "nothing", "b")], samples, labels, runtime=runtime)
    fixed = model(TWO_BLOCKS.replace("N", "4"), small=np.array([0.1], np.float32))
    with pytest.raises(ModelError, match="4 samples at a time"):
        rank_by_probes(graph_of(fixed), blocks, samples, labels, runtime=runtime)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch, runtime):
    graph, samples, labels, blocks = two_blocks()
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(DataError, match=r"pip install onnxcompress\[data\]"):
        rank_by_probes(graph, blocks, samples, labels, runtime=runtime)


def test_the_graph_is_left_alone(runtime):
    graph, samples, labels, blocks = two_blocks()
    before = to_proto(graph)
    rank_by_probes(graph, blocks, samples, labels, runtime=runtime)
    assert to_proto(graph) == before
    infer_shapes(graph)
