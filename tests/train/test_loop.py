"""The loop: it learns, keeps the best, ends when it should, and goes on exactly where it stopped."""

from __future__ import annotations

import math
import os
import signal

import numpy as np
import pytest
import torch

from onnxcompress.data import Dataset
from onnxcompress.errors import RecipeError, TrainingError
from onnxcompress.model_io import load
from onnxcompress.testing import model
from onnxcompress.train.batches import Batches
from onnxcompress.train.checkpoint import Checkpoint
from onnxcompress.train.loop import Evaluation, parameter_groups, train
from onnxcompress.train.losses import LossSettings, WeightedSum
from onnxcompress.train.settings import TrainSettings
from onnxcompress.train.torch_graph import TorchGraph

RNG = np.random.default_rng(0)
TEXT = """g (float[N,6] x) => (float[N,3] y) {
    h = Gemm(x, first, first_bias)
    r = Relu(h)
    y = Gemm(r, second, second_bias)
}"""
WEIGHTS = {
    "first": RNG.normal(size=(6, 12)).astype(np.float32) * 0.4,
    "first_bias": np.full(12, 0.1, np.float32),
    "second": RNG.normal(size=(12, 3)).astype(np.float32) * 0.4,
    "second_bias": np.full(3, 0.1, np.float32),
}
SAMPLES = RNG.normal(size=(200, 6)).astype(np.float32)
LABELS = (SAMPLES @ RNG.normal(size=(6, 3))).argmax(1)
CLASSES = WeightedSum(LossSettings(), "y", "classes")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def twin() -> TorchGraph:
    return TorchGraph(load(model(TEXT, **WEIGHTS)))


def batches(size: int = 20, **more) -> Batches:
    return Batches(Dataset([{"x": row} for row in SAMPLES], LABELS), size, **more)


def accuracy(trained) -> float:
    found = trained({"x": torch.from_numpy(SAMPLES)})["y"].argmax(1)
    return float((found == torch.from_numpy(LABELS)).double().mean())


def weights(trained) -> bytes:
    return b"".join(value.detach().numpy().tobytes() for value in trained.parameters())


def scripted(figures):
    """An evaluation that gives these figures and keeps the weights it was shown."""
    seen = []

    def function(trained) -> float:
        seen.append(weights(trained))
        return figures[len(seen) - 1]

    return Evaluation(function), seen


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 2e-2},
        {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "onecycle"},
        {"learning_rate": 2e-2, "ema_decay": 0.9, "clip_norm": 1.0, "accumulate": 2, "schedule": "linear"},
    ],
)
def test_learns(settings):
    trained = twin()
    chosen = TrainSettings(epochs=12, batch=20, **settings)
    result = train(
        trained, batches(accumulate=chosen.accumulate), CLASSES, settings=chosen, evaluation=Evaluation(accuracy)
    )
    before, after = result.figures
    assert before < 0.6 and after > 0.92  # measured 0.535 and 0.97 to 1.0
    assert accuracy(trained) == after == max(figure for _, figure in result.history)
    assert (result.steps, result.total, len(result.history)) == (120, 120, 13)


def test_the_best_weights_are_kept():
    trained = twin()
    evaluation, seen = scripted([1.0, 2.0, 9.0, 3.0, 9.0])
    result = train(trained, batches(), CLASSES, settings=TrainSettings(epochs=4), evaluation=evaluation)
    assert (result.best_step, result.figures) == (20, (1.0, 9.0))
    assert weights(trained) == seen[2] != seen[4]


def test_the_weights_of_the_beginning_count():
    trained = twin()
    evaluation, seen = scripted([5.0, 1.0, math.nan])
    result = train(trained, batches(), CLASSES, settings=TrainSettings(epochs=2), evaluation=evaluation)
    assert result.best_step == 0 and weights(trained) == seen[0] == weights(twin())


