"""Reading IDX files, the seeded split, and that `onnxcompress.data` takes what is written."""

from __future__ import annotations

import gzip
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from onnxcompress.data import InputSpec, load_data

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "prepare_fashion_mnist.py"
SPEC = InputSpec("image", np.dtype(np.float32), ("batch", 1, 28, 28))
TRAIN, TEST, CLASSES = 6000, 20, 10


def write_idx(path, array):
    content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content, 1))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Files like the package's, a tenth as many; pixel (0, 0) and (0, 1) hold the index of the image."""
    folder = tmp_path_factory.mktemp("package")
    generator = np.random.default_rng(0)
    for part, count in (("train", TRAIN), ("t10k", TEST)):
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 0, 0], images[:, 0, 1] = np.divmod(np.arange(count), 256)
        labels = generator.permutation(np.arange(count) % CLASSES).astype(np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
        np.save(folder / f"{part}.npy", labels)
    return folder


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)


def read(path):
    data = load_data(str(path), inputs=[SPEC])
    ((feeds, labels),) = data.batches(len(data))
    return feeds["image"], labels


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "data"
    done = run(folder, "--source", source)
    assert done.returncode == 0, done.stderr
    return {name: read(folder / f"{name}.npz") for name in ("train", "val", "test")}


def indices(images):
    pixels = np.rint(images[:, 0, 0, :2] * 255).astype(int)
    return pixels[:, 0] * 256 + pixels[:, 1]


def test_arrays_fit_the_model(written):
    assert {name: len(labels) for name, (_, labels) in written.items()} == {"train": 1000, "val": 5000, "test": TEST}
    for images, labels in written.values():
        assert images.shape[1:] == (1, 28, 28) and images.dtype == np.float32 and labels.dtype == np.int64
        assert images.min() == 0 and images.max() <= 1


def test_split_is_stratified_disjoint_and_keeps_labels(source, written):
    assert np.bincount(written["val"][1]).tolist() == [500] * CLASSES
    train, val = indices(written["train"][0]), indices(written["val"][0])
    assert sorted([*train, *val]) == list(range(TRAIN))
    labels = np.load(source / "train.npy")
    assert np.array_equal(labels[train], written["train"][1]) and np.array_equal(labels[val], written["val"][1])
    assert indices(written["test"][0]).tolist() == list(range(TEST))


def test_split_is_seeded(source, written, tmp_path):
    assert run(tmp_path, "--source", source).returncode == 0
    assert np.array_equal(read(tmp_path / "val.npz")[0], written["val"][0])


def test_missing_package_is_one_line(tmp_path):
    done = run(tmp_path / "out", "--source", tmp_path / "nowhere")
    assert done.returncode == 1
    assert done.stderr == f"{tmp_path / 'nowhere'} does not exist: apt install dataset-fashion-mnist\n"
    assert not (tmp_path / "out").exists()


def test_damaged_file_is_named(source, tmp_path):
    for file in source.glob("*.gz"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damaged = tmp_path / "train-labels-idx1-ubyte.gz"
    damaged.write_bytes(gzip.compress(gzip.decompress(damaged.read_bytes())[:-1]))
    done = run(tmp_path / "out", "--source", tmp_path)
    assert done.returncode == 1 and f"{damaged} is no IDX file" in done.stderr
