"""One plain training loop for everything that trains an ONNX graph.

    result = train(twin, batches, objective, settings=TrainSettings(epochs=5), evaluation=evaluation)

All that is random is a function of the seed and the step, so a run that was killed and goes on from its checkpoint
ends, in one process, with the very weights of an uninterrupted one. The weights that validate best are kept; those the
run starts from count, so on the validation data the result is never worse than they are.

Where a method needs more than a loss, it plugs in without a loop of its own: an objective that is a generator makes
several passes in a step, their gradients added; ``on_step`` moves what depends on the step, such as a blend of two
flows; ``groups`` gives parameters their own learning rates; ``on_gradients`` sees gradients before they are clipped.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from onnxcompress.errors import RecipeError, TrainingError
from onnxcompress.train import schedules
from onnxcompress.train.batches import Batch, torch_seed
from onnxcompress.train.checkpoint import Checkpoint
from onnxcompress.train.losses import Objective
from onnxcompress.train.parallel import World
from onnxcompress.train.settings import TrainSettings
from onnxcompress.train.torch_graph import TorchGraph

__all__ = [
    "Evaluation",
    "Progress",
    "StepBatches",
    "TrainResult",
    "TrainSettings",
    "TrainingError",
    "parameter_groups",
    "train",
    "update_ema",
]

_SECONDS_BETWEEN_CHECKPOINTS = 30.0

State = dict[str, Tensor]


class StepBatches(Protocol):
    """What the loop asks of its data; see ``Batches``."""

    @property
    def steps_per_epoch(self) -> int: ...
    def at(self, step: int) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Evaluation:
    """How good a model is.

    Args:
        function: Of the model in evaluation mode, without gradients.
        name: Of the figure.
        higher_is_better: Which way is up.
    """

    function: Callable[[nn.Module], float]
    name: str = "score"
    higher_is_better: bool = True

    def better(self, figure: float, than: float) -> bool:
        if math.isnan(than):
            return not math.isnan(figure)
        return figure > than if self.higher_is_better else figure < than


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a step.

    Args:
        step: Steps done.
        total: Steps at most.
        loss: Of the step.
        learning_rate: Of the step, of the first group.
        figure: The validation figure, where the step was followed by a validation.
        best_figure: The best until now; None without validation.
        best_step: When it was reached.
    """

    step: int
    total: int
    loss: float
    learning_rate: float
    figure: float | None
    best_figure: float | None
    best_step: int | None


@dataclass(frozen=True)
class TrainResult:
    """What a run came to; the model holds the best weights, or the last ones without validation.

    Args:
        steps: Steps done, those before a resume included.
        total: Steps that were planned.
        resumed_from: The checkpoint's step; None for a run in one go.
        seconds: Of this process.
        history: (step, figure) of each validation, step 0 being the weights the run started from.
        best_step: The step of the weights that the model now holds.
        loss: Of the last step.
        stopped_early: Patience ended the run.
    """

    steps: int
    total: int
    resumed_from: int | None
    seconds: float
    history: list[tuple[int, float]]
    best_step: int
    loss: float
    stopped_early: bool

    @property
    def figures(self) -> tuple[float, float] | None:
        """The validation figure before training, and of the weights that are kept."""
        return (self.history[0][1], dict(self.history)[self.best_step]) if self.history else None