def test_lower_may_be_better_and_early_weights_may_be_out_of_question():
    trained = twin()
    evaluation, seen = scripted([0.0, 0.5, 3.0, 2.0])
    evaluation = Evaluation(evaluation.function, "mse", higher_is_better=False)
    result = train(trained, batches(), CLASSES, settings=TrainSettings(epochs=3), evaluation=evaluation, best_from=20)
    assert result.best_step == 30 and weights(trained) == seen[3]


def test_ends_early_without_a_new_best():
    evaluation, _ = scripted([1.0, 2.0, 2.0, 1.5, 9.0])
    settings = TrainSettings(epochs=9, patience=2, eval_every=3)
    result = train(twin(), batches(), CLASSES, settings=settings, evaluation=evaluation)
    assert result.stopped_early and (result.steps, result.best_step, result.total) == (9, 3, 90)


def test_moving_average():
    """average = d * average + (1 - d) * weights, d = min(decay, (1 + step) / (10 + step)); it is validated and kept."""
    states = []
    trained = twin()
    first = weights(trained)
    settings = TrainSettings(steps=6, ema_decay=0.25, eval_every=6)
    evaluation, seen = scripted([0.0, 1.0])
    train(
        trained,
        batches(),
        CLASSES,
        settings=settings,
        evaluation=evaluation,
        on_step=lambda step, total: states.append(np.frombuffer(weights(trained), np.float32)),
    )
    plain = twin()
    train(plain, batches(), CLASSES, settings=TrainSettings(steps=6))
    states = [*states[1:], np.frombuffer(weights(plain), np.float32)]
    average = np.frombuffer(first, np.float32).astype(np.float64)
    for step, state in enumerate(states):
        decay = min(0.25, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * state
    assert weights(trained) == seen[1]
    np.testing.assert_allclose(np.frombuffer(weights(trained), np.float32), average, atol=1e-7)  # measured 4.4e-8


def test_gradients_are_clipped():
    rate, limit = 0.5, 0.01
    trained = twin()
    settings = TrainSettings(
        steps=1, optimizer="sgd", learning_rate=rate, momentum=0, weight_decay=0, clip_norm=limit, schedule="constant"
    )
    train(trained, batches(), lambda m, b: 1000 * CLASSES(m, b), settings=settings)
    moved = np.frombuffer(weights(trained), np.float32) - np.frombuffer(weights(twin()), np.float32)
    assert np.linalg.norm(moved) == pytest.approx(rate * limit, rel=1e-3)


def test_several_passes_add_their_gradients():
    def passes(trained, batch):
        for factor in (0.5, 0.25, 0.25):
            yield factor * CLASSES(trained, batch)

    settings = TrainSettings(steps=5, optimizer="sgd")
    one, several, parts = twin(), twin(), twin()
    first = train(one, batches(), CLASSES, settings=settings)
    second = train(several, batches(), passes, settings=settings)
    train(parts, batches(accumulate=3), CLASSES, settings=settings)
    assert second.loss == pytest.approx(first.loss)
    for other in (several, parts):
        found, expected = (np.frombuffer(weights(each), np.float32) for each in (other, one))
        np.testing.assert_allclose(found, expected, atol=7e-8)  # measured 0 and 7.5e-9


def test_groups_have_their_own_rates_and_gradients_can_be_changed():
    trained = twin()
    named = dict(trained.named_parameters())
    groups = [{"params": [named["first"]], "lr": 1e-2}, {"params": [named["second"]], "lr": 1e-3}]
    seen = []

    def halt(step: int) -> None:
        seen.append(step)
        named["first"].grad[:3] = 0

    settings = TrainSettings(steps=1, optimizer="adamw", weight_decay=0, schedule="constant", warmup=0)
    train(trained, batches(), CLASSES, settings=settings, groups=groups, on_gradients=halt)
    moved = {name: np.abs(value.detach().numpy() - WEIGHTS[name]) for name, value in named.items()}
    assert seen == [0]
    # The first step of Adam is the rate, whatever the gradient.
    assert moved["first"][:3].max() == 0 and np.median(moved["first"][3:]) == pytest.approx(1e-2, rel=1e-3)
    assert np.median(moved["second"]) == pytest.approx(1e-3, rel=1e-3)
    assert moved["first_bias"].max() == moved["second_bias"].max() == 0


def test_vectors_have_no_weight_decay():
    wide, narrow = parameter_groups(dict(twin().named_parameters()), TrainSettings(weight_decay=0.3))
    assert [tuple(p.shape) for p in wide["params"]] == [(6, 12), (12, 3)] and wide["weight_decay"] == 0.3
    assert [tuple(p.shape) for p in narrow["params"]] == [(12,), (3,)] and narrow["weight_decay"] == 0


def noisy(trained, batch):
    """An objective that draws from torch's generator, as Dropout does."""
    drop = {"x": torch.nn.functional.dropout(batch.feeds["x"], 0.2)}
    return CLASSES(trained, type(batch)(drop, batch.labels))


RESUMED = [
    {"ema_decay": 0.8, "accumulate": 2, "eval_every": 4},
    {"optimizer": "sgd", "schedule": "onecycle", "clip_norm": 0.5},
]


@pytest.mark.parametrize("more", RESUMED)
def test_a_stopped_run_goes_on_exactly(more, tmp_path):
    settings = TrainSettings(steps=23, checkpoint_every=5, **more)

    def go(trained, checkpoint=None, progress=None):
        data = batches(accumulate=settings.accumulate)
        evaluation = Evaluation(accuracy)
        return train(
            trained, data, noisy, settings=settings, evaluation=evaluation, checkpoint=checkpoint, progress=progress
        )

    def die(now) -> None:
        if now.step == 13:
            raise ZeroDivisionError

    expected = twin()
    whole = go(expected)
    state = torch.random.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        go(twin(), Checkpoint(tmp_path / "run", {"a": 1}), die)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers are his own"
    found = twin()
    result = go(found, Checkpoint(tmp_path / "run", {"a": 1}))
    assert result.resumed_from == 10 and (result.history, result.best_step) == (whole.history, whole.best_step)
    assert weights(found) == weights(expected)
    assert go(twin(), Checkpoint(tmp_path / "run", {"a": 1}, resume=False)).resumed_from is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_a_checkpoint(number, tmp_path):
    settings = TrainSettings(steps=12)
    expected = twin()
    train(expected, batches(), noisy, settings=settings)
    before = signal.getsignal(number)

    def interrupt(now) -> None:
        if now.step == 7:
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt, match=r"step 8 of 12 is kept in .*state.pt: the same command goes on"):
        train(
            twin(), batches(), noisy, settings=settings, progress=interrupt, checkpoint=Checkpoint(tmp_path / "run", {})
        )
    assert signal.getsignal(number) is before
    found = twin()
    assert (
        train(found, batches(), noisy, settings=settings, checkpoint=Checkpoint(tmp_path / "run", {})).resumed_from == 8
    )
    assert weights(found) == weights(expected)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    checkpoint = Checkpoint(tmp_path, {"seed": 0, "model": "a" * 50, "steps": 10})
    checkpoint.save({"step": 3})
    assert Checkpoint(tmp_path, checkpoint.identity).load()["step"] == 3
    other = Checkpoint(tmp_path, {"seed": 1, "model": "b" * 50, "steps": 10})
    with pytest.raises(RecipeError, match=r"of another run: seed was 0, now 1, another model; --no-resume starts anew"):
        other.load()
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"], "nothing half-written is left"
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:300])
    with pytest.raises(RecipeError, match="cannot be read"):
        checkpoint.load()
    checkpoint.remove()
    assert not tmp_path.exists()


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    def objective(trained, batch):
        loss = CLASSES(trained, batch)
        return loss * math.nan if step[0] == 7 else loss

    step = [0]
    settings = TrainSettings(steps=12, checkpoint_every=5)
    with pytest.raises(TrainingError) as error:
        train(
            twin(),
            batches(),
            objective,
            settings=settings,
            checkpoint=Checkpoint(tmp_path, {}),
            on_step=lambda number, total: step.__setitem__(0, number),
        )
    assert error.value.exit_code == 1
    assert "step 8 of 12: the loss is nan" in str(error.value)
    assert f"the last good checkpoint is {tmp_path / 'state.pt'}, step 5" in str(error.value)


