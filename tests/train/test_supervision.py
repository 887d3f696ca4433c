"""Which output is learned and judged where nothing is said."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcompress.data import Dataset
from onnxcompress.errors import RecipeError
from onnxcompress.model_io import load
from onnxcompress.shapes import infer_shapes
from onnxcompress.testing import model
from onnxcompress.train.batches import Batches
from onnxcompress.train.supervision import Wishes, make_teacher, supervise
from onnxcompress.train.torch_graph import TorchGraph

RNG = np.random.default_rng(0)
TEXT = "g (float[N,4] x) => ({outputs}) {{ ids = ArgMax<axis=1>(x)  y = MatMul(x, w)  z = Softmax(y) }}"


def judged_output(outputs, **wishes):
    graph = load(model(TEXT.format(outputs=outputs), w=RNG.normal(size=(4, 3)).astype(np.float32)))
    infer_shapes(graph)
    twin, teacher = TorchGraph(graph), TorchGraph(graph, trainable=lambda name: False)
    samples = [{"x": row} for row in RNG.normal(size=(8, 4)).astype(np.float32)]
    batches = Batches(Dataset(samples, None, "here"), 4)
    found = supervise(twin, batches, batches, make_teacher(teacher, twin), Wishes(distill=True, **wishes))
    assert found.metric is not None
    return found.output, found.metric.name


def test_integers_in_front_are_not_what_is_judged():
    """A tokenizer's ids that a model hands through agree with themselves whatever becomes of the weights."""
    assert judged_output("int64[N,1] ids, float[N,3] y, float[N,3] z") == ("y", "agreement")
    assert judged_output("float[N,3] z, float[N,3] y, int64[N,1] ids") == ("z", "agreement")
    assert judged_output("int64[N,1] ids, float[N,3] y", output="ids")[0] == "ids"


def test_an_output_that_is_not_there():
    with pytest.raises(RecipeError, match="output 'q': the model has 'ids', 'y'"):
        judged_output("int64[N,1] ids, float[N,3] y", output="q")
