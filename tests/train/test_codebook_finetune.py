"""Tuning codebooks toward the float model: it helps, never hurts, keeps indices, and averages gradients as it says."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from onnxcompress import models
from onnxcompress.codebook.codebook import Choice
from onnxcompress.codebook.encoding import encode
from onnxcompress.codebook.layer import quantize_layer
from onnxcompress.codebook.layers import find_layers
from onnxcompress.codebook.sharing import Member, fit_shared
from onnxcompress.codebook.shaving import Shaving, shave
from onnxcompress.data import InputSpec, load_data
from onnxcompress.errors import QuantizationError
from onnxcompress.graph import Graph
from onnxcompress.model_io import load, to_proto
from onnxcompress.patterns.decoded_weights import find_codebooks
from onnxcompress.testing import relative_error, run
from onnxcompress.train.codebook_finetune import Student, TuneSettings, tune

SPEC = InputSpec("image", np.dtype(np.float32), ("batch", 1, 8, 8))


def feeds(source: str, limit: int) -> list[dict[str, np.ndarray]]:
    return [batch for batch, _ in load_data(source, inputs=[SPEC], limit=limit).batches(16)]


def quantized(codebook_type: str, *, codewords: int = 16, scaled: bool = True) -> Graph:
    """The digits model with a codebook in each layer that takes one, fitted without data."""
    graph = load(models.path("digits"))
    for layer in find_layers(graph)[0]:
        matrix = layer.matrix()
        block = 4 if matrix.shape[1] % 4 == 0 else 3
        if matrix.shape[1] % block or matrix.size // block < 4 * codewords:
            continue
        choice = Choice(block, codewords, codebook_type, scaled)
        made = quantize_layer(matrix, layer.bias(), None, choice, seed=0, method="em")
        encode(graph, layer, made)
    return graph


@pytest.mark.parametrize("codebook_type", ["float16", "int8"])
def test_tuning_brings_the_model_closer_on_samples_it_has_not_seen(codebook_type):
    graph = quantized(codebook_type)
    indices = [one.indices.values.copy() for one in find_codebooks(graph)]
    start = [one.codebook.values.copy() for one in find_codebooks(graph)]
    result = tune(
        graph,
        feeds("sklearn:digits:train", 128),
        feeds("sklearn:digits", 64),
        reference_model=models.path("digits"),
        settings=TuneSettings(steps=60),
    )
    assert result.after < 0.75 * result.before  # measured 0.41 and 0.37
    after = find_codebooks(graph)
    assert all(np.array_equal(a, one.indices.values) for a, one in zip(indices, after, strict=True))
    assert all(one.codebook.dtype.name == codebook_type for one in after)
    assert any(not np.array_equal(a, one.codebook.values) for a, one in zip(start, after, strict=True))
    # The file gives what was measured.
    proto, images = to_proto(graph), np.concatenate([feed["image"] for feed in feeds("sklearn:digits", 64)])
    onnx.checker.check_model(proto)
    a, b = run(onnx.load(models.path("digits")), {"image": images})[0], run(proto, {"image": images})[0]
    assert np.linalg.norm(a - b) / np.linalg.norm(a) < 2 * result.after
    assert (
        relative_error(b, Student(graph, after)({"image": torch.from_numpy(images)})["logits"].detach().numpy()) < 1e-5
    )


def sharing() -> Graph:
    """The digits model with one codebook for all layers that take it."""
    graph, choice = load(models.path("digits")), Choice(4, 128, "int8", scaled=True, shared=True)
    layers = [layer for layer in find_layers(graph)[0] if layer.length % 4 == 0]
    members = [Member(layer.matrix(), np.eye(layer.length)[None], 1.0) for layer in layers]
    shared = fit_shared(members, choice.block, choice.codewords, seed=0)
    for layer in layers:
        made = quantize_layer(layer.matrix(), layer.bias(), None, choice, seed=0, method="em", shared=shared)
        encode(graph, layer, made)
    return graph


def test_layers_that_share_a_codebook_share_it_still():
    graph = sharing()
    before = find_codebooks(graph)
    assert len(before) > 3 and len({one.codebook for one in before}) == 1
    counts = Student(graph, before).counts
    sizes = sum(one.indices.values.size * (2 if one.packed else 1) for one in before)
    assert [int(found.sum()) for found in counts.values()] == [sizes]
    start = before[0].codebook.values.copy()
    result = tune(
        graph,
        feeds("sklearn:digits:train", 128),
        feeds("sklearn:digits", 64),
        reference_model=models.path("digits"),
        settings=TuneSettings(steps=40),
    )
    assert result.after < 0.8 * result.before  # measured 0.36
    after = find_codebooks(graph)
    assert len({one.codebook for one in after}) == 1 and not np.array_equal(after[0].codebook.values, start)
    images = np.concatenate([feed["image"] for feed in feeds("sklearn:digits", 64)])
    a, plain = (run(proto, {"image": images})[0] for proto in (onnx.load(models.path("digits")), to_proto(graph)))
    shave(graph, Shaving.PACKED)
    packed = run(to_proto(graph), {"image": images})[0]
    assert np.linalg.norm(a - packed) / np.linalg.norm(a) < 2 * result.after
    assert relative_error(plain, packed) < 0.06  # biases and factors in one byte: measured 0.0193


def test_the_full_recipe_helps_too():
    graph = quantized("float16")
    result = tune(
        graph,
        feeds("sklearn:digits:train", 128),
        feeds("sklearn:digits", 64),
        reference_model=models.path("digits"),
        mode="full",
        settings=TuneSettings(steps=30, layer_steps=4),
    )
    assert result.after < result.before
    assert result.steps > 30


def test_a_rate_that_destroys_the_model_leaves_it_as_it_was():
    graph = quantized("float16")
    before = to_proto(graph).SerializeToString(deterministic=True)
    result = tune(
        graph,
        feeds("sklearn:digits:train", 32),
        feeds("sklearn:digits", 32),
        reference_model=models.path("digits"),
        settings=TuneSettings(steps=5, rate=1.0),
    )
    assert result.after == result.before and result.changed == []
    assert to_proto(graph).SerializeToString(deterministic=True) == before


def test_the_same_seed_gives_the_same_bytes():
    made = []
    for _ in range(2):
        graph = quantized("int8")
        tune(
            graph,
            feeds("sklearn:digits:train", 32),
            [],
            reference_model=models.path("digits"),
            settings=TuneSettings(steps=6, seed=3),
        )
        made.append(to_proto(graph).SerializeToString(deterministic=True))
    assert made[0] == made[1]


def test_gradients_are_averaged_over_the_sub_vectors_of_a_codeword():
    graph = quantized("float16", scaled=False)
    student = Student(graph, find_codebooks(graph))
    one = student.codebooks[0]
    name = str(one.codebook.name)
    found = student({"image": torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))})
    found["logits"].square().sum().backward()
    summed = student.parameter_of(name).grad.clone()
    student.average_gradients(0)
    counts = np.bincount(one.indices.values.reshape(-1), minlength=16)
    assert counts.sum() == one.indices.values.size and counts.max() > 1
    expected = summed.numpy() / np.maximum(counts, 1)[:, None]
    assert np.allclose(student.parameter_of(name).grad.numpy(), expected, rtol=1e-6)


def test_nothing_to_tune_is_an_error():
    with pytest.raises(QuantizationError, match="no codebook"):
        tune(load(models.path("digits")), feeds("sklearn:digits", 16), [], reference_model=models.path("digits"))
    with pytest.raises(QuantizationError, match="needs samples"):
        tune(quantized("float16"), [], [], reference_model=models.path("digits"))