def test_weights_that_are_no_numbers_are_not_kept(tmp_path):
    """The loss of the last step is finite, its gradient is not."""
    trained = twin()

    def spoil(step: int) -> None:
        trained.get_parameter("second").grad[0, 0] = math.inf

    checkpoint = Checkpoint(tmp_path, {})
    settings = TrainSettings(steps=1, optimizer="sgd")
    with pytest.raises(TrainingError, match=r"'second' is not finite .* no checkpoint was written yet"):
        train(trained, batches(), CLASSES, settings=settings, on_gradients=spoil, checkpoint=checkpoint)
    assert not checkpoint.path.exists()


def test_half_precision_learns_in_channels_last():
    text = """g (float[N,2,4,4] x) => (float[N,3] y) {
        c = Conv<pads=[1,1,1,1]>(x, kernel) r = Relu(c) f = Flatten(r) y = Gemm(f, matrix)
    }"""
    kernel = RNG.normal(size=(8, 2, 3, 3)).astype(np.float32) * 0.3
    matrix = RNG.normal(size=(128, 3)).astype(np.float32) * 0.1
    trained = TorchGraph(load(model(text, kernel=kernel, matrix=matrix)))
    images = RNG.normal(size=(60, 2, 4, 4)).astype(np.float32)
    data = Batches(Dataset([{"x": image} for image in images], images[:, 0, 0, :3].argmax(1)), 20)
    seen = set()

    def objective(trained, batch):
        inner = trained(batch.feeds, ["r", "y"])
        last = batch.feeds["x"].is_contiguous(memory_format=torch.channels_last)
        seen.add((inner["r"].dtype, last, trained.get_parameter("kernel").dtype))
        return CLASSES(trained, batch)

    result = train(
        trained, data, objective, settings=TrainSettings(epochs=10, precision="bfloat16", learning_rate=5e-3)
    )
    assert seen == {(torch.bfloat16, True, torch.float32)}
    assert result.loss < 0.8  # measured 0.57; 1.1 at the start


