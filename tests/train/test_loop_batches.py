"""Batches: a function of seed and step, shared out among processes, checked before training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from onnxcompress.data import Dataset
from onnxcompress.errors import DataError, RecipeError
from onnxcompress.train.batches import Augment, Batches
from onnxcompress.train.parallel import World

IMAGES = np.random.default_rng(0).normal(size=(23, 1, 4, 5)).astype(np.float32)


def dataset(images=IMAGES, labels=None, **more) -> Dataset:
    return Dataset([{"image": image} for image in images], labels, "here", **more)


def rows(batches: Batches, step: int) -> list[int]:
    """Which samples a step has, by their labels."""
    return [row for batch in batches.at(step) for row in batch.labels.tolist()]


@pytest.mark.parametrize("memory_bytes", [1 << 20, 0])  # read at once, or by step
def test_an_epoch_is_a_permutation(memory_bytes):
    batches = Batches(dataset(labels=np.arange(23)), 5, seed=3, memory_bytes=memory_bytes)
    assert batches.steps_per_epoch == 4
    epochs = [[rows(batches, 4 * epoch + step) for step in range(4)] for epoch in range(2)]
    for epoch in epochs:
        assert len({row for step in epoch for row in step}) == 20
    assert epochs[0] != epochs[1]
    again = Batches(dataset(labels=np.arange(23)), 5, seed=3)
    assert rows(again, 6) == epochs[1][2], "a step does not depend on those before it"
    assert rows(Batches(dataset(labels=np.arange(23)), 5, seed=4), 0) != epochs[0][0]
    (batch,) = batches.at(2)
    assert np.array_equal(batch.feeds["image"], IMAGES[batch.labels])


def test_in_order():
    found = list(Batches(dataset(labels=np.arange(23)), 10).ordered())
    assert [len(batch.labels) for batch in found] == [10, 10, 3]
    assert np.array_equal(torch.cat([batch.feeds["image"] for batch in found]), IMAGES)
    assert sum(batch.weight for batch in found) == pytest.approx(1)


def test_processes_and_passes_share_a_step():
    augment = Augment(flip=True, shift=1)
    whole = Batches(dataset(labels=np.arange(23)), 11, augment=augment)
    (expected,) = whole.at(1)
    parts = []
    for rank in range(2):
        share = Batches(dataset(labels=np.arange(23)), 11, augment=augment, accumulate=2, world=World(rank, 2))
        parts += list(share.at(1))
    assert [len(part.labels) for part in parts] == [3, 3, 3, 2]
    assert sum(part.weight for part in parts) == pytest.approx(1)
    assert torch.equal(torch.cat([part.labels for part in parts]), expected.labels)
    assert torch.equal(torch.cat([part.feeds["image"] for part in parts]), expected.feeds["image"])


def test_a_fixed_batch_is_gathered():
    (first, second) = Batches(dataset(batch=4), 9).at(0)
    assert first.feeds["image"].shape == second.feeds["image"].shape == (4, 1, 4, 5)
    assert [batch.weight for batch in (first, second)] == [0.5, 0.5]


def test_augmentation_moves_whole_images():
    image = np.arange(1.0, 13.0, dtype=np.float32).reshape(1, 1, 3, 4)
    draws = np.array([[1, 2, 0]], np.uint64)  # mirrored; down by 2 % 3 - 1 = 1; right by 0 - 1: left by 1
    found = Augment(flip=True, shift=1).apply(torch.from_numpy(image), draws)[0, 0].numpy()
    mirrored = image[0, 0, :, ::-1]
    down = np.concatenate([mirrored[:1], mirrored[:-1]])
    assert np.array_equal(found, np.concatenate([down[:, 1:], down[:, -1:]], axis=1))
    kept = Augment(flip=True, shift=1).apply(torch.from_numpy(image), np.array([[2, 1, 4]], np.uint64))
    assert np.array_equal(kept, image)


def test_augmentation_reaches_every_case():
    batches = Batches(dataset(np.repeat(IMAGES[:1], 64, 0)), 64, augment=Augment.parse("flip, shift:1"))
    (batch,) = batches.at(0)
    distinct = {image.numpy().tobytes() for image in batch.feeds["image"]}
    assert 12 <= len(distinct) <= 18  # 2 * 3 * 3 cases


def test_identity_follows_the_values():
    one = Batches(dataset(), 5).identity()
    assert one == Batches(dataset(), 7).identity()
    changed = IMAGES.copy()
    changed[22, 0, 3, 4] += 1
    assert one != Batches(dataset(changed), 5).identity()
    assert one != Batches(dataset(labels=np.arange(23)), 5).identity()


def spoiled(value: float) -> np.ndarray:
    images = IMAGES.copy()
    images[7, 0, 1, 1] = images[9, 0, 0, 0] = value
    return images


@pytest.mark.parametrize(
    ("data", "size", "line"),
    [
        (dataset(), 24, "here has 23 samples, fewer than a batch of 24"),
        (dataset(spoiled(np.nan)), 4, "here: 2 samples hold NaN or infinity in input 'image', the first is sample 7"),
        (dataset(spoiled(np.inf)), 4, "the first is sample 7"),
        (dataset([IMAGES[0], IMAGES[1, :, :3]]), 2, r"shapes \(1, 3, 5\) and \(1, 4, 5\): a batch needs them alike"),
        (dataset(labels=np.full(23, np.inf)), 4, "labels of 23 samples hold NaN or infinity"),
        (Dataset([{"text": np.array(["a"])}] * 4), 2, "takes strings"),
    ],
)
def test_bad_data(data, size, line):
    with pytest.raises(DataError, match=line):
        Batches(data, size)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("rotate", "'rotate' is none"),
        ("shift", "'shift' is none"),
        ("flip:1", "none"),
        ("shift:0", "'shift:0' is none"),
    ],
)
def test_no_such_augmentation(text, line):
    with pytest.raises(RecipeError, match=line):
        Augment.parse(text)


def test_augmentation_that_does_not_fit():
    with pytest.raises(RecipeError, match="varies images"):
        Batches(Dataset([{"x": np.zeros(3, np.float32)}] * 4), 2, augment=Augment(flip=True))
    with pytest.raises(RecipeError, match="not their labels"):
        Batches(dataset(labels=np.zeros((23, 4, 5))), 2, augment=Augment(flip=True))
    with pytest.raises(RecipeError, match="out of sight"):
        Batches(dataset(), 2, augment=Augment(shift=4))
    with pytest.raises(RecipeError, match="batch 3 cannot be cut into 4 parts"):
        Batches(dataset(), 3, accumulate=4)
