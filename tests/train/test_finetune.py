"""``onnxcompress finetune``: what it makes of a file, and what it says when it cannot."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from onnxcompress import models
from onnxcompress.cli import cli
from onnxcompress.errors import DataError, EquivalenceError, OnnxCompressError, RecipeError
from onnxcompress.model_io import load, save
from onnxcompress.testing import model, run
from onnxcompress.train.finetune import FinetuneOptions, finetune
from onnxcompress.train.losses import LossSettings
from onnxcompress.train.settings import TrainSettings
from onnxcompress.train.supervision import Wishes

RNG = np.random.default_rng(0)
TEXT = """g (float[N,1,6,6] image) => (float[N,3] scores) {
    c = Conv<pads=[1,1,1,1]>(image, stem_weight)
    n = BatchNormalization(c, stem_scale, stem_bias, stem_mean, stem_var)
    r = Relu(n)
    d = Conv<pads=[1,1,1,1]>(r, deep_weight)
    m = BatchNormalization(d, deep_scale, deep_bias, deep_mean, deep_var)
    q = Relu(m)
    p = GlobalAveragePool(q)
    f = Flatten(p)
    scores = Gemm(f, head_weight, head_bias)
}"""


def norm(name: str, channels: int) -> dict[str, np.ndarray]:
    kinds = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0}
    return {f"{name}_{kind}": np.full(channels, value, np.float32) for kind, value in kinds.items()}


WEIGHTS = {
    "stem_weight": RNG.normal(size=(6, 1, 3, 3)).astype(np.float32) * 0.5,
    **norm("stem", 6),
    "deep_weight": RNG.normal(size=(8, 6, 3, 3)).astype(np.float32) * 0.2,
    **norm("deep", 8),
    "head_weight": RNG.normal(size=(8, 3)).astype(np.float32) * 0.3,
    "head_bias": np.zeros(3, np.float32),
}
# Three classes: stripes across, stripes down, a checkerboard; with noise, contrast and offset.
_ROWS, _COLUMNS = np.mgrid[:6, :6]
PATTERNS = np.stack([_ROWS % 2, _COLUMNS % 2, (_ROWS + _COLUMNS) % 2]).astype(np.float32)


def images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    contrast, noise = rng.uniform(0.5, 1.5, (count, 1, 1)), rng.normal(size=(count, 6, 6)) * 0.4
    found = PATTERNS[labels] * contrast + noise + 0.5
    return found[:, None].astype(np.float32), labels


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with an untrained model, data with and without labels, and a model trained on it."""
    folder = tmp_path_factory.mktemp("finetune")
    proto = model(TEXT, **WEIGHTS)
    proto.doc_string = "three patterns"
    proto.metadata_props.add(key="classes", value="rows, columns, both")
    proto.graph.node[0].doc_string = "the stem"
    onnx.save(proto, folder / "raw.onnx")
    for name, count, seed in (("train", 192, 1), ("val", 96, 2)):
        samples, labels = images(count, seed)
        np.savez(folder / f"{name}.npz", image=samples, labels=labels)
        np.savez(folder / f"{name}_bare.npz", image=samples)
    options = FinetuneOptions(
        data=str(folder / "train.npz"),
        val=str(folder / "val.npz"),
        training=TrainSettings(epochs=8, batch=32, learning_rate=1e-2),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    result = finetune(folder / "raw.onnx", folder / "trained.onnx", options)
    torch.set_num_threads(before)
    assert result.before < 0.5 and result.after > 0.9  # measured 0.26 and 0.96
    assert result.learned_from == "labels (classes)" and result.metric == "top1" and result.samples == 96
    return folder


def options_for(files: Path, *, data: str = "train.npz", val: str | None = "val.npz", **more) -> FinetuneOptions:
    training = TrainSettings(**{"epochs": 2, "batch": 32, "learning_rate": 1e-2, **more.pop("training", {})})
    return FinetuneOptions(str(files / data), None if val is None else str(files / val), training=training, **more)


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def changed(a: Path, b: Path) -> set[str]:
    ours, theirs = initializers(a), initializers(b)
    return {name for name in ours if not np.array_equal(ours[name], theirs[name])}


def perturbed(source: Path, target: Path, amount: float) -> Path:
    """Noise on every kernel, as damage that training repairs."""
    graph, rng = load(source), np.random.default_rng(0)
    for tensor in graph.tensors().values():
        values = getattr(tensor, "values", None)
        if isinstance(values, np.ndarray) and values.ndim == 4:
            tensor.values = (values + rng.normal(size=values.shape) * values.std() * amount).astype(np.float32)
    save(graph, target)
    return target


# -- what it does ------------------------------------------------------------------------------------------------------


def test_nothing_but_numbers_changes(files):
    raw, trained = onnx.load(files / "raw.onnx"), onnx.load(files / "trained.onnx")
    assert changed(files / "raw.onnx", files / "trained.onnx") == set(WEIGHTS)
    for proto in (raw, trained):
        del proto.graph.initializer[:]
    assert raw.SerializeToString() == trained.SerializeToString(), "doc strings, metadata, nodes and interface"
    assert not list(files.glob("*.checkpoint")), "the state of a finished run is of no use"


def test_repairs_the_damaged_digits_network(tmp_path):
    pytest.importorskip("sklearn")
    damaged = perturbed(models.path("digits"), tmp_path / "damaged.onnx", 0.9)
    options = FinetuneOptions(
        "sklearn:digits:train", "sklearn:digits", training=TrainSettings(epochs=1, batch=64, learning_rate=1e-3)
    )
    result = finetune(damaged, tmp_path / "out.onnx", options)
    assert result.before < 0.3 and result.after > 0.93  # measured 0.177 and 0.967
    assert result.training.history[0][1] == pytest.approx(result.before, abs=2e-3)


def test_distils_without_labels(files, tmp_path):
    student = perturbed(files / "trained.onnx", tmp_path / "student.onnx", 1.5)
    options = options_for(
        files, data="train_bare.npz", val="val_bare.npz", teacher=files / "trained.onnx", training={"epochs": 5}
    )
    result = finetune(student, tmp_path / "out.onnx", options)
    assert (result.metric, result.learned_from) == ("agreement", "the teacher's logits")
    assert result.before < 0.7 and result.after > 0.9  # measured 0.53 and 0.96


def test_features_and_values_of_a_teacher(files, tmp_path):
    student = perturbed(files / "trained.onnx", tmp_path / "student.onnx", 1.0)
    wishes = Wishes(distill=True, distill_loss="mse", metric="mse", features=("r", "q=q"))
    options = options_for(
        files, data="train_bare.npz", val="val_bare.npz", teacher=files / "trained.onnx", wishes=wishes
    )
    result = finetune(student, tmp_path / "out.onnx", options)
    assert result.learned_from == "the teacher's values, 2 features" and not result.higher_is_better
    assert result.after < result.before / 3


def test_a_final_softmax_is_seen_through(files, tmp_path):
    """Labels and a teacher's logits meet the tensor before the Softmax; the figure is that of the output."""
    text = TEXT.replace("scores = Gemm", "z = Gemm").replace("head_bias)", "head_bias)\n scores = Softmax<axis=1>(z)")
    onnx.save(model(text, **initializers(files / "raw.onnx")), tmp_path / "soft.onnx")
    options = options_for(files, teacher=files / "trained.onnx", training={"epochs": 6})
    result = finetune(tmp_path / "soft.onnx", tmp_path / "out.onnx", options)
    assert result.learned_from == "labels (classes), the teacher's logits"
    assert result.before < 0.5 and result.after > 0.8  # measured 0.26 and 0.90
    finetune(files / "raw.onnx", tmp_path / "plain.onnx", options)
    assert not changed(tmp_path / "plain.onnx", tmp_path / "out.onnx")


def test_learns_values(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(128, 4)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=(x @ rng.normal(size=(4, 2))).astype(np.float32))
    proto = model("g (float[N,4] x) => (float[N,2] y) { y = MatMul(x, w) }", w=np.zeros((4, 2), np.float32))
    onnx.save(proto, tmp_path / "linear.onnx")
    options = options_for(tmp_path, data="data.npz", val="data.npz", training={"epochs": 20, "learning_rate": 0.2})
    result = finetune(tmp_path / "linear.onnx", tmp_path / "linear.onnx", options)
    assert (result.metric, result.learned_from) == ("mse", "labels (values)")
    assert result.after < 1e-3 * result.before


def test_freeze_and_train_by_name(files, tmp_path):
    finetune(files / "raw.onnx", tmp_path / "a.onnx", options_for(files, freeze=("stem_*", "*_bias")))
    moved = {"deep_weight", "deep_scale", "head_weight"}
    statistics = {f"{name}_{kind}" for name in ("stem", "deep") for kind in ("mean", "var")}
    assert changed(files / "raw.onnx", tmp_path / "a.onnx") == moved | statistics
    options = options_for(
        files, only=("head_*",), freeze=("*_bias",), training={"freeze_statistics": True, "epochs": 4}
    )
    finetune(files / "raw.onnx", tmp_path / "b.onnx", options)
    assert changed(files / "raw.onnx", tmp_path / "b.onnx") == {"head_weight"}


@pytest.mark.parametrize("batch", [96, 1])
def test_bn_only_gives_the_statistics_of_the_data(files, tmp_path, batch):
    """Of all samples at once, and one at a time, where each node sees what those before it make of their new ones."""
    options = options_for(files, data="val.npz", bn_only=True, training={"batch": batch})
    result = finetune(files / "raw.onnx", tmp_path / "out.onnx", options)
    statistics = {f"{name}_{kind}" for name in ("stem", "deep") for kind in ("mean", "var")}
    assert changed(files / "raw.onnx", tmp_path / "out.onnx") == statistics == set(result.changed)
    proto = onnx.load(tmp_path / "out.onnx")
    for name in ("c", "d"):
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    _, *inputs = run(proto, {"image": images(96, 2)[0]})
    found = initializers(tmp_path / "out.onnx")
    for name, values in zip(("stem", "deep"), inputs, strict=True):
        values = values.astype(np.float64)
        np.testing.assert_allclose(found[f"{name}_mean"], values.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[f"{name}_var"], values.var((0, 2, 3)), rtol=1e-5)


def test_no_step_is_better_than_the_input(files, tmp_path):
    options = options_for(
        files, training={"epochs": 1, "learning_rate": 5.0, "schedule": "constant", "optimizer": "sgd"}
    )
    result = finetune(files / "trained.onnx", tmp_path / "out.onnx", options)
    assert result.training.best_step == 0 and result.after == result.before and not result.changed
    assert (tmp_path / "out.onnx").read_bytes() == (files / "trained.onnx").read_bytes()


def test_half_precision_weights_are_rounded_once(files, tmp_path):
    weights = {name: value.astype(np.float16) for name, value in initializers(files / "raw.onnx").items()}
    text = TEXT.replace("float[", "float16[")
    onnx.save(model(text, **weights), tmp_path / "half.onnx")
    result = finetune(tmp_path / "half.onnx", tmp_path / "out.onnx", options_for(files, training={"epochs": 6}))
    assert {value.dtype for value in initializers(tmp_path / "out.onnx").values()} == {np.dtype(np.float16)}
    assert result.after > 0.9


# -- the verb ----------------------------------------------------------------------------------------------------------


def arguments(files: Path, output: Path, *more: str) -> list[str]:
    data = ["--data", str(files / "train.npz"), "--val", str(files / "val.npz"), "--batch", "32", "--lr", "1e-2"]
    return ["finetune", str(files / "raw.onnx"), "-o", str(output), *data, "--threads", "1", *more]


def test_the_table_and_tensorboard(files, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ["--epochs", "3", "--augment", "flip,shift:1", "--ema", "0.8", "--tensorboard", str(tmp_path / "board")]
    found = CliRunner().invoke(cli, arguments(files, tmp_path / "out.onnx", *more), catch_exceptions=False)
    assert "learned from labels (classes)" in found.stdout and "18 of 18 steps" in found.stdout
    assert "top1 on 96 validation samples" in found.stdout and "best at step" in found.stdout
    assert "step 18/18  loss" in found.stderr
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert len(events.Scalars("loss/train")) == 18 and len(events.Scalars("top1/validation")) == 3


def test_json(files, tmp_path):
    more = ["--steps", "7", "--eval-every", "3", "--json", "--distill-weight", "1", "--optimizer", "sgd"]
    out = CliRunner().invoke(cli, arguments(files, tmp_path / "out.onnx", *more), catch_exceptions=False).stdout
    found = json.loads(out)
    assert [step for step, _ in found["training"]["history"]] == [0, 3, 6, 7]
    assert found["training"]["total"] == 7 and found["metric"] == "top1"


def test_without_torch(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RecipeError, match=r"finetune needs torch: pip install onnxcompress\[train\]"):
        CliRunner().invoke(cli, arguments(files, tmp_path / "out.onnx"), catch_exceptions=False)


def test_without_tensorboard(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RecipeError, match=r"pip install onnxcompress\[tensorboard\]"):
        finetune(files / "raw.onnx", tmp_path / "out.onnx", options_for(files, tensorboard=tmp_path / "board"))
    assert not list(tmp_path.iterdir())


# -- several processes, and none ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes():
    """Processes forked off one that has imported torch, which takes seconds each time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["onnxcompress.cli", "onnxcompress.train.finetune", "torch._dynamo"])
    return context


def start(context, script: Path, arguments: list[str], environment: dict[str, str] | None = None):
    script.write_text(
        f"import os\nfrom onnxcompress.cli import main\nos.environ.update({environment or {}!r})\nmain({arguments!r})\n"
    )
    process = context.Process(target=runpy.run_path, args=(str(script),))
    process.start()
    return process


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_goes_on_exactly(files, tmp_path, processes):
    more = ["--epochs", "40", "--checkpoint-every", "5", "--ema", "0.9", "--augment", "shift:1", "-q"]
    target = tmp_path / "killed.onnx"
    state = tmp_path / "killed.onnx.checkpoint" / "state.pt"
    process = start(processes, tmp_path / "a.py", arguments(files, target, *more))
    deadline = time.monotonic() + 120
    while not state.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL and state.exists() and not target.exists()
    assert 0 < torch.load(state, weights_only=True)["step"] < 240
    before = state.stat().st_mtime_ns
    interrupted = start(processes, tmp_path / "a.py", arguments(files, target, *more))
    while state.stat().st_mtime_ns == before and interrupted.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(interrupted.pid, signal.SIGINT)
    interrupted.join()
    assert interrupted.exitcode == 130 and not target.exists()
    resumed = start(processes, tmp_path / "a.py", arguments(files, target, *more))
    whole = start(processes, tmp_path / "b.py", arguments(files, tmp_path / "whole.onnx", *more))
    for each in (resumed, whole):
        each.join()
        assert each.exitcode == 0
    assert target.read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    assert not state.parent.exists()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_two_processes_train_what_one_trains(files, tmp_path, processes):
    more = ["--epochs", "4", "--optimizer", "sgd", "--schedule", "constant", "--augment", "flip", "--batch", "33", "-q"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    two = []
    for rank in range(2):
        environment = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        two.append(
            start(processes, tmp_path / f"{rank}.py", arguments(files, tmp_path / "two.onnx", *more), environment)
        )
    one = start(processes, tmp_path / "one.py", arguments(files, tmp_path / "one.onnx", *more))
    for each in (*two, one):
        each.join()
        assert each.exitcode == 0
    ours, theirs = initializers(tmp_path / "one.onnx"), initializers(tmp_path / "two.onnx")
    worst = max(np.abs(ours[name] - theirs[name]).max() / np.abs(ours[name]).max() for name in ours)
    assert changed(tmp_path / "one.onnx", files / "raw.onnx") == set(WEIGHTS)
    assert worst < 3e-6  # measured 3.2e-7: sums in another order


# -- what it refuses ---------------------------------------------------------------------------------------------------


def refused(
    files: Path, tmp_path: Path, kind: type[OnnxCompressError], line: str, source="raw.onnx", **options
) -> None:
    with pytest.raises(kind, match=line):
        finetune(files / source, tmp_path / "out.onnx", options_for(files, **options))
    assert not (tmp_path / "out.onnx").exists() and not list(tmp_path.glob("*.checkpoint"))


SAMPLES, CLASSES = images(64, 3)


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({"image": SAMPLES[:, :, :5], "labels": CLASSES}, r"shape .*expects a stack of samples"),
        ({"image": SAMPLES.astype(np.int32), "labels": CLASSES}, "is int32"),
        ({"image": np.where(SAMPLES > 2, np.inf, SAMPLES), "labels": CLASSES}, "hold NaN or infinity in input 'image'"),
        ({"image": np.where(SAMPLES > 2, np.nan, SAMPLES), "labels": CLASSES}, "NaN"),
        ({"image": SAMPLES, "labels": CLASSES + 1}, "class 3, output 'scores' has classes 0 to 2"),
        ({"image": SAMPLES, "labels": CLASSES - 1}, "class -1, output 'scores' has classes 0 to 2"),
        ({"image": SAMPLES, "labels": CLASSES * 0 + 1}, "all 64 labels are class 1: there is nothing to tell apart"),
        ({"image": SAMPLES, "labels": np.full((64, 3), np.nan)}, "labels hold NaN"),
        (
            {"image": SAMPLES, "labels": np.zeros((64, 2), np.float32)},
            r"labels of shape \(2\) do not fit output 'scores'",
        ),
        (
            {"image": SAMPLES, "labels": np.zeros((64, 2), np.int64)},
            r"labels of shape \(2\) do not fit output 'scores'",
        ),
        ({"image": SAMPLES, "labels": np.ones((64, 3), np.int64)}, "neither class indices nor one-hot"),
        ({"image": SAMPLES[:20], "labels": CLASSES[:20]}, "has 20 samples, fewer than a batch of 32"),
    ],
)
def test_bad_data_is_found_before_training(files, tmp_path, arrays, line):
    np.savez(tmp_path / "bad.npz", **arrays)
    refused(files, tmp_path, DataError, line, data=str(tmp_path / "bad.npz"))


@pytest.mark.parametrize(
    ("kind", "line", "options"),
    [
        (
            DataError,
            "has no labels, and --labels asks for them",
            {"data": "train_bare.npz", "wishes": Wishes(labels=True)},
        ),
        (
            RecipeError,
            "has no labels, so there is nothing to learn from: name with --teacher",
            {"data": "train_bare.npz"},
        ),
        (RecipeError, "there is no validation data", {"val": None}),
        (DataError, "no labels and there is no teacher to agree with", {"val": "val_bare.npz"}),
        (DataError, "metric top1 needs labels", {"val": "val_bare.npz", "wishes": Wishes(metric="top1")}),
        (RecipeError, "metric 'top9' is unknown", {"wishes": Wishes(metric="top9")}),
        (RecipeError, "--distill needs a teacher", {"wishes": Wishes(distill=True)}),
        (RecipeError, "--feature matches tensors of a teacher", {"wishes": Wishes(features=("r",))}),
        (RecipeError, "output 'z': the model has 'scores'", {"wishes": Wishes(output="z")}),
        (RecipeError, r"'body_\*' is the name of no weight; there are 8, such as deep_bias", {"freeze": ("body_*",)}),
        (RecipeError, "nothing is left to train", {"freeze": ("*",)}),
        (RecipeError, "--bn-only trains nothing", {"bn_only": True, "augment": "flip"}),
        (RecipeError, "batch 2 cannot be cut into 4 parts", {"training": {"batch": 2, "accumulate": 4}}),
    ],
)
def test_settings_that_do_not_fit(files, tmp_path, kind, line, options):
    refused(files, tmp_path, kind, line, **options)


def test_a_teacher_that_does_not_fit(files, tmp_path):
    def teacher(name: str, text: str, **weights: np.ndarray) -> Path:
        onnx.save(model(text, **weights), tmp_path / name)
        return tmp_path / name

    four = teacher(
        "four.onnx",
        TEXT.replace("N,3]", "N,4]"),
        **{**WEIGHTS, "head_weight": np.zeros((8, 4), np.float32)} | {"head_bias": np.zeros(4, np.float32)},
    )
    refused(files, tmp_path, RecipeError, r"'scores' is \(2, 3\), the teacher's 'scores' \(2, 4\)", teacher=four)
    two_inputs = teacher("two.onnx", "g (float[N,3] a, float[N,3] b) => (float[N,3] y) { y = Add(a, b) }")
    refused(files, tmp_path, RecipeError, "the teacher takes 'a', 'b', the model 'image'", teacher=two_inputs)
    missing = options = {"teacher": files / "trained.onnx", "wishes": Wishes(features=("r=nowhere",))}
    refused(files, tmp_path, RecipeError, "the teacher: .*nowhere", **missing)
    options = {"teacher": files / "trained.onnx", "wishes": Wishes(distill=True)}
    refused(files, tmp_path, RecipeError, "is the model itself", source="trained.onnx", **options)
    options = {"teacher": files / "trained.onnx", "wishes": Wishes(labels=True)}
    refused(files, tmp_path, RecipeError, "leaves the teacher out", **options)


@pytest.mark.parametrize(
    ("wishes", "line"),
    [
        (Wishes(), "no output of floats is shared with the teacher"),
        (Wishes(features=("image",)), "1 features: no weight that is trained has a say in it"),
    ],
)
def test_nothing_to_learn_by(files, tmp_path, wishes, line):
    text = TEXT.replace("float[N,3] scores", "bool[N,3] sure").replace(
        "\n}", "\n    sure = Greater(scores, head_bias)\n}"
    )
    onnx.save(model(text, **WEIGHTS), tmp_path / "sure.onnx")
    more = {"data": "train_bare.npz", "val": "val_bare.npz", "teacher": tmp_path / "sure.onnx"}
    refused(files, tmp_path, RecipeError, line, source=tmp_path / "sure.onnx", wishes=wishes, **more)


def test_nothing_to_estimate(tmp_path, files):
    proto = model("g (float[N,1,6,6] image) => (float[N,1,6,6] y) { y = Mul(image, w) }", w=np.ones(6, np.float32))
    onnx.save(proto, tmp_path / "plain.onnx")
    refused(
        files, tmp_path, RecipeError, "no BatchNormalization", source=tmp_path / "plain.onnx", bn_only=True, val=None
    )


def test_a_result_that_onnxruntime_does_not_confirm_is_not_written(files, tmp_path, monkeypatch):
    from onnxcompress.train import finetune as module

    monkeypatch.setattr(module, "_run", lambda runtime, path, judged, output: np.eye(3, dtype=np.float32)[[0] * 96])
    with pytest.raises(EquivalenceError, match=r"top1 is 0\.\d+ on onnxruntime and 0\.\d+ in torch"):
        finetune(files / "raw.onnx", tmp_path / "out.onnx", options_for(files))
    assert not (tmp_path / "out.onnx").exists()


def test_smoothing_reaches_the_loss(files, tmp_path):
    """On a model that is sure of itself, smoothed labels cost more."""
    losses = []
    for smoothing in (0.0, 0.4):
        options = options_for(files, wishes=Wishes(losses=LossSettings(smoothing=smoothing)), training={"steps": 1})
        losses.append(finetune(files / "trained.onnx", tmp_path / "out.onnx", options).training.loss)
    assert losses[1] > losses[0] + 0.1