@pytest.mark.parametrize(
    ("bad", "line"),
    [
        ({"optimizer": "lion"}, "optimizer 'lion' is unknown: choose adamw, sgd"),
        ({"schedule": "step"}, "schedule 'step' is unknown"),
        ({"epochs": 0}, "epochs 0: expected more than 0"),
        ({"steps": 0}, "steps 0: expected at least 1"),
        ({"learning_rate": math.nan}, "learning rate nan"),
        ({"ema_decay": 1.0}, "ema decay 1: expected 0 or more and below 1"),
        ({"weight_decay": -1.0}, "weight decay -1"),
    ],
)
def test_bad_settings(bad, line):
    with pytest.raises(RecipeError, match=line):
        TrainSettings(**bad)


def test_what_cannot_be_run():
    with pytest.raises(RecipeError, match="float16 is for GPUs"):
        train(twin(), batches(), CLASSES, settings=TrainSettings(precision="float16", device="cpu"))
    frozen = TorchGraph(load(model(TEXT, **WEIGHTS)), trainable=lambda name: False)
    with pytest.raises(RecipeError, match="nothing is left to train"):
        train(frozen, batches(), CLASSES, settings=TrainSettings(steps=1))
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match="torch finds no GPU"):
            train(twin(), batches(), CLASSES, settings=TrainSettings(device="cuda"))