def parameter_groups(named: Mapping[str, nn.Parameter], settings: TrainSettings) -> list[dict[str, Any]]:
    """Matrices and kernels with weight decay, vectors (biases, scales) without."""
    trained = [p for p in named.values() if p.requires_grad]
    wide = [p for p in trained if sum(size > 1 for size in p.shape) > 1]
    narrow = [p for p in trained if sum(size > 1 for size in p.shape) <= 1]
    groups = [{"params": wide, "weight_decay": settings.decay}, {"params": narrow, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def train(
    model: nn.Module,
    batches: StepBatches,
    objective: Objective,
    *,
    settings: TrainSettings,
    evaluation: Evaluation | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[Progress], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    on_gradients: Callable[[int], None] | None = None,
    groups: Sequence[dict[str, Any]] | None = None,
    best_from: int = 0,
    world: World | None = None,
) -> TrainResult:
    """Train a model in place.

    Args:
        model: A ``TorchGraph``, or a module around one.
        batches: By step; this process's share where there are several.
        objective: What to make small, see ``losses.Objective``.
        settings: How.
        evaluation: Decides which weights are kept.
        checkpoint: Where the state is kept, and taken up from.
        progress: Called after each step, in the first process.
        on_step: Called before each step with its number and the number of all steps.
        on_gradients: Called with the step when its gradients are complete, before they are clipped.
        groups: Parameter groups as torch's optimizers take them, "lr" and "weight_decay" at will; the schedule scales
            each rate. ``parameter_groups`` when None.
        best_from: Weights before this step are never the best, those of step 0 included: for methods that change the
            model while it trains.
        world: This process among several; see ``parallel.joined``.

    Raises:
        TrainingError: The loss or a weight became NaN or infinite.
        RecipeError: Nothing is trainable, the settings do not fit the machine, or the checkpoint is of another run.
        KeyboardInterrupt: SIGINT or SIGTERM; the state was written, and the text says how to go on.
    """
    device = settings.torch_device()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), _quiet_cudnn(device), _Stop() as stop:
        run = _Run(model, settings, device, settings.total_steps(batches.steps_per_epoch), groups, world or World())
        run.evaluation, run.checkpoint, run.best_from = evaluation, checkpoint, best_from
        return run.go(batches, objective, stop, on_step, on_gradients, progress)


@dataclass
class _Run:
    """The state of a run: everything that a checkpoint holds."""

    model: nn.Module
    settings: TrainSettings
    device: torch.device
    total: int
    groups: Sequence[dict[str, Any]] | None
    world: World
    evaluation: Evaluation | None = None
    checkpoint: Checkpoint | None = None
    best_from: int = 0
    step: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)
    best: State | None = None
    best_step: int = 0
    best_figure: float | None = None
    ema: State | None = None
    without_best: int = 0
    resumed_from: int | None = None

    def __post_init__(self) -> None:
        settings = self.settings
        self.dtype = settings.element_type(self.device)
        last = settings.channels_last if settings.channels_last is not None else self.dtype != torch.float32
        self.memory_format = torch.channels_last if last else torch.contiguous_format
        self.model.to(device=self.device)
        if last:
            for parameter in self.model.parameters():
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        groups = list(self.groups or parameter_groups(dict(self.model.named_parameters()), settings))
        if not groups:
            raise RecipeError("nothing is left to train: every initializer is frozen, or none is a weight")
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = _optimizer(groups, settings)
        self.schedule = schedules.make_schedule(settings.schedule, self.total, settings.warmup)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def go(
        self,
        batches: StepBatches,
        objective: Objective,
        stop: _Stop,
        on_step: Callable[[int, int], None] | None,
        on_gradients: Callable[[int], None] | None,
        progress: Callable[[Progress], None] | None,
    ) -> TrainResult:
        start, saved = time.monotonic(), time.monotonic()
        loss = math.nan
        self._begin()
        every = self.settings.eval_every or batches.steps_per_epoch
        while self.step < self.total and not self.out_of_patience:
            torch.manual_seed(torch_seed(self.settings.seed, self.step) ^ self.world.rank)
            if on_step is not None:
                on_step(self.step, self.total)
            loss, stopping = self._one_step(batches, objective, stop, on_gradients)
            self.step += 1
            figure = None
            if self.evaluation is not None and (self.step % every == 0 or self.step == self.total):
                figure = self._evaluate()
            if progress is not None and self.world.first:
                rate = self.optimizer.param_groups[0]["lr"]
                best = (self.best_figure, None if self.best_figure is None else self.best_step)
                progress(Progress(self.step, self.total, loss, rate, figure, *best))
            if stopping or self._checkpoint_is_due(saved):
                self._save()
                saved = time.monotonic()
            if stopping:
                raise KeyboardInterrupt(self._how_to_go_on())
        self._finish()
        if stop.requested:
            raise KeyboardInterrupt(self._how_to_go_on())
        stopped = self.step < self.total
        seconds = time.monotonic() - start
        best_step = self.best_step if self.best is not None else self.step
        history = list(self.history)
        return TrainResult(self.step, self.total, self.resumed_from, seconds, history, best_step, loss, stopped)

    @property
    def out_of_patience(self) -> bool:
        return self.settings.patience is not None and self.without_best >= self.settings.patience

    # -- a step --------------------------------------------------------------------------------------------------------

    def _one_step(
        self, batches: StepBatches, objective: Objective, stop: _Stop, on_gradients: Callable[[int], None] | None
    ) -> tuple[float, bool]:
        """Returns the loss, and whether some process was told to stop."""
        factor = self.schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        _training_mode(self.model, self.settings.freeze_statistics, self.world.size > 1)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches.at(self.step):
            total += self._backward(objective, batch.to(self.device, self.memory_format))
        told = torch.tensor(float(stop.requested), dtype=torch.float64, device=self.device)
        loss, told_anyone = self.world.sum(torch.stack([total, told])).tolist()
        if not math.isfinite(loss):
            raise self._failure(f"the loss is {loss:g}")
        self.world.sum_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        if on_gradients is not None:
            on_gradients(self.step)
        if self.settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._update_ema()
        return loss, told_anyone > 0

    def _backward(self, objective: Objective, batch: Batch) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            found = objective(self.model, batch)
            passes = iter([found] if isinstance(found, Tensor) else found)
            while (loss := next(passes, None)) is not None:
                with torch.autocast(self.device.type, enabled=False):
                    self.scaler.scale(loss * batch.weight).backward()
                total += loss.detach().double() * batch.weight
        return total

    def _update_ema(self) -> None:
        if self.ema is None:
            return
        decay = min(self.settings.ema_decay or 0.0, (1 + self.step) / (10 + self.step))
        update_ema(self.ema, self.model.state_dict(), decay)

    # -- what is kept --------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        state = None if self.checkpoint is None else self.checkpoint.load()
        if self.settings.ema_decay is not None:
            self.ema = _copied(self.model.state_dict())
        if state is not None:
            self._restore(state)
        elif self.evaluation is not None:
            self._evaluate()

    def _evaluate(self) -> float:
        assert self.evaluation is not None
        current = None
        if self.ema is not None:
            current = _copied(self.model.state_dict())
            self.model.load_state_dict(self.ema)
        self.model.eval()
        figure = math.nan
        if self.world.first:
            with torch.no_grad():
                figure = float(self.evaluation.function(self.model))
        figure = self.world.from_first(figure)
        self.history.append((self.step, figure))
        if self.step >= self.best_from:
            if self.best_figure is None or self.evaluation.better(figure, self.best_figure):
                self.best, self.best_step, self.best_figure = _copied(self.model.state_dict()), self.step, figure
                self.without_best = 0
            else:
                self.without_best += 1
        if current is not None:
            self.model.load_state_dict(current)
        return figure

    def _finish(self) -> None:
        self._check_finite()
        if self.checkpoint is not None and self.world.first and self.checkpoint.saved_step != self.step:
            self._save()
        if self.best is not None:
            self.model.load_state_dict(self.best)
        elif self.ema is not None:
            self.model.load_state_dict(self.ema)
        self.model.eval()

    def _checkpoint_is_due(self, saved: float) -> bool:
        if self.checkpoint is None or not self.world.first:
            return False
        if self.settings.checkpoint_every is not None:
            return self.step % self.settings.checkpoint_every == 0
        return time.monotonic() - saved > _SECONDS_BETWEEN_CHECKPOINTS

    def _save(self) -> None:
        if self.checkpoint is None or not self.world.first:
            return
        self._check_finite()
        self.checkpoint.save(
            {
                "step": self.step,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "ema": self.ema,
                "best": self.best,
                "best_step": self.best_step,
                "best_figure": self.best_figure,
                "history": self.history,
                "without_best": self.without_best,
            }
        )

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.ema, self.best = (
            None if s is None else {n: t.to(self.device) for n, t in s.items()} for s in (state["ema"], state["best"])
        )
        self.step = self.resumed_from = state["step"]
        self.best_step, self.best_figure = state["best_step"], state["best_figure"]
        self.history, self.without_best = list(state["history"]), state["without_best"]

    # -- what is said when it fails ------------------------------------------------------------------------------------

    def _check_finite(self) -> None:
        for name, value in self.model.named_parameters():
            if not torch.isfinite(value).all():
                raise self._failure(f"{name!r} is not finite")

    def _failure(self, what: str) -> TrainingError:
        kept = "no checkpoint was written yet"
        if self.checkpoint is not None and self.checkpoint.saved_step is not None:
            kept = f"the last good checkpoint is {self.checkpoint.path}, step {self.checkpoint.saved_step}"
        rate = f"learning rate {self.optimizer.param_groups[0]['lr']:.2g}"
        return TrainingError(
            f"step {self.step + 1} of {self.total}: {what} ({rate}); {kept}; lower the learning rate, or clip gradients"
        )

    def _how_to_go_on(self) -> str:
        if self.checkpoint is None:
            return f"stopped after step {self.step} of {self.total}, no output was written"
        return (
            f"step {self.step} of {self.total} is kept in {self.checkpoint.path}: the same command goes on from there"
        )


