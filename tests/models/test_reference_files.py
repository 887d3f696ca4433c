"""The trained reference files: interface, structure, accuracy, and that each is its architecture with these weights."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnxcompress import models
from onnxcompress.data import InputSpec, load_data

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
PREFIX = "onnxcompress.export."

SIZE = {"digits": 8, "fashion_mnist": 28}
MAX_BYTES = {"digits": 150_000, "fashion_mnist": 1_120_000}
# What a file must reach on the test part; what it reached when it was made stands in its properties.
MIN_ACCURACY = {
    "resnet20_digits": 0.985,
    "mobilenetv2_mini_digits": 0.985,
    "convnext_mini_digits": 0.975,
    "deit_mini_digits": 0.955,
    "densenet_mini_digits": 0.985,
    "resnet20_fashion_mnist": 0.935,
    "mobilenetv2_mini_fashion_mnist": 0.915,
    "convnext_mini_fashion_mnist": 0.91,
    "deit_mini_fashion_mnist": 0.875,
    "densenet_mini_fashion_mnist": 0.915,
}
# Operators of the blocks that later work on these files rests on, how often.
OPERATORS = {
    "resnet20_digits": {"Conv": 21, "BatchNormalization": 21, "Relu": 19, "Add": 9},
    "mobilenetv2_mini_digits": {"Conv": 25, "BatchNormalization": 25, "Clip": 17, "Add": 6},
    "convnext_mini_digits": {"Conv": 8, "LayerNormalization": 9, "MatMul": 12, "Erf": 6},
    "deit_mini_digits": {"MatMul": 24, "Softmax": 4, "LayerNormalization": 9, "Erf": 4},
    "densenet_mini_digits": {"Conv": 18, "BatchNormalization": 18, "Concat": 8, "AveragePool": 1},
    "resnet20_fashion_mnist": {"Conv": 21, "BatchNormalization": 21, "Relu": 19, "Add": 9},
    "mobilenetv2_mini_fashion_mnist": {"Conv": 25, "BatchNormalization": 25, "Clip": 17, "Add": 5},
    "convnext_mini_fashion_mnist": {"Conv": 8, "LayerNormalization": 9, "MatMul": 12, "Erf": 6},
    "deit_mini_fashion_mnist": {"MatMul": 36, "Softmax": 6, "LayerNormalization": 13, "Erf": 6},
    "densenet_mini_fashion_mnist": {"Conv": 39, "BatchNormalization": 39, "Concat": 18, "AveragePool": 2},
}
STEMS = sorted({path.stem for path in (ROOT / "models").glob("*.onnx")} - {"digits"})


def data_of(stem):
    return next(data for data in SIZE if stem.endswith(data))


def spec_of(stem):
    size = SIZE[data_of(stem)]
    return InputSpec("image", np.dtype(np.float32), ("batch", 1, size, size))


def open_session(stem):
    return ort.InferenceSession(models.path(stem), providers=["CPUExecutionProvider"])


def measure_accuracy(stem, data):
    session = open_session(stem)
    batches = data.batches(500)
    return sum(int((session.run(["logits"], feeds)[0].argmax(1) == labels).sum()) for feeds, labels in batches) / len(
        data
    )


def properties(stem):
    return {entry.key: entry.value for entry in onnx.load(models.path(stem)).metadata_props}


def test_each_network_is_there_on_digits_and_none_is_unknown():
    assert {stem for stem in OPERATORS if data_of(stem) == "digits"} <= set(STEMS) <= set(OPERATORS)


@pytest.mark.parametrize("stem", STEMS)
def test_file_and_interface(stem):
    proto, size = onnx.load(models.path(stem)), SIZE[data_of(stem)]
    onnx.checker.check_model(proto, full_check=True)
    assert models.path(stem).stat().st_size < MAX_BYTES[data_of(stem)]
    ops = [node.op_type for node in proto.graph.node]
    assert {op: ops.count(op) for op in OPERATORS[stem]} == OPERATORS[stem]
    session = open_session(stem)
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [
        ("image", "tensor(float)", ["batch", 1, size, size])
    ]
    assert [(o.name, o.type, o.shape) for o in session.get_outputs()] == [("logits", "tensor(float)", ["batch", 10])]
    for batch in (1, 3):
        assert session.run(None, {"image": np.zeros((batch, 1, size, size), np.float32)})[0].shape == (batch, 10)


@pytest.mark.parametrize("stem", STEMS)
def test_properties_hold_accuracy_and_command(stem):
    kept, data = properties(stem), data_of(stem)
    assert float(kept[PREFIX + "test_accuracy"]) >= MIN_ACCURACY[stem]
    assert kept[PREFIX + "test_samples"] == {"digits": "599", "fashion_mnist": "10000"}[data]
    name = stem.removesuffix(f"_{data}")
    assert kept[PREFIX + "command"] == f"python tools/train_reference.py {name} --data {data.replace('_', '-')}"


@pytest.mark.parametrize("stem", [stem for stem in STEMS if data_of(stem) == "digits"])
def test_accuracy_on_digits_is_the_stated_one(stem):
    pytest.importorskip("sklearn")
    accuracy = measure_accuracy(stem, load_data("sklearn:digits", inputs=[spec_of(stem)]))
    # One image may fall the other way with other kernels.
    assert abs(accuracy - float(properties(stem)[PREFIX + "test_accuracy"])) <= 1.1 / 599


@pytest.fixture(scope="module")
def fashion_mnist(tmp_path_factory):
    from prepare_fashion_mnist import SOURCE, read_part

    if not SOURCE.is_dir():
        pytest.skip(f"{SOURCE} does not exist: apt install dataset-fashion-mnist")
    images, labels = read_part(SOURCE, "t10k")
    path = tmp_path_factory.mktemp("fashion") / "test.npz"
    np.savez(path, image=images, labels=labels)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("stem", [stem for stem in STEMS if data_of(stem) == "fashion_mnist"])
def test_accuracy_on_fashion_mnist_is_the_stated_one(stem, fashion_mnist):
    accuracy = measure_accuracy(stem, load_data(str(fashion_mnist), inputs=[spec_of(stem)]))
    assert abs(accuracy - float(properties(stem)[PREFIX + "test_accuracy"])) <= 3 / 10_000


@pytest.mark.parametrize("stem", STEMS)
def test_file_is_the_architecture_with_its_weights(stem):
    torch = pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    from train_reference import RECIPES

    data = data_of(stem)
    recipe = RECIPES[data.replace("_", "-")][stem.removesuffix(f"_{data}")]
    net = recipe.build(**recipe.settings).eval()
    proto = onnx.load(models.path(stem))
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    state = {name: torch.from_numpy(array.copy()) for name, array in weights.items() if name in net.state_dict()}
    missing, _ = net.load_state_dict(state, strict=False)
    assert all(name.endswith("num_batches_tracked") for name in missing)
    images = np.random.default_rng(0).random((4, *spec_of(stem).shape[1:]), np.float32)
    with torch.no_grad():
        expected = net(torch.from_numpy(images)).numpy()
    (logits,) = open_session(stem).run(None, {"image": images})
    assert np.abs(logits - expected).max() / np.abs(expected).max() <= 5e-6  # measured 1.0e-6


def test_table_is_made_from_the_files():
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    from train_reference import table

    assert (ROOT / "models" / "README.md").read_text() == table(ROOT / "models")
