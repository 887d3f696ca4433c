"""Small models of every kind that deploy tells apart."""

import numpy as np
import pytest

from onnxcompress import models
from onnxcompress.codebook.codebook import Choice, QuantizedLayer, index_type
from onnxcompress.codebook.encoding import encode
from onnxcompress.codebook.layers import find_layers
from onnxcompress.model_io import load, save
from onnxcompress.testing import model

CONV = "g (float[N,32,6,6] x) => (float[N,64,6,6] y) { c = Conv<pads = [1,1,1,1]>(x, W, b)  y = Relu(c) }"


def codebook_model(path, *, codewords=256, opset=17, ir_version=8):
    """A Conv whose weight is stored as indices: 73,728 bytes where it is decoded."""
    rng = np.random.default_rng(0)
    weights = {"W": rng.normal(size=(64, 32, 3, 3)).astype(np.float32), "b": rng.normal(size=64).astype(np.float32)}
    graph = load(model(CONV, opset=opset, ir_version=ir_version, **weights))
    [layer], _ = find_layers(graph)
    choice = Choice(3, codewords)
    codebook = rng.normal(size=(codewords, 3)).astype(np.float16)
    indices = rng.integers(0, codewords, (64, 96)).astype(index_type(codewords))
    encode(graph, layer, QuantizedLayer(choice, codebook, None, indices, None, None, 0.0, None))
    save(graph, path)
    return path


@pytest.fixture
def digits(tmp_path):
    path = tmp_path / "digits.onnx"
    path.write_bytes(models.path("digits").read_bytes())
    return path


@pytest.fixture
def codebooks(tmp_path):
    return codebook_model(tmp_path / "codebooks.onnx")