def update_ema(average: State, current: Mapping[str, Tensor], decay: float) -> None:
    """average = decay * average + (1 - decay) * current, in place; integers and flags are copied."""
    for name, value in current.items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - decay)
        else:
            average[name].copy_(value)


def _copied(state: Mapping[str, Tensor]) -> State:
    return {name: value.detach().clone() for name, value in state.items()}


def _optimizer(groups: Sequence[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    found: torch.optim.Optimizer
    if settings.optimizer == "adamw":
        found = torch.optim.AdamW(groups, lr=settings.rate, weight_decay=settings.decay)
    else:
        nesterov = settings.momentum > 0
        found = torch.optim.SGD(
            groups, lr=settings.rate, momentum=settings.momentum, weight_decay=settings.decay, nesterov=nesterov
        )
    for group in found.param_groups:
        group["initial_lr"] = group["lr"]
    return found


def _training_mode(model: nn.Module, freeze_statistics: bool, synchronize: bool) -> None:
    for part in model.modules():
        if isinstance(part, TorchGraph):
            part.freeze_batch_statistics |= freeze_statistics
            part.mode.synchronize = synchronize
    model.train()


class _Stop:
    """SIGINT and SIGTERM ask for an end after the step; a second one ends at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextlib.contextmanager
def _quiet_cudnn(device: torch.device) -> Iterator[None]:
    """cuDNN picks the same algorithm in every run."""
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield
