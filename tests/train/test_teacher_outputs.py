"""A teacher runs once for each sample that comes again as it was, and what is kept is what it gave."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from onnxcompress.data import Dataset
from onnxcompress.train.batches import Augment, Batches
from onnxcompress.train.teacher_outputs import TeacherOutputs

IMAGES = np.random.default_rng(0).normal(size=(23, 1, 4, 5)).astype(np.float32)


class Counting:
    """A teacher that remembers which samples it was run on; rows depend on those that they are computed with."""

    def __init__(self) -> None:
        self.twin = nn.Identity()
        self.runs: list[int] = []

    def __call__(self, feeds):
        values = feeds["image"].flatten(1)
        self.runs.append(len(values))
        return {"y": values[:, :3] + values.sum()}

    def of(self, batch):
        return batch.outputs_of(self.twin, ["y"], self)["y"]


def batches(**settings):
    return Batches(Dataset([{"image": image} for image in IMAGES], np.arange(23), "here"), 5, seed=3, **settings)


def taught(source, steps, teacher=None):
    teacher = teacher or Counting()
    found = [torch.cat([teacher.of(batch) for batch in source.at(step)]) for step in steps]
    return teacher, found


@pytest.mark.parametrize("settings", [{}, {"memory_bytes": 0}, {"accumulate": 2}])
def test_epochs_after_the_first_run_only_what_it_left_out(settings):
    source = batches(**settings)
    teacher, first = taught(source, range(4))
    plain = Counting()
    for step, found in enumerate(first):
        assert torch.equal(found, torch.cat([plain(batch.feeds)["y"] for batch in source.at(step)]))
    assert teacher.runs == plain.runs
    taught(source, range(4, 12), teacher)
    assert teacher.runs == [*plain.runs, 3], "23 samples are four batches of five and three more"


def test_a_run_that_is_taken_up_reads_the_same_numbers():
    _, whole = taught(batches(), range(9))
    _, later = taught(batches(), range(6, 9))
    assert all(torch.equal(a, b) for a, b in zip(whole[6:], later, strict=True))


def test_validation_runs_once():
    source, teacher = batches(), Counting()
    found = [torch.cat([teacher.of(batch) for batch in source.ordered()]) for _ in range(3)]
    assert teacher.runs == [5, 5, 5, 5, 3] and torch.equal(found[0], found[2])
    next(source.ordered(2)).outputs_of(teacher.twin, ["y"], teacher)
    assert teacher.runs[-1] == 2, "another size is another computation"


@pytest.mark.parametrize("settings", [{"augment": Augment(flip=True)}])
def test_what_is_varied_is_not_kept(settings):
    teacher, _ = taught(batches(**settings), range(8))
    assert teacher.runs == [5] * 8


def test_what_is_too_large_or_has_no_rows_is_not_kept():
    blocks = [np.arange(0, 4), np.arange(4, 8)]
    feeds = {"x": torch.arange(4.0)[:, None]}
    for run, limit in ((lambda given: {"y": given["x"]}, 31), (lambda given: {"y": given["x"].sum()}, 1 << 20)):
        kept, runs = TeacherOutputs(blocks, lambda rows: feeds, memory_bytes=limit), []

        def counted(given, run=run, runs=runs):
            runs.append(len(given["x"]))
            return run(given)

        twin = nn.Identity()
        for _ in range(2):
            assert torch.equal(kept.of(twin, ["y"], blocks[0], feeds, counted, dict)["y"], run(feeds)["y"])
        assert len(runs) == 3, "once to see, then each time"


def test_teachers_and_outputs_are_told_apart():
    source = batches()
    first, second = Counting(), Counting()
    taught(source, range(4), first)
    taught(source, range(4), second)
    assert first.runs == second.runs == [5] * 4
    batch = next(source.at(0))
    batch.outputs_of(first.twin, ["z"], first)
    assert len(first.runs) == 5


def test_places_are_told_apart():
    """Numbers of half precision are not those of a run in float32."""
    source, teacher = batches(), Counting()
    taught(source, [0], teacher)
    with torch.autocast("cpu", torch.bfloat16):
        taught(source, [0], teacher)
    assert teacher.runs == [5, 5]
