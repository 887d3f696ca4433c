"""Steps: what repeats a search without measuring, what is kept of a step, and samples in parts that share nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcompress.codebook.resuming import Checkpoint
from onnxcompress.compression import attempts, steps
from onnxcompress.compression import parts as parts_module
from onnxcompress.compression.attempts import Attempts
from onnxcompress.compression.parts import read_parts
from onnxcompress.compression.point import Point
from onnxcompress.compression.recipe import Step
from onnxcompress.compression.settings import Shared, options_of
from onnxcompress.errors import DataError, EquivalenceError, QuantizationError, RecipeError
from onnxcompress.testing import model

WEIGHT = np.eye(4, dtype=np.float32)


def network(output: str = "y") -> onnx.ModelProto:
    return model(f"g (float[N,4] x) => (float[N,4] {output}) {{ {output} = MatMul(x, w) }}", w=WEIGHT)


# -- blocks by name ----------------------------------------------------------------------------------------------------


@dataclass
class Block:
    add: str | None


@dataclass
class Offer:
    name: str
    block: Block


@dataclass
class Found:
    pruned: list[str]
    deleted: list[str]
    offers: list[Offer] = field(default_factory=list)


def test_a_search_for_blocks_is_repeated_by_their_names():
    offers = [Offer("a[1]", Block("add1")), Offer("add1/delete", Block("add1")), Offer("b*", Block("add2"))]
    found = Found(["add1/delete", "b*"], ["add1/delete"], [*offers, Offer("c", Block(None))])
    settings = steps._blocks_by_name({"latency": "0.5x", "stages": "supernet,search", "lr": 0.1}, found)
    assert settings.pop("only") == ["a[[]1]", "b[*]"] and settings.pop("delete") == ["a[[]1]"]
    assert settings == {"stages": "supernet,search", "lr": 0.1, "blocks": 2}
    assert fnmatchcase("a[1]", "a[[]1]") and not fnmatchcase("bc", "b[*]")


def test_what_needs_torch_says_so_where_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(steps, "has_torch", lambda: False)
    shared = Shared("none", "none", tmp_path)
    for step in (Step("prune-depth"), Step("quantize", {"tune": "joint"})):
        with pytest.raises(RecipeError, match="needs torch: pip install"):
            steps.run_step(step, tmp_path, tmp_path, shared, None, print)  # type: ignore[arg-type]


# -- training ----------------------------------------------------------------------------------------------------------


def test_what_was_pruned_is_trained_on_labels_and_on_what_the_original_gives(tmp_path):
    rows = np.random.default_rng(0).normal(size=(96, 4)).astype(np.float32)
    labels = rows.argmax(axis=1)
    for name, part in (("fitting", slice(0, 64)), ("deciding", slice(64, 96))):
        np.savez(tmp_path / f"{name}.npz", x=rows[part], labels=labels[part])
    worse = network()
    worse.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.roll(WEIGHT, 1, 0) + 0.5 * WEIGHT, "w"))
    for name, proto in (("m", network()), ("worse", worse)):
        onnx.save(proto, tmp_path / f"{name}.onnx")
    shared = Shared(str(tmp_path / "fitting.npz"), str(tmp_path / "deciding.npz"), tmp_path / "m.onnx", labelled=True)
    step = Step("finetune", {"labels": True, "distill": True, "steps": 60, "batch": 16, "lr": 0.1})
    said: list[str] = []
    done = steps.run_step(step, tmp_path / "worse.onnx", tmp_path / "out.onnx", shared, None, said.append)  # type: ignore[arg-type]  # finetune has no use for a runtime
    assert "top1 on the samples that decide: 0." in done.summary[1] and done.repeat == step.settings
    before, after = (float(figure) for figure in done.summary[1].rpartition(": ")[2].split(" -> "))
    assert before < 0.7 < 0.9 < after and any(line.startswith("finetune: step ") for line in said)
    assert not (tmp_path / "out.onnx.checkpoint").exists()


def test_labels_need_no_teacher(tmp_path):
    labelled, bare = (Shared("f.npz", "d.npz", tmp_path / "m.onnx", labelled=one) for one in (True, False))
    assert options_of("finetune", {"steps": 2}, labelled).teacher is None
    assert options_of("finetune", {"steps": 2}, bare).teacher == tmp_path / "m.onnx"
    assert options_of("finetune", {"distill": True}, labelled).teacher == tmp_path / "m.onnx"
    assert options_of("finetune", {"teacher": "t.onnx"}, labelled).teacher == Path("t.onnx")
    found = options_of("finetune", {"train": "head*", "freeze-bn": True, "feature": ["a=b"]}, labelled)
    assert found.only == ("head*",) and found.training.freeze_statistics and found.wishes.features == ("a=b",)


def test_a_drop_that_quantize_looks_for_is_one_of_labels_where_there_are_some(tmp_path):
    shared = Shared("f.npz", "d.npz", tmp_path / "m.onnx", metric="top5", labelled=True)
    found = options_of("quantize", {"max-drop": "1%"}, shared)
    assert (found.max_drop, found.data, found.val, found.metric) == (0.01, "f.npz", "d.npz", "top5")
    assert options_of("quantize", {"max-drop": "1%"}, Shared("f.npz", "d.npz", tmp_path)).val is None
    assert options_of("quantize", {"size": "4K"}, shared).val is None


# -- attempts ----------------------------------------------------------------------------------------------------------


class OneMeter:
    """A meter that counts."""

    def __init__(self) -> None:
        self.measured: list[str] = []

    def measure(self, path: Path) -> Point:
        self.measured.append(path.name)
        return Point(path.stat().st_size, 16, None, "", None, None, None, 0.0)


def tried(folder: Path, meter: OneMeter) -> Attempts:
    source = folder / "m.onnx"
    onnx.save(network(), source)
    checkpoint = Checkpoint(folder / "state", {})
    return Attempts(source, Shared("none", "none", source), meter, checkpoint, None, lambda line: None)  # type: ignore[arg-type]  # no runtime


def test_what_was_tried_is_not_done_again(tmp_path, monkeypatch):
    calls = []

    def step(step, source, output, *rest):
        calls.append(step.verb)
        if step.verb == "quantize":
            raise QuantizationError("too small")
        onnx.save(network(), output)
        return steps.Done(["did it"], {"O": 1})

    monkeypatch.setattr(attempts, "run_step", step)
    for _ in range(2):
        meter = OneMeter()
        made = tried(tmp_path, meter)
        first = made.attempt(Step("optimize"), made.original, "why")
        failed = made.attempt(Step("quantize", {"size": "1"}), first, "why")
        assert made.attempt(Step("optimize"), made.original, "again") is first
        assert first.found.macs == 16 and first.repeat == {"O": 1} and first.chain == [first]
        assert failed.failure == "too small" and failed.path is None
    assert calls == ["optimize", "quantize"] and not meter.measured
    # Another step at the same place is another attempt.
    made.attempt(Step("optimize", {"O": 2}), first, "why")
    made = tried(tmp_path, OneMeter())
    made.attempt(Step("optimize", {"O": 0}), made.original, "why")
    assert calls == ["optimize", "quantize", "optimize", "optimize"]


def test_another_interface_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(
        attempts, "run_step", lambda step, source, output, *rest: onnx.save(network("z"), output) or steps.Done()
    )
    made = tried(tmp_path, OneMeter())
    assert "interface has changed" in made.attempt(Step("optimize"), made.original, "why").failure


def test_of_a_step_that_the_user_wrote_only_what_is_out_of_reach_is_a_failure(tmp_path, monkeypatch):
    errors = iter([EquivalenceError("not the same"), RecipeError("no such layer")])

    def step(*rest):
        raise next(errors)

    monkeypatch.setattr(attempts, "run_step", step)
    made = tried(tmp_path, OneMeter())
    assert made.attempt(Step("optimize"), made.original, "", planned=False).failure == "not the same"
    with pytest.raises(RecipeError, match="no such layer"):
        made.attempt(Step("quantize"), made.original, "", planned=False)


def test_a_bug_of_a_planned_step_costs_that_step_alone(tmp_path, monkeypatch):
    def step(*rest):
        raise ValueError("math domain error")

    monkeypatch.setattr(attempts, "run_step", step)
    made = tried(tmp_path, OneMeter())
    found = made.attempt(Step("prune-scale", {"macs": "9"}), made.original, "")
    assert found.failure == "internal error, ValueError: math domain error" and found.path is None
    with pytest.raises(ValueError, match="math domain"):  # what the user wrote is asked for
        made.attempt(Step("prune-scale", {"macs": "8"}), made.original, "", planned=False)
    monkeypatch.setenv("ONNXCOMPRESS_TRACEBACK", "1")
    with pytest.raises(ValueError, match="math domain"):
        made.attempt(Step("prune-scale", {"macs": "7"}), made.original, "")


# -- samples -----------------------------------------------------------------------------------------------------------


def test_parts_of_the_samples_share_none_and_keep_their_labels(tmp_path):
    rows = np.arange(200, dtype=np.float32).repeat(4).reshape(200, 4)
    np.savez(tmp_path / "d.npz", x=rows, labels=np.arange(200))
    parts = read_parts(network(), str(tmp_path / "d.npz"), None, limit=None, preprocess=None, seed=0)
    parts.write(tmp_path)
    fitting, deciding = (np.load(path) for path in (parts.fitting, parts.deciding))
    assert parts.judging is not None and parts.labelled and parts.fitted == 120
    numbers = [set(fitting["labels"]), set(deciding["labels"]), set(map(int, parts.judging.labels))]
    assert [len(one) for one in numbers] == [120, 30, 50] and len(set.union(*numbers)) == 200
    assert all((found["x"][:, 0] == found["labels"]).all() for found in (fitting, deciding))
    assert all(
        sample["x"][0] == label for sample, label in zip(parts.judging.samples, parts.judging.labels, strict=True)
    )
    again = read_parts(network(), str(tmp_path / "d.npz"), None, limit=None, preprocess=None, seed=0)
    other = read_parts(network(), str(tmp_path / "d.npz"), None, limit=None, preprocess=None, seed=1)
    assert again.digest == parts.digest != other.digest


def test_samples_of_their_own_leave_more_to_fit_with(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.ones((100, 4), np.float32))
    np.savez(tmp_path / "v.npz", x=np.zeros((10, 4), np.float32))
    found = read_parts(network(), str(tmp_path / "d.npz"), str(tmp_path / "v.npz"), limit=None, preprocess=None, seed=0)
    assert found.fitted == 80 and not found.labelled and found.judging is not None and len(found.judging) == 10


def test_more_than_fits_into_memory_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "FITTING_BYTES", 16 * 50)
    monkeypatch.setattr(parts_module, "JUDGING_BYTES", 16 * 20)
    np.savez(tmp_path / "d.npz", x=np.ones((100, 4), np.float32))
    path = str(tmp_path / "d.npz")
    found = read_parts(network(), path, path, limit=None, preprocess=None, seed=0)
    assert found.fitted == 50 and found.judging is not None and len(found.judging) == 20
    assert "20 of 100 samples" in found.notes[0] and "50 of 80 samples" in found.notes[1]


def test_too_few_samples_are_refused(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.ones((20, 4), np.float32))
    with pytest.raises(DataError, match="20 samples, too few to be parted"):
        read_parts(network(), str(tmp_path / "d.npz"), None, limit=None, preprocess=None, seed=0)
